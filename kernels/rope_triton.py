"""The step of rope as a Triton kernel: each program turns some heads of one token."""

import triton
import triton.language as tl
from torch import Tensor

from minilora.kernels import tiles


@triton.jit
def turn_kernel(
    X,  # (B, H, T, D)
    COS, SIN,  # (B, 1, T, HALF), B by a stride of 0 where one serves all
    OUT,  # (B, H, T, D); may be X
    H, T,
    stride_xb, stride_xh, stride_xt, stride_xd,  # in elements, as all strides here
    stride_cb, stride_ct, stride_cd, stride_sb, stride_st, stride_sd,
    stride_ob, stride_oh, stride_ot, stride_od,
    D: tl.constexpr, HALF: tl.constexpr,  # d/2
    BH: tl.constexpr, BD: tl.constexpr,  # BD ≥ D
):  # fmt: skip
    """Program (b·T + t, block): BH heads. Each element is loaded twice, for itself and for its partner, from DRAM once."""
    b, t = (tl.program_id(0) // T).to(tl.int64), (tl.program_id(0) % T).to(tl.int64)
    rh, rd = tl.program_id(1) * BH + tl.arange(0, BH), tl.arange(0, BD)
    h64, inside = rh.to(tl.int64)[:, None], (rh < H)[:, None] & (rd < D)[None, :]
    turns, pair = rd < 2 * HALF, tl.where(rd < HALF, rd, rd - HALF)
    cos = tl.load(COS + b * stride_cb + t * stride_ct + pair * stride_cd, mask=turns, other=1.0).to(tl.float32)
    sin = tl.load(SIN + b * stride_sb + t * stride_st + pair * stride_sd, mask=turns, other=0.0).to(tl.float32)
    sin = tl.where(rd < HALF, -sin, sin)
    partner = tl.where(rd < HALF, rd + HALF, rd - HALF)
    row = X + b * stride_xb + h64 * stride_xh + t * stride_xt
    x = tl.load(row + rd[None, :] * stride_xd, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(row + partner[None, :] * stride_xd, mask=inside & turns[None, :], other=0.0).to(tl.float32)
    tl.debug_barrier()  # all threads have loaded before one stores: its element is another one's partner
    y = x * cos[None, :] + other * sin[None, :]
    tl.store(OUT + b * stride_ob + h64 * stride_oh + t * stride_ot + rd[None, :] * stride_od,
             y.to(OUT.dtype.element_ty), mask=inside)  # fmt: skip


def turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Writes what x turns into to out, both (B, H, T, D), of any strides; out may be x."""
    B, H, T, D = x.shape
    cos, sin = (table.expand(B, -1, -1, -1) for table in (cos, sin))
    BH, BD, num_warps = tiles.for_heads(H, D)
    if x.numel():
        turn_kernel[(B * T, triton.cdiv(H, BH))](
            x, cos, sin, out, H, T, *x.stride(), *cos.stride()[::2], cos.stride(3), *sin.stride()[::2], sin.stride(3),
            *out.stride(), D=D, HALF=cos.shape[-1], BH=BH, BD=BD, num_warps=num_warps,
        )  # fmt: skip
