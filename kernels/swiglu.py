"""The gated product between the two projections of a decoder layer's MLP, as one operation on the packed first of them.

    y = up ⊙ silu(gate)        [gate, up] = packed,  silu(u) = u σ(u)

    d up = dy ⊙ silu(gate)        d gate = dy ⊙ up ⊙ silu′(gate)        silu′ = σ + silu · (1 − σ)

packed alone is saved, and its gradient is written packed: no half is ever copied.
Source: Shazeer 2020, "GLU Variants Improve Transformer", eq. 6.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora.kernels import backend
from minilora.kernels.scratch import with_slack


def swiglu_reference(packed: Tensor) -> Tensor:
    """The equation as plain differentiable PyTorch: the law the operation is held to."""
    gate, up = packed.chunk(2, dim=-1)
    return up * F.silu(gate)


def forward(packed: Tensor) -> Tensor:
    """y in PyTorch."""
    gate, up = packed.chunk(2, dim=-1)
    return torch.ops.aten.silu.out(gate, out=with_slack(gate)).mul_(up)


def backward(dy: Tensor, packed: Tensor) -> Tensor:
    """The gradient of packed in PyTorch, in its own memory, with one exponential an element."""
    wide = packed.to(torch.promote_types(packed.dtype, torch.float32))
    gate, up = wide.chunk(2, dim=-1)
    gradient = torch.empty_like(wide)
    dgate, dup = gradient.chunk(2, dim=-1)
    sigma, silu = dgate.copy_(gate).sigmoid_(), dup.copy_(gate).mul_(dgate)
    sigma.lerp_(wide.new_ones(()), silu).mul_(up).mul_(dy)
    silu.mul_(dy)
    return gradient.to(packed.dtype)


@torch.library.custom_op("minilora::swiglu", mutates_args=())
def _forward_op(packed: Tensor) -> Tensor:
    from minilora.kernels import swiglu_triton  # here, so that machines without Triton import all the rest

    with torch.cuda.device_of(packed):
        return swiglu_triton.forward(packed)


@_forward_op.register_fake
def _(packed):
    return packed.new_empty(*packed.shape[:-1], packed.shape[-1] // 2)


@torch.library.custom_op("minilora::swiglu_backward", mutates_args=())
def _backward_op(dy: Tensor, packed: Tensor) -> Tensor:
    from minilora.kernels import swiglu_triton

    with torch.cuda.device_of(packed):
        return swiglu_triton.backward(dy, packed)


@_backward_op.register_fake
def _(dy, packed):
    return packed.new_empty(packed.shape)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, packed):
        ctx.save_for_backward(packed)
        run = _forward_op if backend.choose(packed.device, packed.dtype)[0] == "triton" else forward
        return run(packed)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (packed,) = ctx.saved_tensors
        run = _backward_op if backend.choose(packed.device, packed.dtype)[0] == "triton" else backward
        return run(dy, packed)


def swiglu(packed: Tensor) -> Tensor:
    """up ⊙ silu(gate), differentiable once.

    Args:
        packed: (..., 2·I), any floating dtype: gate in the first half of the last dimension, up in the second.

    Returns:
        (..., I).

    Raises:
        ValueError: the last dimension has no halves.
    """
    if packed.shape[-1] % 2:
        raise ValueError(f"swiglu: packed must end in 2·I features, gate and up, not in {packed.shape[-1]}")
    return _SwiGLU.apply(packed)
