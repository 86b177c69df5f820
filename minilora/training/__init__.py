"""The training loop, and what a run needs to be left alone: checkpoints, evaluation, plans, several processes."""
