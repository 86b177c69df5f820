"""Other LoRA libraries beside ours: an environment and a worker process for each, run by `python -m benchmarks peers`."""
