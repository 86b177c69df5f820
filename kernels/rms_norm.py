"""The normalisation before each half of a decoder layer, with the sum that comes before it, as one operation.

    h = x + delta
    y = w ⊙ round(ρ h)        ρ = 1 / sqrt(mean(h²) + ε) of each row, in float32; rounded to h's dtype

With n = ρ h and g = w ⊙ dy, the gradient of x and of delta is

    dh + ρ (g − n · mean(n ⊙ g))

h and ρ are saved, beside the frozen w. Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", eq. 4.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora.kernels import backend
from minilora.kernels.scratch import with_slack


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The equation of y as plain differentiable PyTorch: the law the operation is held to."""
    h = _at_least_float32(x)
    h = h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def forward(h: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, ρ) in PyTorch, in the memory of y: fresh pages cost a CPU more than the arithmetic."""
    wide = _at_least_float32(h)
    y = torch.square(wide, out=with_slack(wide))
    rho = y.mean(dim=-1, keepdim=True).add_(eps).rsqrt_()  # (…, 1)
    return torch.mul(wide, rho, out=y).to(h.dtype).mul_(weight), rho


def backward(dy: Tensor, dh: Tensor | None, h: Tensor, rho: Tensor, weight: Tensor) -> Tensor:
    """The gradient of x and of delta in PyTorch."""
    wide, g = _at_least_float32(h), _at_least_float32(dy) * weight
    share = (g * wide).mean(dim=-1, keepdim=True).mul_(rho.pow(3))
    dx = g.mul_(rho).addcmul_(wide, share, value=-1)
    return (dx if dh is None else dx.add_(dh)).to(h.dtype)  # dh last, as autograd adds it: checkpointing changes no bit


@torch.library.custom_op("minilora::rms_norm", mutates_args=())
def _forward_op(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> list[Tensor]:
    """y and ρ by Triton, and h where there is a delta."""
    from minilora.kernels import rms_norm_triton  # here, so that machines without Triton import all the rest

    with torch.cuda.device_of(x):
        return rms_norm_triton.forward(x, delta, weight, eps)


@_forward_op.register_fake
def _(x, delta, weight, eps):
    y, rho = x.new_empty(x.shape), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    return [y, rho] if delta is None else [y, rho, x.new_empty(x.shape)]


@torch.library.custom_op("minilora::rms_norm_backward", mutates_args=())
def _backward_op(dy: Tensor, dh: Tensor | None, h: Tensor, rho: Tensor, weight: Tensor) -> Tensor:
    from minilora.kernels import rms_norm_triton

    with torch.cuda.device_of(h):
        return rms_norm_triton.backward(dy, dh, h, rho, weight)


@_backward_op.register_fake
def _(dy, dh, h, rho, weight):
    return h.new_empty(h.shape)


def _sum_in_place(x: Tensor, delta: Tensor) -> Tensor:
    """x + delta in the memory of delta, which leaves holes in a CPU's heap otherwise: 75 MB of 610 in a step of 30 layers.

    Autograd need not know, unless whoever made delta keeps it, which it would refuse.
    """
    return delta.detach().add_(x)


class _RMSNorm(torch.autograd.Function):
    """Only Triton's launches are torch operations: on a CPU a call of one takes as long as several passes over 200 rows."""

    @staticmethod
    def forward(ctx, x, delta, weight, eps):
        if backend.choose(x.device, x.dtype)[0] == "triton":
            y, rho, *sums = _forward_op(x, delta, weight, eps)
        else:
            sums = [] if delta is None else [x + delta if torch.compiler.is_compiling() else _sum_in_place(x, delta)]
            y, rho = forward(*(sums or [x]), weight, eps)
        ctx.save_for_backward(*(sums or [x]), rho, weight)
        return y, *sums

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dh=None):
        h, rho, weight = ctx.saved_tensors
        run = _backward_op if backend.choose(h.device, h.dtype)[0] == "triton" else backward
        dx = run(dy, dh, h, rho, weight)
        return dx, None if dh is None else dx, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y with h = x, differentiable once in x; in a weight that asks for a gradient too, by the reference.

    Args:
        x: (..., C), any floating dtype.
        weight: (C,), usually frozen.

    Returns:
        (..., C). The reference also serves an x and a weight that differ in dtype, and promotes them as torch does.

    Raises:
        ValueError: weight has not as many features as x.
    """
    _check(x, x, weight)
    if _is_trained(weight) or x.dtype != weight.dtype:
        return rms_norm_reference(x, weight, eps)
    return _RMSNorm.apply(x, None, weight, eps)[0]


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(h, y), both differentiable once in x and delta; all else as in rms_norm.

    Args:
        delta: (..., C) like x; may be overwritten, to hold h.

    Raises:
        ValueError: weight has not as many features as x, or delta another shape; both at once.
    """
    _check(x, delta, weight)
    if _is_trained(weight) or not x.dtype == delta.dtype == weight.dtype:
        h = x + delta
        return h, rms_norm_reference(h, weight, eps)
    y, h = _RMSNorm.apply(x, delta, weight, eps)
    return h, y


def _is_trained(weight: Tensor) -> bool:
    return weight.requires_grad and torch.is_grad_enabled()


def _check(x, delta, weight):
    faults = []
    if weight.shape != x.shape[-1:]:
        faults.append(f"weight must be (C,) = {tuple(x.shape[-1:])}, as x ends, not {tuple(weight.shape)}")
    if delta.shape != x.shape:
        faults.append(f"delta must be {tuple(x.shape)} as x is, not {tuple(delta.shape)}")
    if faults:
        raise ValueError("rms_norm: " + "; ".join(faults))
