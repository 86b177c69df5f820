"""The steps of rms_norm as Triton kernels: one program a row, which it reads once and holds in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora.kernels import tiles


@triton.jit
def rms_norm_kernel(
    X,  # (M, C) contiguous, as all matrices here
    DELTA,  # (M, C), or None
    W,  # (C,)
    Y,  # (M, C)
    RHO,  # (M,) float32
    H,  # (M, C), or None without DELTA
    eps,
    C: tl.constexpr,
    BC: tl.constexpr,  # C or more
):
    rc = tl.arange(0, BC)
    inside = rc < C
    at = tl.program_id(0).to(tl.int64) * C + rc
    h = tl.load(X + at, mask=inside, other=0.0)
    if DELTA is not None:
        h = (h.to(tl.float32) + tl.load(DELTA + at, mask=inside, other=0.0).to(tl.float32)).to(h.dtype)
        tl.store(H + at, h, mask=inside)
    wide = h.to(tl.float32)
    rho = tl.rsqrt(tl.sum(wide * wide, axis=0) / C + eps)
    tl.store(RHO + tl.program_id(0), rho)
    n = (wide * rho).to(h.dtype).to(tl.float32)  # rounded before the weight, as in the published models
    tl.store(Y + at, (n * tl.load(W + rc, mask=inside, other=0.0).to(tl.float32)).to(h.dtype), mask=inside)


def forward(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> list[Tensor]:
    """y (..., C) and ρ (..., 1), and h where there is a delta."""
    x, C = x.contiguous(), x.shape[-1]
    delta = None if delta is None else delta.contiguous()
    y, rho = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    h = None if delta is None else torch.empty_like(x)
    BC, num_warps = tiles.for_row(C)
    if rho.numel():
        rms_norm_kernel[(rho.numel(),)](x, delta, weight.contiguous(), y, rho, h, eps, C=C, BC=BC, num_warps=num_warps)
    return [y, rho] if h is None else [y, rho, h]


@triton.jit
def rms_norm_backward_kernel(
    DY,  # (M, C) contiguous, as all matrices here
    DH,  # (M, C), or None
    H,  # (M, C)
    RHO,  # (M,) float32
    W,  # (C,)
    DX,  # (M, C)
    C: tl.constexpr,
    BC: tl.constexpr,  # C or more
):
    rc = tl.arange(0, BC)
    inside = rc < C
    at = tl.program_id(0).to(tl.int64) * C + rc
    rho = tl.load(RHO + tl.program_id(0))
    n = rho * tl.load(H + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(W + rc, mask=inside, other=0.0).to(tl.float32) * tl.load(DY + at, mask=inside, other=0.0).to(tl.float32)
    dx = rho * (g - n * (tl.sum(n * g, axis=0) / C))
    if DH is not None:
        dx += tl.load(DH + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=inside)


def backward(dy: Tensor, dh: Tensor | None, h: Tensor, rho: Tensor, weight: Tensor) -> Tensor:
    """The gradient of x and of delta, (..., C)."""
    h, C = h.contiguous(), h.shape[-1]
    dh = None if dh is None else dh.contiguous()
    dx = torch.empty_like(h)
    BC, num_warps = tiles.for_row(C)
    if rho.numel():
        rms_norm_backward_kernel[(rho.numel(),)](
            dy.contiguous(), dh, h, rho, weight.contiguous(), dx, C=C, BC=BC, num_warps=num_warps
        )
    return dx
