"""A frozen linear layer and its low-rank update as one operation with its own backward.

    Y = X Wᵀ + bias + s · drop(X) Aᵀ Bᵀ

X (M, K), W (N, K), A (R, K), B (N, R). A fused projection, several layers stacked in one W, takes one adapter a slice:
G slices share X; slice g owns R rows of A and adds to its own columns of Y only:

    Y[:, start_g:stop_g] += s · drop(X) A_gᵀ B_gᵀ      A (G·R, K), B (Σ_g (stop_g − start_g), R)

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora.kernels.dropout import draw_seed, drop

Slices = tuple[tuple[int, int], ...]  # ((start, stop), …) columns of Y, ascending, disjoint


def lora_linear_reference(x, weight, lora_A, lora_B, scaling, bias=None, dropout=0.0, seed=0, slices=None) -> Tensor:
    """The equation as plain differentiable PyTorch, for any leading dimensions of x: the law the operation is held to."""
    slices = slices or ((0, weight.shape[0]),)
    y = F.linear(x, weight, bias)
    s = F.linear(drop(x, dropout, seed), lora_A.to(x.dtype))
    deltas = [torch.zeros_like(y[..., :0])]
    end = 0
    for (start, stop), s_g, B_g in _per_slice(slices, s, lora_B.to(x.dtype)):
        deltas += [torch.zeros_like(y[..., end:start]), scaling * F.linear(s_g, B_g)]
        end = stop
    deltas.append(torch.zeros_like(y[..., end:]))
    return y + torch.cat(deltas, dim=-1)


def _per_slice(slices: Slices, s: Tensor, lora_B: Tensor):
    """Yields ((start, stop), S_g (M, R), B_g (stop − start, R)) for each slice: views, no copies."""
    widths = [stop - start for start, stop in slices]
    return zip(slices, s.chunk(len(slices), dim=-1), lora_B.split(widths), strict=True)


class _LoraLinear(torch.autograd.Function):
    """Saves X and S = drop(X) Aᵀ (M, G·R) for backward, and no second activation of X's size.

    With T_g = s · dY_g B_g (M, R), the columns dY_g of slice g, and T all T_g side by side:

        dX = dY W + drop(T A)        dA = Tᵀ drop(X)        dB_g = s · dY_gᵀ S_g
    """

    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, scaling, bias, dropout, seed, slices):
        s = drop(x, dropout, seed) @ lora_A.to(x.dtype).T  # (M, G·R)
        y = F.linear(x, weight, bias)  # (M, N)
        for (start, stop), s_g, B_g in _per_slice(slices, s, lora_B.to(x.dtype)):
            y[:, start:stop].addmm_(s_g, B_g.T, alpha=scaling)
        ctx.save_for_backward(x, s, weight, lora_A, lora_B)
        ctx.scaling, ctx.dropout, ctx.seed, ctx.slices = scaling, dropout, seed, slices
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, s, weight, lora_A, lora_B = ctx.saved_tensors
        need_x, need_weight, need_A, need_B, _, need_bias, *_ = ctx.needs_input_grad
        dx = dw = dA = dB = dbias = None
        if need_x or need_A:
            t = torch.empty_like(s)
            per_slice = _per_slice(ctx.slices, t, lora_B.to(dy.dtype))
            for (start, stop), t_g, B_g in per_slice:
                torch.mul(dy[:, start:stop] @ B_g, ctx.scaling, out=t_g)
        if need_x:
            dx = dy @ weight
            if ctx.dropout:
                dx += drop(t @ lora_A.to(dy.dtype), ctx.dropout, ctx.seed)
            else:
                dx.addmm_(t, lora_A.to(dy.dtype))
        if need_A:
            dA = (t.T @ drop(x, ctx.dropout, ctx.seed)).to(lora_A.dtype)
        if need_B:
            dB = torch.empty_like(lora_B)
            for (start, stop), s_g, dB_g in _per_slice(ctx.slices, s, dB):
                torch.mul(dy[:, start:stop].T @ s_g, ctx.scaling, out=dB_g)
        if need_weight:
            dw = dy.T @ x
        if need_bias:
            dbias = dy.sum(dim=0)
        return dx, dw, dA, dB, None, dbias, None, None, None


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    slices: Slices | None = None,
) -> Tensor:
    """y = x Wᵀ + bias + scaling · drop(x) Aᵀ Bᵀ, differentiable once in every tensor that asks for a gradient.

    Args:
        x: (..., K), float32, bfloat16 or float16.
        weight: (N, K), x's dtype.
        lora_A: (G·R, K), any floating dtype; rounded to x's dtype for the product.
        lora_B: (width of all slices, R), likewise. Gradients come back in the adapter's own dtype.
        scaling: factor on the low-rank product, usually lora_alpha / R.
        bias: (N,), x's dtype.
        dropout: probability in [0, 1) with which the adapter's (not the frozen layer's) view of x loses an element.
        slices: (start, stop) columns of y for each of the G adapters, ascending and disjoint; all of y when None.

    Returns:
        (..., N) in x's dtype.

    Raises:
        ValueError: the shapes, slices or dtypes do not fit; all faults at once.
    """
    slices = slices or ((0, weight.shape[0]),)
    _check(x, weight, lora_A, lora_B, bias, dropout, slices)
    seed = draw_seed() if dropout else 0
    y = _LoraLinear.apply(x.reshape(-1, x.shape[-1]), weight, lora_A, lora_B, scaling, bias, dropout, seed, slices)
    return y.view(*x.shape[:-1], weight.shape[0])


def _check(x, weight, lora_A, lora_B, bias, dropout, slices):
    N, K = weight.shape
    R = lora_B.shape[-1]
    edges = [0, *itertools.chain.from_iterable(slices), N]
    shape_A, shape_B = (len(slices) * R, K), (sum(stop - start for start, stop in slices), R)
    faults = []
    if x.shape[-1] != K:
        faults.append(f"x must end in K = {K} features, not {tuple(x.shape)}")
    if x.dtype != weight.dtype:
        faults.append(f"x and weight must share a dtype, not {x.dtype} and {weight.dtype}: cast x")
    if bias is not None and bias.dtype != weight.dtype:
        faults.append(f"bias and weight must share a dtype, not {bias.dtype} and {weight.dtype}")
    if not (lora_A.is_floating_point() and lora_B.is_floating_point()):
        faults.append(f"lora_A and lora_B must be floating, not {lora_A.dtype} and {lora_B.dtype}")
    if edges != sorted(edges):
        faults.append(f"slices must ascend without overlap within 0..{N}, not {slices}")
    if tuple(lora_A.shape) != shape_A:
        faults.append(f"lora_A must be (G·R, K) = {shape_A}, not {tuple(lora_A.shape)}")
    if tuple(lora_B.shape) != shape_B:
        faults.append(f"lora_B must be (width of the slices, R) = {shape_B}, not {tuple(lora_B.shape)}")
    if bias is not None and tuple(bias.shape) != (N,):
        faults.append(f"bias must be (N,) = ({N},), not {tuple(bias.shape)}")
    if not 0 <= dropout < 1:
        faults.append(f"dropout must lie in [0, 1), not {dropout}")
    if faults:
        raise ValueError("lora_linear: " + "; ".join(faults))
