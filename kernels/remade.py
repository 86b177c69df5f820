"""What backward makes again, since that takes less than to keep it: a result of a few passes over what is kept already."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Kept = Tensor | Callable[[], Tensor]  # in place of a tensor that is saved: itself, or what makes it again
_thread = threading.local()


@contextmanager
def remade(result: Tensor, make: Callable[..., Tensor], *inputs: Tensor) -> Iterator[None]:
    """Operations inside that save result for their backward save inputs in its place; backward calls make(*inputs).

    Where others decide what is saved, as torch.compile and activation checkpointing do, nothing changes.

    Args:
        result: make(*inputs), bit for bit.
        inputs: tensors that are kept anyway.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or _others_decide():
        yield
        return
    known = vars(_thread).setdefault("known", {})  # results by their memory, which none else has until this block ends
    known[_memory(result)] = result.shape, partial(make, *inputs)
    try:
        with saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        del known[_memory(result)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # the same for views and detached tensors; an address is 0 on the meta device


def _others_decide() -> bool:
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # only the innermost are asked
    return hooks is not None and hooks[0] is not _pack


def _pack(saved: Tensor) -> Kept:
    shape, make = _thread.known.get(_memory(saved), (torch.Size(), None))
    if make is None or saved.numel() != shape.numel() or not saved.is_contiguous():
        return saved
    shape = saved.shape  # of a view of the result
    return lambda: make().view(shape)


def _unpack(kept: Kept) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept()
