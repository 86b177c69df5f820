"""The most memory that a program has held so far."""

import sys

import torch


def peak_memory(device: torch.device) -> int | None:
    """Bytes at the peak: of torch's allocations on a CUDA device, elsewhere of the whole process; None where nobody counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
