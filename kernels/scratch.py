"""Memory for what is forgotten soon: what a thread uses again, and what others can have afterwards.

On a CPU a large buffer made anew comes from the system page by page, and the first touch of its pages can cost as much as the
arithmetic on them; whether it does differs from process to process.
"""

import threading

import torch
from torch import Tensor

_held = threading.local()


def scratch(use: str, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(n,) of any values, overwritten by whoever asks in the same thread for the same use next.

    On a CPU the largest that was asked for is kept for each use and thread; on a GPU torch's allocator does that for all.
    """
    if device.type != "cpu":
        return torch.empty(n, dtype=dtype, device=device)
    rooms, size = vars(_held), n * dtype.itemsize
    if use not in rooms or len(rooms[use]) < size:
        rooms.pop(use, None)  # before its successor is made
        rooms[use] = torch.empty(size, dtype=torch.uint8)
    return rooms[use][:size].view(dtype)


def with_slack(like: Tensor) -> Tensor:
    """An empty tensor like another, contiguous, in a 256th more memory than it needs: for what is freed while others stay.

    glibc's aligned allocation takes no hole of just its own size. With some slack, what stays can lie where a tensor as large
    was, or two of them where a larger one was; a step of 30 layers took 476 MB for 520.
    """
    n = like.numel()
    return like.new_empty(n + n // 256 + 64)[:n].view(like.shape)  # 64: room for two of glibc's headers and the alignment of both
