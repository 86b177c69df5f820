"""Measurements of speed and memory, with their committed results; what is true or false is in tests."""
