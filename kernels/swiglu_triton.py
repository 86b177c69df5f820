"""The steps of swiglu as Triton kernels: one program a row of packed and a block of its I columns, gate and up together."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora.kernels.tiles import SWIGLU


@triton.jit
def swiglu_kernel(
    PACKED,  # (M, 2·I) contiguous, as all matrices here
    Y,  # (M, I)
    I: tl.constexpr,  # noqa: E741
    BI: tl.constexpr,
):
    row, ri = tl.program_id(0).to(tl.int64), tl.program_id(1) * BI + tl.arange(0, BI)
    gate = tl.load(PACKED + row * (2 * I) + ri, mask=ri < I, other=0.0).to(tl.float32)
    up = tl.load(PACKED + row * (2 * I) + I + ri, mask=ri < I, other=0.0).to(tl.float32)
    tl.store(Y + row * I + ri, (up * gate * tl.sigmoid(gate)).to(Y.dtype.element_ty), mask=ri < I)


def forward(packed: Tensor) -> Tensor:
    """y (..., I)."""
    packed, I = packed.contiguous(), packed.shape[-1] // 2  # noqa: E741
    y = packed.new_empty(*packed.shape[:-1], I)
    if y.numel():
        swiglu_kernel[(y.numel() // I, triton.cdiv(I, SWIGLU.BN))](packed, y, I=I, BI=SWIGLU.BN, num_warps=SWIGLU.num_warps)
    return y


@triton.jit
def swiglu_backward_kernel(
    DY,  # (M, I) contiguous, as all matrices here
    PACKED,  # (M, 2·I)
    DPACKED,  # (M, 2·I)
    I: tl.constexpr,  # noqa: E741
    BI: tl.constexpr,
):
    row, ri = tl.program_id(0).to(tl.int64), tl.program_id(1) * BI + tl.arange(0, BI)
    at = row * (2 * I) + ri
    gate = tl.load(PACKED + at, mask=ri < I, other=0.0).to(tl.float32)
    up = tl.load(PACKED + at + I, mask=ri < I, other=0.0).to(tl.float32)
    dy = tl.load(DY + row * I + ri, mask=ri < I, other=0.0).to(tl.float32)
    sigma = tl.sigmoid(gate)
    silu = gate * sigma
    tl.store(DPACKED + at, (dy * up * (sigma + silu * (1 - sigma))).to(DPACKED.dtype.element_ty), mask=ri < I)
    tl.store(DPACKED + at + I, (dy * silu).to(DPACKED.dtype.element_ty), mask=ri < I)


def backward(dy: Tensor, packed: Tensor) -> Tensor:
    """The gradient of packed, (..., 2·I)."""
    dy, packed, I = dy.contiguous(), packed.contiguous(), dy.shape[-1]  # noqa: E741
    gradient = torch.empty_like(packed)
    if dy.numel():
        grid = dy.numel() // I, triton.cdiv(I, SWIGLU.BN)
        swiglu_backward_kernel[grid](dy, packed, gradient, I=I, BI=SWIGLU.BN, num_warps=SWIGLU.num_warps)
    return gradient
