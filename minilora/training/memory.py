"""The memory of a program: the most that it has held so far, and what it keeps of what it frees."""

import ctypes
import os
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


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
MAPPED = 2**25  # bytes from which a tensor has pages of its own; glibc takes no more


def keep_freed_memory() -> None:
    """Makes glibc keep what this process frees, below MAPPED, since every training step takes the same memory again.

    Else each step has some hundred megabytes of new pages from the system, which took 0.1 s of 2.9 for 512 tokens of a model of
    135M. Does nothing where malloc is another's, or where the environment tells it what to do (MALLOC_…, GLIBC_TUNABLES).
    """
    told = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    if sys.platform == "linux" and not told and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED)
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
