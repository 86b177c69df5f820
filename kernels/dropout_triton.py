"""The keep mask of dropout inside a Triton kernel: the same bits as `minilora.kernels.dropout.keep`, for any tile."""

import triton
import triton.language as tl

from minilora.kernels.dropout import PHILOX_ROUNDS

ROUNDS = tl.constexpr(PHILOX_ROUNDS)


@triton.jit
def keep_tile(
    seed,  # int64 scalar
    rows,  # (BM,) int32 or int64, numbers of the tile's rows
    first,  # number of the tile's first column, a multiple of 8
    threshold,  # an element is dropped when its 16 bits fall below this
    BM: tl.constexpr,
    BN: tl.constexpr,  # columns of the tile, a multiple of 8
):
    """(BM, BN) booleans. One Philox call decides 8 columns: deciding one each would cost more time than reading x."""
    group = (first // 8 + tl.arange(0, BN // 8))[None, :] + tl.zeros((BM, 1), tl.int32)  # (BM, BN/8)
    row = rows.to(tl.int32)[:, None] + tl.zeros((1, BN // 8), tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, group, row, row * 0, row * 0, ROUNDS)
    low = in_turn((w0 & 0xFFFF) >= threshold, (w1 & 0xFFFF) >= threshold, (w2 & 0xFFFF) >= threshold, (w3 & 0xFFFF) >= threshold)
    high = in_turn((w0 >> 16) >= threshold, (w1 >> 16) >= threshold, (w2 >> 16) >= threshold, (w3 >> 16) >= threshold)
    return tl.reshape(tl.join(low, high), (BM, BN))


@triton.jit
def in_turn(a, b, c, d):
    """(…, 2, 2) from four (…): the last two dimensions count a, b, c, d."""
    return tl.join(tl.join(a, c), tl.join(b, d))
