"""The rotation of queries and keys by their positions, as one operation on the packed projection that holds them.

    (u_i, u_{i + d/2}) ↦ (u_i cos_i − u_{i + d/2} sin_i,  u_{i + d/2} cos_i + u_i sin_i)        i = 0 … d/2 − 1

for each head of q and k; dimensions past d, under partial rotary, and v pass through. It is done in place, since nobody needs
what q and k were. The gradient is turned back: −sin for sin. Only the tables are saved.
Source: Su et al. 2021, "RoFormer", §3.2, in the half-split pairing of GPT-NeoX.
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
    """Writes what x turns into to out, both (B, H, T, D), in PyTorch; out may be x."""
    half = cos.shape[-1]
    first, second, was = out[..., :half], out[..., half : 2 * half], x[..., :half]
    if out is x:
        was = was.clone()
    else:
        out.copy_(x)
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(was, sin)


def forward(turn, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> None:
    """Turns q and k within qkv by a module's turn."""
    x = _heads(qkv, heads + 2 * kv_heads)[:, : heads + kv_heads]
    turn(x, cos, sin, x)


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


@torch.library.custom_op("minilora::rope_", mutates_args={"qkv"})
def _forward_op(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> None:
    from minilora.kernels import rope_triton  # here, so that machines without Triton import all the rest

    with torch.cuda.device_of(qkv):
        forward(rope_triton.turn, qkv, cos, sin, heads, kv_heads)


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
        # As another tensor in the same memory: autograd need not know, unless whoever made qkv keeps it, which it would refuse.
        qkv = qkv.clone() if torch.compiler.is_compiling() else qkv.detach()
        if backend.choose(qkv.device, qkv.dtype)[0] == "triton":
            _forward_op(qkv, cos, sin, heads, kv_heads)
        else:
            forward(turn, qkv, cos, sin, heads, kv_heads)
        return _heads(qkv, heads + 2 * kv_heads).split([heads, kv_heads, kv_heads], dim=1)

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
    """q and k turned by the tables, in the memory of qkv, which is overwritten, and v; differentiable once in qkv.

    Args:
        qkv: (B, T, (H + 2·Hkv)·D), any floating dtype: the heads of q, of k and of v, in this order. torch.compile copies it.
        cos, sin: (B or 1, 1, T, d/2) with d ≤ D; rounded to qkv's dtype.
        heads: H.
        kv_heads: Hkv.

    Returns:
        q (B, H, T, D), k and v (B, Hkv, T, D).

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
