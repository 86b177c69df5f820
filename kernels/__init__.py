"""The hot operations, one a file, each beside the equation it computes.

Imports torch, triton where it runs, and nothing of ours, so that a kernel can be read, tested and timed on its own.
"""
