"""A plain linear layer whose frozen weight may be of any kind: y = x Wᵀ + bias, dx = dy W.

It is F.linear but for a 16-bit weight on a CPU that cannot multiply such numbers (arithmetic): then x, and a block of rows of W
at a time, go to float32, where the products are taken, and y is rounded once. A 4-bit W (nf4_tensor) is dequantised likewise.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.kernels import nf4_tensor
from minilora.kernels.arithmetic import linear_dtype
from minilora.kernels.blocks import brought, by_column, by_row
from minilora.kernels.nf4_tensor import NF4Tensor


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias, (M, K) -> (M, N), in x's dtype, which may be another than that of W (N, K), plain or 4-bit."""
    if isinstance(weight, NF4Tensor):
        return nf4_tensor.linear(x, weight, bias)
    if weight.dtype == x.dtype:
        return F.linear(x, weight, bias)
    if weight.stride(0) == 1:  # a transposed view: its columns lie one after another
        return by_column(x, brought(weight.t(), x.dtype, len(x)), weight.shape[0], bias)
    return by_row(x, brought(weight, x.dtype, len(x)), weight.shape[0], bias)


@torch.library.custom_op("minilora::linear", mutates_args=())
def _linear_op(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = linear_dtype(x)
    return product(x.to(dtype), weight, None if bias is None else bias.to(dtype)).to(x.dtype)


@_linear_op.register_fake
def _(x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[0])


def _save(ctx, inputs, output):
    x, weight, _ = inputs
    ctx.save_for_backward(x if weight.requires_grad else None, weight)


def _gradients(ctx, dy):
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad
    return (
        _linear_op(dy, weight.t(), None) if need_x else None,
        (dy.float().T @ x.float()).to(weight.dtype) if need_weight else None,
        dy.sum(dim=0) if need_bias else None,
    )


_linear_op.register_autograd(_gradients, setup_context=_save)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, with the same arguments, errors and gradients; its products in linear_dtype(x)."""
    if linear_dtype(x) == x.dtype or x.dtype != weight.dtype or isinstance(weight, NF4Tensor):
        return F.linear(x, weight, bias)
    return _linear_op(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])


class Linear(nn.Linear):
    """nn.Linear by linear."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
