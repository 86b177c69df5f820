"""A frozen linear layer and its low-rank update as one operation with its own backward.

    Y = X Wᵀ + bias + s · drop(X) Aᵀ Bᵀ

X (M, K), W (N, K), A (R, K), B (N, R). A fused projection, several layers stacked in one W, takes one adapter a slice:
G slices share X; slice g owns R rows of A and adds to its own columns of Y only:

    Y[:, start_g:stop_g] += s · drop(X) A_gᵀ B_gᵀ      A (G·R, K), B (Σ_g (stop_g − start_g), R)

Everything is made of four steps, in PyTorch (lora_linear_torch) and in Triton (lora_linear_triton). With f = s / (1 − p):

    forward    S = f · (keep ⊙ X) Aᵀ      Y = X Wᵀ + bias + S Bᵀ                  down, gemm
    backward   T = f · dY B               dB = dYᵀ S                              sweep
               dX = dY W + keep ⊙ (T A)   dA = Tᵀ (keep ⊙ X)                      gemm, outer

X and S are saved, and keep or its seed (dropout); no second activation of X's size, and no dense B A, ever exists. W may be a
4-bit NF4Tensor (nf4_tensor): gemm multiplies by what it dequantises to, and W has no gradient. 16-bit x on a CPU that cannot
multiply such numbers (arithmetic) goes to float32 first, and each result is rounded once.
Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3; Dettmers et al. 2023, "QLoRA", eq. 5.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.kernels import backend, lora_linear_torch
from minilora.kernels.arithmetic import linear_dtype
from minilora.kernels.dropout import draw_seed, drop, keep, kept_share
from minilora.kernels.lora_linear_torch import Slices, per_slice  # ((start, stop), …) columns of Y, ascending, disjoint
from minilora.kernels.nf4_tensor import NF4Tensor


def lora_linear_reference(x, weight, lora_A, lora_B, scaling, bias=None, dropout=0.0, seed=None, slices=None) -> Tensor:
    """The equation as plain differentiable PyTorch, for any leading dimensions of x: the law the operation is held to."""
    slices = slices or ((0, weight.shape[0]),)
    y = F.linear(x, weight, bias)
    s = F.linear(drop(x, dropout, seed), lora_A.to(x.dtype))
    deltas = [torch.zeros_like(y[..., :0])]
    end = 0
    for (start, stop), s_g, B_g in per_slice(slices, s, lora_B.to(x.dtype)):
        deltas += [torch.zeros_like(y[..., end:start]), scaling * F.linear(s_g, B_g)]
        end = stop
    deltas.append(torch.zeros_like(y[..., end:]))
    return y + torch.cat(deltas, dim=-1)


def _steps(x: Tensor):
    """The module whose four steps run for tensors like x."""
    if backend.choose(x.device, x.dtype)[0] == "torch":
        return lora_linear_torch
    from minilora.kernels import lora_linear_triton  # here, so that machines without Triton import all the rest

    return lora_linear_triton


def forward(steps, x, weight, lora_A, lora_B, bias, drawn, scaling, dropout, slices) -> tuple[Tensor, Tensor]:
    """(Y (M, N), S (M, G·R)) by the steps of a module."""
    whole = ((0, x.shape[1]),)
    s = steps.down(x, lora_A.T, whole, scaling / kept_share(dropout), steps.make_mask(*x.shape, dropout, drawn))
    return steps.gemm(x, weight, s, lora_B, slices, bias), s


def backward(steps, dy, x, s, weight, lora_A, lora_B, drawn, scaling, dropout, slices, needed) -> list[Tensor]:
    """The gradients of those of x, weight, lora_A, lora_B and bias that are needed, in this order, and no product for others."""
    need_x, need_weight, need_A, need_B, need_bias = needed
    whole, factor = ((0, x.shape[1]),), scaling / kept_share(dropout)
    mask = steps.make_mask(*x.shape, dropout, drawn) if need_x or need_A else None
    gradients = {}
    if need_B and (need_x or need_A):
        t, gradients["lora_B"] = steps.sweep(dy, lora_B, s, slices, factor)
    elif need_B:
        gradients["lora_B"] = steps.outer(dy, s, lora_B, slices)
    elif need_x or need_A:
        t = steps.down(dy, lora_B, slices, factor)
    if need_x:
        gradients["x"] = steps.gemm(dy, weight.t(), t, lora_A.T, whole, mask=mask)
    if need_A:
        gradients["lora_A"] = steps.outer(x, t, lora_A.T, whole, mask).T
    if need_weight:
        gradients["weight"] = dy.T @ x
    if need_bias:
        gradients["bias"] = dy.sum(dim=0)
    return [gradients[name] for name in ("x", "weight", "lora_A", "lora_B", "bias") if name in gradients]


def _weight(weight: Tensor, parts: list[Tensor], N: int, x: Tensor) -> Tensor:
    """The weight that an operation got as plain tensors: itself, or, of a 4-bit one, the codes and the other parts."""
    return NF4Tensor(weight, *parts, (N, x.shape[1]), x.dtype) if parts else weight


def _pairs(edges: list[int]) -> Slices:
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def _forward(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, drawn: Tensor | None,
    scaling: float, dropout: float, edges: list[int], parts: list[Tensor], N: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        adapter = lora_A.contiguous(), lora_B.contiguous()
        weight, dtype = _weight(weight, parts, N, x), linear_dtype(x)
        bias = None if bias is None else bias.to(dtype)
        y, s = forward(_steps(x), x.to(dtype), weight, *adapter, bias, drawn, scaling, dropout, _pairs(edges))
        return y.to(x.dtype), s.to(x.dtype)


def _backward(
    dy: Tensor, x: Tensor, s: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, drawn: Tensor | None,
    scaling: float, dropout: float, edges: list[int], parts: list[Tensor], needed: list[bool],
) -> list[Tensor]:  # fmt: skip
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        adapter = lora_A.contiguous(), lora_B.contiguous()
        weight, dtype = _weight(weight, parts, dy.shape[1], x), linear_dtype(x)
        dy, wide, s = dy.to(dtype), x.to(dtype), s.to(dtype)
        found = backward(_steps(x), dy, wide, s, weight, *adapter, drawn, scaling, dropout, _pairs(edges), needed)
        likes = itertools.compress((x, x, lora_A, lora_B, x), needed)  # x, weight and bias share a dtype
        return [gradient.to(like.dtype) for gradient, like in zip(found, likes, strict=True)]


_forward_op = torch.library.custom_op("minilora::lora_linear", _forward, mutates_args=())
_backward_op = torch.library.custom_op("minilora::lora_linear_backward", _backward, mutates_args=())


@_forward_op.register_fake
def _(x, weight, lora_A, lora_B, bias, drawn, scaling, dropout, edges, parts, N):
    return x.new_empty(x.shape[0], N), x.new_empty(x.shape[0], lora_A.shape[0])


@_backward_op.register_fake
def _(dy, x, s, weight, lora_A, lora_B, drawn, scaling, dropout, edges, parts, needed):
    shapes = [(x, x.shape), (weight, weight.shape), (lora_A, lora_A.shape), (lora_B, lora_B.shape), (x, dy.shape[1:])]
    return [like.new_empty(shape) for (like, shape), need in zip(shapes, needed, strict=True) if need]


def _refuse(ctx, *_):
    raise RuntimeError("lora_linear cannot be differentiated twice: its backward is written by hand; use lora_linear_reference")


_backward_op.register_autograd(_refuse)


class _LoRALinear(torch.autograd.Function):
    """PyTorch's steps are called as they are: as torch operations, those of 120 layers took 0.06 s more of a step's 2.9."""

    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, bias, drawn, constants, N, *parts):
        run = _forward_op if _is_operation(x) else _forward
        y, s = run(x.reshape(-1, x.shape[-1]), weight, lora_A, lora_B, bias, drawn, *constants, list(parts), N)
        ctx.save_for_backward(x, s, weight, lora_A, lora_B, drawn, *parts)
        ctx.constants = constants  # scaling, dropout, edges
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], N))  # to autograd no view, as in F.linear

    @staticmethod
    def backward(ctx, dy):
        needed = list(ctx.needs_input_grad[:5])  # x, weight, lora_A, lora_B, bias
        x, s, weight, lora_A, lora_B, drawn, *parts = ctx.saved_tensors
        run = _backward_op if _is_operation(x) or torch.is_grad_enabled() else _backward  # it refuses a second derivative
        rows = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        found = iter(run(*rows, s, weight, lora_A, lora_B, drawn, *ctx.constants, parts, needed))
        dx = next(found).view(x.shape) if needed[0] else None
        return dx, *(next(found) if need else None for need in needed[1:]), *[None] * (3 + len(parts))


def _is_operation(x: Tensor) -> bool:
    """Whether the steps must be opaque: to torch.compile, or since Triton launches them."""
    return torch.compiler.is_compiling() or backend.choose(x.device, x.dtype)[0] == "triton"


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

    It works under torch.compile, whose graphs have it as minilora::lora_linear, under activation checkpointing and autocast.

    Args:
        x: (..., K), float32, bfloat16 or float16 (float64 in plain PyTorch).
        weight: (N, K), x's dtype; plain, or an NF4Tensor, which has no gradient.
        lora_A: (G·R, K), any floating dtype; rounded to x's dtype for the product.
        lora_B: (width of all slices, R), likewise. Gradients come back in the adapter's own dtype.
        scaling: factor on the low-rank product, usually lora_alpha / R.
        bias: (N,), x's dtype.
        dropout: probability in [0, 1) with which the adapter's (not the frozen layer's) view of x loses an element.
        slices: (start, stop) columns of y for each of the G adapters, ascending and disjoint; all of y when None.

    Returns:
        (..., N) in x's dtype, or in autocast's.

    Raises:
        ValueError: the shapes, slices, dtypes or devices do not fit; all faults at once.
    """
    slices = slices or ((0, weight.shape[0]),)
    _check(x, weight, lora_A, lora_B, bias, dropout, slices)
    device, N = x.device.type, weight.shape[0]
    if torch.is_autocast_enabled(device):  # the adapters stay as they are, and are rounded where they are used
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = (tensor if tensor is None else tensor.to(dtype) for tensor in (x, weight, bias))
    drawn = _draw(x, dropout) if dropout else None
    constants = scaling, dropout, list(itertools.chain.from_iterable(slices))
    weight, *parts = weight.parts if isinstance(weight, NF4Tensor) else [weight]
    return _LoRALinear.apply(x, weight, lora_A, lora_B, bias, drawn, constants, N, *parts)


