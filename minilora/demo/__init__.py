"""A real chat model learns one task in minutes: weights, task, and before and after."""
