"""The rotation of queries and keys by their positions, as one operation on the packed projection that holds them.

    (u_i, u_{i + d/2}) ↦ (u_i cos_i − u_{i + d/2} sin_i,  u_{i + d/2} cos_i + u_i sin_i)        i = 0 … d/2 − 1

for each head of q and k; dimensions past d, under partial rotary, and v pass through. The gradient is turned back: −sin for
sin. Only the tables are saved. Source: Su et al. 2021, "RoFormer", §3.2, in the half-split pairing of GPT-NeoX.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora.kernels import backend


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns x (B, H, T, D) by tables (B or 1, 1, T, d/2), d ≤ D, in plain differentiable PyTorch."""
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def rope_reference(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q and k turned and v as it is, in plain differentiable PyTorch: the law the operation is held to."""
    q, k, v = _heads(qkv, heads + 2 * kv_heads).split([heads, kv_heads, kv_heads], dim=1)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def _heads(packed: Tensor, count: int) -> Tensor:
    """(B, T, count·D) as (B, count, T, D)."""
    return packed.unflatten(-1, (count, packed.shape[-1] // count)).transpose(1, 2)


def turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Writes what x turns into to out, both (B, H, T, D), in PyTorch."""
    half = cos.shape[-1]
    out.copy_(x)
    out[..., :half].mul_(cos).addcmul_(x[..., half : 2 * half], sin, value=-1)
    out[..., half : 2 * half].mul_(cos).addcmul_(x[..., :half], sin)


def forward(turn, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> Tensor:
    """qkv with q and k turned by a module's turn; v is copied, so that nobody needs to keep what q and k were."""
    turned, packed = heads + kv_heads, torch.empty_like(qkv, memory_format=torch.contiguous_format)
    x, y = _heads(qkv, turned + kv_heads), _heads(packed, turned + kv_heads)
    turn(x[:, :turned], cos, sin, y[:, :turned])
    y[:, turned:].copy_(x[:, turned:])
    return packed


def backward(turn, dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient of qkv from those of q (B, H, T, D), k and v (B, Hkv, T, D) by a module's turn."""
    B, H, T, D = dq.shape
    Hkv = dk.shape[1]
    packed = dq.new_empty(B, T, (H + 2 * Hkv) * D)
    parts = _heads(packed, H + 2 * Hkv).split([H, Hkv, Hkv], dim=1)
    turn(dq, cos, -sin, parts[0])
    turn(dk, cos, -sin, parts[1])
    parts[2].copy_(dv)
    return packed


@torch.library.custom_op("minilora::rope", mutates_args=())
def _forward_op(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> Tensor:
    from minilora.kernels import rope_triton  # here, so that machines without Triton import all the rest

    with torch.cuda.device_of(qkv):
        return forward(rope_triton.turn, qkv, cos, sin, heads, kv_heads)


@_forward_op.register_fake
def _(qkv, cos, sin, heads, kv_heads):
    return qkv.new_empty(qkv.shape)


@torch.library.custom_op("minilora::rope_backward", mutates_args=())
def _backward_op(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    from minilora.kernels import rope_triton

    with torch.cuda.device_of(dq):
        return backward(rope_triton.turn, dq, dk, dv, cos, sin)


@_backward_op.register_fake
def _(dq, dk, dv, cos, sin):
    B, H, T, D = dq.shape
    return dq.new_empty(B, T, (H + 2 * dk.shape[1]) * D)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, heads, kv_heads):
        ctx.save_for_backward(cos, sin)
        if backend.choose(qkv.device, qkv.dtype)[0] == "triton":
            packed = _forward_op(qkv, cos, sin, heads, kv_heads)
        else:
            packed = forward(turn, qkv, cos, sin, heads, kv_heads)
        return _heads(packed, heads + 2 * kv_heads).split([heads, kv_heads, kv_heads], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk, dv):
        cos, sin = ctx.saved_tensors
        if backend.choose(dq.device, dq.dtype)[0] == "triton":
            dqkv = _backward_op(dq, dk, dv, cos, sin)
        else:
            dqkv = backward(turn, dq, dk, dv, cos, sin)
        return dqkv, None, None, None, None


def rope(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q and k turned by the tables, and v, differentiable once in qkv.

    Args:
        qkv: (B, T, (H + 2·Hkv)·D), any floating dtype: the heads of q, of k and of v, in this order.
        cos, sin: (B or 1, 1, T, d/2) with d ≤ D; rounded to qkv's dtype.
        heads: H.
        kv_heads: Hkv.

    Returns:
        q (B, H, T, D), k and v (B, Hkv, T, D), which share memory of their own.

    Raises:
        ValueError: the shapes do not fit; all faults at once.
    """
    B, T, width = qkv.shape
    D, rest = divmod(width, heads + 2 * kv_heads)
    faults = []
    if rest:
        faults.append(f"qkv must end in {heads + 2 * kv_heads} heads of one size, not in {width} features")
    if cos.shape != sin.shape or cos.shape not in ((B, 1, T, cos.shape[-1]), (1, 1, T, cos.shape[-1])):
        faults.append(f"cos and sin must be (B or 1, 1, T, d/2) for B, T = {B}, {T}, not {tuple(cos.shape)}, {tuple(sin.shape)}")
    if 2 * cos.shape[-1] > D:
        faults.append(f"the tables must turn d ≤ D = {D} dimensions, not {2 * cos.shape[-1]}")
    if faults:
        raise ValueError("rope: " + "; ".join(faults))
    return _Rope.apply(qkv, cos.to(qkv.dtype), sin.to(qkv.dtype), heads, kv_heads)