def _draw(x: Tensor, dropout: float) -> Tensor:
    """What the mask of x is made from: its seed where Triton runs; elsewhere itself, which backward needs once more."""
    seed, K = draw_seed(x.device), x.shape[-1]
    if backend.choose(x.device, x.dtype)[0] == "triton":
        return seed
    return keep(x.numel() // max(K, 1), K, dropout, seed)


def _check(x, weight, lora_A, lora_B, bias, dropout, slices):
    N, K = weight.shape
    R = lora_B.shape[-1]
    edges = [0, *itertools.chain.from_iterable(slices), N]
    shape_A, shape_B = (len(slices) * R, K), (sum(stop - start for start, stop in slices), R)
    faults = []
    if x.shape[-1] != K:
        faults.append(f"x must end in K = {K} features, not {tuple(x.shape)}")
    devices = {str(t.device) for t in (x, weight, lora_A, lora_B, bias) if t is not None}
    if len(devices) > 1:
        faults.append(f"all tensors must be on one device, not on {' and '.join(sorted(devices))}")
    cast = torch.is_autocast_enabled(x.device.type)  # autocast makes the dtypes of x, weight and bias agree
    if x.dtype != weight.dtype and not cast:
        faults.append(f"x and weight must share a dtype, not {x.dtype} and {weight.dtype}: cast x")
    if isinstance(weight, NF4Tensor) and (weight.requires_grad or weight.transposed):
        faults.append("a 4-bit weight must be frozen, requires_grad=False, and no transposed view")
    if bias is not None and bias.dtype != weight.dtype and not cast:
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
