"""NF4 as Triton kernels: `quantize_blocks`, `dequantize_blocks` and `expand` of minilora.kernels.nf4, bit for bit, and a tile.

A code is a number of one of 16 levels; two share a byte, the first in its high half. Sixty-four values in a row share an absmax.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora.kernels import nf4, tiles
from minilora.kernels.nf4 import BLOCK
from minilora.kernels.nf4_tensor import NF4Tensor

_BLOCK, _GROUP, _LEAST = tl.constexpr(BLOCK), tl.constexpr(nf4.GROUP), tl.constexpr(nf4.LEAST)
_LEVELS = tl.constexpr(tuple(nf4.LEVELS.tolist()))
_MIDPOINTS = tl.constexpr(tuple(((nf4.LEVELS[:-1] + nf4.LEVELS[1:]) / 2).tolist()))


@triton.jit
def level(code):
    """The level of each code of 4 bits, float32. Fifteen selects: a table would be one more load for every value."""
    return tl.where((code & 8) != 0, one_of_eight(code, 8), one_of_eight(code, 0))


@triton.jit
def one_of_eight(code, FIRST: tl.constexpr):
    return tl.where((code & 4) != 0, one_of_four(code, FIRST + 4), one_of_four(code, FIRST))


@triton.jit
def one_of_four(code, FIRST: tl.constexpr):
    high = tl.where((code & 1) != 0, _LEVELS[FIRST + 3], _LEVELS[FIRST + 2])
    return tl.where((code & 2) != 0, high, tl.where((code & 1) != 0, _LEVELS[FIRST + 1], _LEVELS[FIRST]))


@triton.jit
def values_of(
    codes,  # (rows, columns / 2) uint8
    absmax,  # (rows,) float32
    dtype: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,  # of the result: all columns of a row share its absmax
):  # fmt: skip
    """(ROWS, COLUMNS) in dtype, each rounded once from the float32 product of its level and absmax."""
    high, low = level(codes >> 4) * absmax[:, None], level(codes & 15) * absmax[:, None]
    return tl.reshape(tl.join(high.to(dtype), low.to(dtype)), (ROWS, COLUMNS))


@triton.jit
def weight_tile(
    CODES,  # (rows · width / 2,) uint8
    ABSMAX,  # (rows · width / 64,) float32
    rows,  # (ROWS,) int64, all there are
    first,  # column of the tile
    width,  # columns of the weight, a multiple of 64
    dtype: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,  # of the tile; COLUMNS divides 64, and first: a row of it lies in one block
):  # fmt: skip
    """(ROWS, COLUMNS) in dtype: the rows of a weight from a column on."""
    at = rows * width + first
    codes = tl.load(CODES + (at // 2)[:, None] + tl.arange(0, COLUMNS // 2)[None, :])
    return values_of(codes, tl.load(ABSMAX + at // _BLOCK), dtype, ROWS, COLUMNS)


@triton.jit
def dequantize_kernel(
    CODES,  # (⌈n / 2⌉,) uint8
    ABSMAX,  # (⌈n / 64⌉,) float32
    VALUES,  # (n,)
    n, bytes,  # elements of VALUES and CODES
    BLOCKS: tl.constexpr,  # of 64 values, that one program takes
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    byte = block[:, None] * (_BLOCK // 2) + tl.arange(0, _BLOCK // 2)[None, :]
    at = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    codes = tl.load(CODES + byte, mask=byte < bytes, other=0)
    absmax = tl.load(ABSMAX + block, mask=block * _BLOCK < n, other=0.0)
    tl.store(VALUES + at, values_of(codes, absmax, VALUES.dtype.element_ty, BLOCKS, _BLOCK), mask=at < n)


@triton.jit
def quantize_kernel(
    VALUES,  # (n,)
    CODES,  # (⌈n / 2⌉,) uint8
    ABSMAX,  # (⌈n / 64⌉,) float32
    n, bytes,  # elements of VALUES and CODES
    BLOCKS: tl.constexpr,  # of 64 values, that one program takes
):  # fmt: skip
    """A value's code is the number of midpoints between levels that lie below its share of the absmax."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    byte = block[:, None] * (_BLOCK // 2) + tl.arange(0, _BLOCK // 2)[None, :]
    at = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    values = tl.load(VALUES + at, mask=at < n, other=0.0).to(tl.float32)
    bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # of |value|, in whose order NaN comes last, and is not lost
    absmax = tl.max(bits, axis=1).to(tl.float32, bitcast=True)
    divisor = tl.maximum(absmax, tl.full((BLOCKS,), _LEAST, tl.float32))
    short = (block + 1) * _BLOCK > n  # such a block is divided, and keeps its divisor, as in quantize_blocks of nf4
    tl.store(ABSMAX + block, tl.where(short, divisor, absmax), mask=block * _BLOCK < n)
    inverse = tl.div_rn(tl.full((BLOCKS,), 1.0, tl.float32), divisor)
    share = tl.where(short[:, None], tl.div_rn(values, divisor[:, None]), values * inverse[:, None])
    codes = tl.zeros((BLOCKS, _BLOCK), tl.float32)  # whole numbers in float32: LLVM would pack small integers through the stack
    for i in tl.static_range(15):
        codes += tl.where(share > _MIDPOINTS[i], 1.0, 0.0)
    high, low = tl.split(tl.reshape(codes, (BLOCKS, _BLOCK // 2, 2)))
    tl.store(CODES + byte, (16 * high + low).to(tl.uint8), mask=byte < bytes)


@triton.jit
def expand_kernel(
    CODES,  # (b,) uint8
    NESTED,  # (⌈b / 256⌉,) float32
    OFFSET,  # () float32
    TABLE,  # (256,) float32
    ABSMAX,  # (b,) float32
    b,
    COUNT: tl.constexpr,  # of scales, that one program takes
):  # fmt: skip
    at = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    inside = at < b
    share = tl.load(TABLE + tl.load(CODES + at, mask=inside, other=0).to(tl.int32))
    absmax = share * tl.load(NESTED + at // _GROUP, mask=inside, other=0.0) + tl.load(OFFSET)
    tl.store(ABSMAX + at, absmax, mask=inside)


def quantize_blocks(values: Tensor) -> tuple[Tensor, Tensor]:
    """(codes (⌈n/2⌉,) uint8, absmax (⌈n/64⌉,) float32) of contiguous values (n,), in any floating dtype.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    n, tile = len(values), tiles.FOR_BLOCKS
    codes = values.new_empty(triton.cdiv(n, 2), dtype=torch.uint8)
    absmax = values.new_empty(triton.cdiv(n, BLOCK), dtype=torch.float32)
    if n:
        quantize_kernel[(triton.cdiv(n, tile.BM * BLOCK),)](
            values, codes, absmax, n, len(codes), BLOCKS=tile.BM, num_warps=tile.num_warps
        )
    nf4.require_finite(absmax, values)
    return codes, absmax


def dequantize_blocks(codes: Tensor, absmax: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """(n,) values: products in float32, rounded once to dtype."""
    values, tile = codes.new_empty(n, dtype=dtype), tiles.FOR_BLOCKS
    if n:
        dequantize_kernel[(triton.cdiv(n, tile.BM * BLOCK),)](
            codes, absmax, values, n, len(codes), BLOCKS=tile.BM, num_warps=tile.num_warps
        )
    return values


def dequantize(W: NF4Tensor) -> Tensor:
    """The weight, in a buffer that the next layer gets again: PyTorch's allocator hands out what was freed last, by stream."""
    values = dequantize_blocks(W.codes, expand(*W.parts[1:]), W.numel(), W.dtype).view(W.stored_shape)
    return values.T if W.transposed else values


def expand(codes: Tensor, nested: Tensor, offset: Tensor) -> Tensor:
    """(b,) float32 scales of their own codes: in one launch a third of the bytes of the operations that it is made of."""
    absmax = codes.new_empty(len(codes), dtype=torch.float32)
    expand_kernel[(triton.cdiv(len(codes), tiles.SCALES),)](
        codes, nested, offset, _dynamic(codes.device), absmax, len(codes), COUNT=tiles.SCALES, num_warps=4,
        enable_fp_fusion=False,  # the product is rounded before the sum, as in nf4
    )  # fmt: skip
    return absmax


@functools.cache
def _dynamic(device: torch.device) -> Tensor:
    """nf4.DYNAMIC on a device, copied there once."""
    return nf4.DYNAMIC.to(device)
