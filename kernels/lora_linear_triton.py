"""The steps of lora_linear as Triton kernels, under the names, equations and letters of `lora_linear_torch`.

    down   S_g = f · (keep ⊙ P)_g U_g               reads P once and writes next to nothing: bound by memory
    gemm   Y = X Wᵀ + bias + keep ⊙ [S_g U_gᵀ]      the frozen product, bound by arithmetic; the update only fills the accumulator
    outer  D_g = (keep ⊙ P)_gᵀ S_g                  reads P once
    sweep  T_g = f · P_g U_g  and  D_g = P_gᵀ S_g   both while P passes once

All slices are one launch. Every kernel accumulates in float32 and casts once, at the store. Sums that several programs share
are never atomic: partial sums are written side by side and added in a fixed order, so that a run repeats bit for bit.
"""

import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora.kernels import tiles
from minilora.kernels.dropout import threshold
from minilora.kernels.dropout_triton import keep_tile
from minilora.kernels.lora_linear_torch import Slices
from minilora.kernels.nf4_tensor import NF4Tensor
from minilora.kernels.nf4_triton import dequantize, expand, weight_tile


@triton.jit
def slice_of(g, SLICES: tl.constexpr):
    """(start, stop, first row of U) of slice g, a number known only when the kernel runs."""
    start, stop, row = SLICES[0][0], SLICES[0][1], SLICES[0][2]
    for i in tl.static_range(1, len(SLICES)):
        start = tl.where(g == i, SLICES[i][0], start)
        stop = tl.where(g == i, SLICES[i][1], stop)
        row = tl.where(g == i, SLICES[i][2], row)
    return start, stop, row


@triton.jit
def share_of_columns(program, SLICES: tl.constexpr, SPLITS: tl.constexpr, BN: tl.constexpr):
    """(g, split, first column, end of its columns, row of U less column) of program g·SPLITS + split."""
    g, split = program // SPLITS, program % SPLITS
    start, stop, row = slice_of(g, SLICES)
    share = tl.cdiv(tl.cdiv(stop - start, SPLITS), BN) * BN
    low = start + split * share
    return g, split, low, tl.minimum(low + share, stop), row - start


@triton.jit
def down_kernel(
    P,  # (M, N)
    U,  # (width of all slices, R)
    S,  # (SPLITS, M, G·R) contiguous: to be added over the first
    SEED,  # () int64, unread without DROPOUT
    threshold,  # of dropout, in 2⁻¹⁶
    factor,  # f
    M,
    stride_pm, stride_pn, stride_un, stride_ur,  # in elements, as all strides here
    SLICES: tl.constexpr,  # (start, stop, first row of U) of each slice
    R: tl.constexpr, SPLITS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Program (m, g·SPLITS + split, r): BM rows, its share of the columns of slice g, BR ranks."""
    G: tl.constexpr = len(SLICES)
    g, split, low, high, to_row = share_of_columns(tl.program_id(1), SLICES, SPLITS, BN)
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rr = tl.program_id(2) * BR + tl.arange(0, BR)
    m64 = rm.to(tl.int64)
    acc = tl.zeros((BM, BR), tl.float32)
    for n in range(low, high, BN):
        rn = n + tl.arange(0, BN)
        n64 = rn.to(tl.int64)
        p = tl.load(P + m64[:, None] * stride_pm + n64[None, :] * stride_pn,
                    mask=(rm[:, None] < M) & (rn[None, :] < high), other=0.0)  # fmt: skip
        u = tl.load(U + (n64 + to_row)[:, None] * stride_un + rr[None, :] * stride_ur,
                    mask=(rn[:, None] < high) & (rr[None, :] < R), other=0.0)  # fmt: skip
        if DROPOUT:
            p = tl.where(keep_tile(tl.load(SEED), rm, n, threshold, BM, BN), p, 0.0)
        acc = tl.dot(p, u.to(p.dtype), acc, input_precision=PRECISION)
    at = split.to(tl.int64) * M + m64
    tl.store(S + at[:, None] * (G * R) + (g * R + rr)[None, :], (acc * factor).to(S.dtype.element_ty),
             mask=(rm[:, None] < M) & (rr[None, :] < R))  # fmt: skip


@triton.jit
def add_update(
    acc,  # (BM, BN)
    S,  # (M, G·R) contiguous, from the first column of slice g
    U,  # (width of all slices, R)
    rows,  # (BM,) int64, all below M
    rn,  # (BN,) columns of the tile, those past the edge included
    stride_s, stride_un, stride_ur,
    START: tl.constexpr, STOP: tl.constexpr, ROW: tl.constexpr,  # of slice g
    R: tl.constexpr, PRECISION: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """acc + S_g U_gᵀ in those of the tile's columns that slice g has."""
    inside = (rn >= START) & (rn < STOP)
    n64 = (rn - START + ROW).to(tl.int64)
    for r in tl.range(0, R, BR, num_stages=1):
        rr = r + tl.arange(0, BR)
        s = tl.load(S + rows[:, None] * stride_s + rr[None, :], mask=(rr < R)[None, :], other=0.0)
        u = tl.load(U + n64[None, :] * stride_un + rr[:, None] * stride_ur, mask=inside[None, :] & (rr < R)[:, None], other=0.0)
        acc = tl.dot(s, u.to(s.dtype), acc, input_precision=PRECISION)
    return acc


@triton.jit
def place_of_tile(M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """(first row, first column) of this program's tile: GROUP rows of tiles run side by side, and share W in the L2 cache."""
    tiles_n = tl.cdiv(N, BN)
    group, within = tl.program_id(0) // (GROUP * tiles_n), tl.program_id(0) % (GROUP * tiles_n)
    height = tl.minimum(tl.cdiv(M, BM) - group * GROUP, GROUP)
    return (group * GROUP + within % height) * BM, within // height * BN


@triton.jit
def update_of_tile(
    S, U, SEED, threshold, first_n, rm, m64, rn,  # as in the kernels that call it
    stride_un, stride_ur,
    SLICES: tl.constexpr, R: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """keep ⊙ [S_g U_gᵀ] in a tile, which the frozen product is added to.

    It comes first: after the product, with the accumulator full, the update and its mask would need as many registers again
    (128 × 256 on sm_90 with dropout: 2,132 bytes spilled after it, none before it).
    """
    G: tl.constexpr = len(SLICES)
    acc = tl.zeros((BM, BN), tl.float32)
    for g in tl.static_range(G):
        if (first_n < SLICES[g][1]) & (first_n + BN > SLICES[g][0]):
            acc = add_update(acc, S + g * R, U, m64, rn, G * R, stride_un, stride_ur,
                             SLICES[g][0], SLICES[g][1], SLICES[g][2], R, PRECISION, BR)  # fmt: skip
    if DROPOUT:
        acc = tl.where(keep_tile(tl.load(SEED), rm, first_n, threshold, BM, BN), acc, 0.0)
    return acc


@triton.jit
def store_tile(acc, BIAS, Y, rm, rn, n64, M, N, HAS_BIAS: tl.constexpr):
    """Y and the bias, where there is one, in a tile."""
    if HAS_BIAS:
        acc += tl.load(BIAS + n64)[None, :].to(tl.float32)
    tl.store(Y + rm.to(tl.int64)[:, None] * N + rn[None, :], acc.to(Y.dtype.element_ty),
             mask=(rm[:, None] < M) & (rn[None, :] < N))  # fmt: skip


@triton.jit
def gemm_kernel(
    X,  # (M, K)
    W,  # (N, K)
    S,  # (M, G·R) contiguous
    U,  # (width of all slices, R)
    BIAS,  # (N,) contiguous, unread without HAS_BIAS
    Y,  # (M, N) contiguous
    SEED,  # () int64, unread without DROPOUT
    threshold,
    M, N, K,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_un, stride_ur,
    SLICES: tl.constexpr, R: tl.constexpr, DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,  # BK divides K: the loop needs no mask
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """One program a (BM, BN) tile of Y."""
    first_m, first_n = place_of_tile(M, N, BM, BN, GROUP)
    rm, rn, rk = first_m + tl.arange(0, BM), first_n + tl.arange(0, BN), tl.arange(0, BK)
    m64, n64 = (rm % M).to(tl.int64), (rn % N).to(tl.int64)  # past the edge: other rows, never stored, instead of masks
    acc = update_of_tile(S, U, SEED, threshold, first_n, rm, m64, rn, stride_un, stride_ur,
                         SLICES, R, DROPOUT, PRECISION, BM, BN, BR)  # fmt: skip
    x_at = X + m64[:, None] * stride_xm + rk.to(tl.int64)[None, :] * stride_xk
    w_at = W + n64[None, :] * stride_wn + rk.to(tl.int64)[:, None] * stride_wk
    for k in range(0, K, BK):
        if EVEN_K:
            x, w = tl.load(x_at), tl.load(w_at)
        else:
            x = tl.load(x_at, mask=rk[None, :] < K - k, other=0.0)
            w = tl.load(w_at, mask=rk[:, None] < K - k, other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        x_at += tl.cast(stride_xk, tl.int64) * BK
        w_at += tl.cast(stride_wk, tl.int64) * BK
    store_tile(acc, BIAS, Y, rm, rn, n64, M, N, HAS_BIAS)


@triton.jit
def gemm_nf4_kernel(
    X,  # (M, K)
    CODES, ABSMAX,  # of W (N, K), or of Wᵀ (K, N) where TRANSPOSED: as weight_tile takes them
    S, U, BIAS, Y, SEED, threshold,  # as in gemm_kernel
    M, N, K,
    stride_xm, stride_xk, stride_un, stride_ur,
    SLICES: tl.constexpr, R: tl.constexpr, DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr, TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """gemm_kernel with a 4-bit weight, dequantised as it is read: for few tokens, that is few programs to read it again."""
    first_m, first_n = place_of_tile(M, N, BM, BN, GROUP)
    rm, rn, rk = first_m + tl.arange(0, BM), first_n + tl.arange(0, BN), tl.arange(0, BK)
    m64, n64 = (rm % M).to(tl.int64), (rn % N).to(tl.int64)
    acc = update_of_tile(S, U, SEED, threshold, first_n, rm, m64, rn, stride_un, stride_ur,
                         SLICES, R, DROPOUT, PRECISION, BM, BN, BR)  # fmt: skip
    x_at = X + m64[:, None] * stride_xm + rk.to(tl.int64)[None, :] * stride_xk
    for k in range(0, K, BK):
        x = tl.load(x_at, mask=rk[None, :] < K - k, other=0.0)
        if TRANSPOSED:
            k64 = ((k + rk) % K).to(tl.int64)  # past the end: other rows, times zeros of x
            w = weight_tile(CODES, ABSMAX, k64, first_n, N, x.dtype, BK, BN)
        else:
            w = tl.trans(weight_tile(CODES, ABSMAX, n64, k, K, x.dtype, BN, BK))
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        x_at += tl.cast(stride_xk, tl.int64) * BK
    store_tile(acc, BIAS, Y, rm, rn, n64, M, N, HAS_BIAS)


@triton.jit
def outer_kernel(
    P,  # (M, N)
    S,  # (M, G·R) contiguous
    D,  # (SPLITS, width of all slices, R): to be added over the first
    SEED,  # () int64, unread without DROPOUT
    threshold,
    M,
    stride_pm, stride_pn, stride_ds, stride_dn, stride_dr,
    SLICES: tl.constexpr, R: tl.constexpr, SPLITS: tl.constexpr,
    BLOCKS: tl.constexpr,  # of BN columns in the widest slice
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Program (g·BLOCKS + block, split, r): BN columns of slice g, its share of the rows, BR ranks."""
    G: tl.constexpr = len(SLICES)
    g, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    start, stop, row = slice_of(g, SLICES)
    share = tl.cdiv(tl.cdiv(M, SPLITS), BM) * BM
    low = tl.program_id(1) * share
    high = tl.minimum(low + share, M)
    first = start + block * BN
    rn = first + tl.arange(0, BN)
    rr = tl.program_id(2) * BR + tl.arange(0, BR)
    n64 = rn.to(tl.int64)
    acc = tl.zeros((BR, BN), tl.float32)
    for m in range(low, high, BM):
        rm = m + tl.arange(0, BM)
        m64 = rm.to(tl.int64)
        p = tl.load(P + m64[:, None] * stride_pm + n64[None, :] * stride_pn,
                    mask=(rm[:, None] < high) & (rn[None, :] < stop), other=0.0)  # fmt: skip
        if DROPOUT:
            p = tl.where(keep_tile(tl.load(SEED), rm, first, threshold, BM, BN), p, 0.0)
        s = tl.load(S + m64[None, :] * (G * R) + (g * R + rr)[:, None],
                    mask=(rm[None, :] < high) & (rr[:, None] < R), other=0.0)  # fmt: skip
        acc = tl.dot(s, p, acc, input_precision=PRECISION)
    at = tl.program_id(1).to(tl.int64) * stride_ds
    tl.store(D + at + (n64 - start + row)[None, :] * stride_dn + rr.to(tl.int64)[:, None] * stride_dr, acc,
             mask=(rn[None, :] < stop) & (rr[:, None] < R))  # fmt: skip


@triton.jit
def sweep_kernel(
    P,  # (M, N)
    U,  # (width of all slices, R)
    S,  # (M, G·R) contiguous
    T,  # (SPLITS, M, G·R) contiguous: to be added over the first
    D,  # (blocks of BM rows, width of all slices, R): to be added over the first
    factor,  # f
    M,
    stride_pm, stride_pn, stride_un, stride_ur, stride_ds, stride_dn, stride_dr,
    SLICES: tl.constexpr, R: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,  # BR ≥ R: one program has all ranks
):  # fmt: skip
    """Program (m, g·SPLITS + split): BM rows and its share of the columns of slice g."""
    G: tl.constexpr = len(SLICES)
    g, split, low, high, to_row = share_of_columns(tl.program_id(1), SLICES, SPLITS, BN)
    rm, rr = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BR)
    m64 = rm.to(tl.int64)
    s = tl.load(S + m64[None, :] * (G * R) + (g * R + rr)[:, None], mask=(rm[None, :] < M) & (rr[:, None] < R), other=0.0)
    acc = tl.zeros((BM, BR), tl.float32)
    for n in range(low, high, BN):
        rn = n + tl.arange(0, BN)
        n64 = rn.to(tl.int64)
        p = tl.load(P + m64[:, None] * stride_pm + n64[None, :] * stride_pn,
                    mask=(rm[:, None] < M) & (rn[None, :] < high), other=0.0)  # fmt: skip
        row64 = n64 + to_row
        u = tl.load(U + row64[:, None] * stride_un + rr[None, :] * stride_ur,
                    mask=(rn[:, None] < high) & (rr[None, :] < R), other=0.0)  # fmt: skip
        acc = tl.dot(p, u.to(p.dtype), acc, input_precision=PRECISION)
        d = tl.dot(s, p, input_precision=PRECISION)  # (BR, BN)
        tl.store(D + tl.program_id(0).to(tl.int64) * stride_ds + row64[None, :] * stride_dn + rr[:, None] * stride_dr, d,
                 mask=(rn[None, :] < high) & (rr[:, None] < R))  # fmt: skip
    at = split.to(tl.int64) * M + m64
    tl.store(T + at[:, None] * (G * R) + (g * R + rr)[None, :], (acc * factor).to(T.dtype.element_ty),
             mask=(rm[:, None] < M) & (rr[None, :] < R))  # fmt: skip


class Mask(NamedTuple):
    """Dropout's mask as these steps take it: what each kernel makes its part of it from."""

    seed: Tensor | None
    threshold: int


def make_mask(M: int, N: int, p: float, seed: Tensor | None) -> Mask:
    return Mask(seed, threshold(p))


NO_MASK = Mask(None, 0)


def down(P: Tensor, U: Tensor, slices: Slices, factor: float, mask: Mask = NO_MASK) -> Tensor:
    """S (M, G·R) in P's dtype."""
    (M, _), R, G = P.shape, U.shape[1], len(slices)
    tile, BR = tiles.for_down(arch(), P.element_size(), mask.threshold > 0), block_of_ranks(R, P.element_size())
    rows, ranks = triton.cdiv(M, tile.BM), triton.cdiv(R, BR)
    splits = tiles.split(rows * G * ranks, widest(slices), least=512)
    S = P.new_empty(splits, M, G * R, dtype=P.dtype if splits == 1 else torch.float32)
    if M:
        down_kernel[(rows, G * splits, ranks)](
            P, U, S, *mask, factor, M, *P.stride(), *U.stride(),
            SLICES=with_rows(slices), R=R, SPLITS=splits, DROPOUT=mask.threshold > 0, PRECISION=precision(),
            BM=tile.BM, BN=tile.BN, BR=BR, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return total(S, P.dtype)


def gemm(
    X: Tensor, W: Tensor | NF4Tensor, S: Tensor, U: Tensor, slices: Slices, bias: Tensor | None = None, mask: Mask = NO_MASK
) -> Tensor:
    """Y (M, N) in X's dtype. A 4-bit W is dequantised in the product for few tokens, and before it for many."""
    (M, K), N, R = X.shape, W.shape[0], U.shape[1]
    if isinstance(W, NF4Tensor):
        if tiles.dequantise_inside(M, W.stored_shape[1]):
            return _gemm_nf4(X, W, S, U, slices, bias, mask)
        W = dequantize(W)
    tile = tiles.for_gemm(arch(), X.element_size(), M, N, R, mask.threshold > 0, aligned(X) and aligned(W))
    Y = X.new_empty(M, N)
    if M:
        gemm_kernel[(triton.cdiv(M, tile.BM) * triton.cdiv(N, tile.BN),)](
            X, W, S, U, bias, Y, *mask, M, N, K, *X.stride(), *W.stride(), *U.stride(),
            SLICES=with_rows(slices), R=R, DROPOUT=mask.threshold > 0, HAS_BIAS=bias is not None, EVEN_K=K % tile.BK == 0,
            PRECISION=precision(), BM=tile.BM, BN=tile.BN, BK=tile.BK, BR=block_of_ranks(R, X.element_size()), GROUP=8,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return Y


def _gemm_nf4(X: Tensor, W: NF4Tensor, S: Tensor, U: Tensor, slices: Slices, bias: Tensor | None, mask: Mask) -> Tensor:
    (M, K), N, R = X.shape, W.shape[0], U.shape[1]
    tile = tiles.for_gemm_nf4(X.element_size(), M)
    Y = X.new_empty(M, N)
    if M:
        gemm_nf4_kernel[(triton.cdiv(M, tile.BM) * triton.cdiv(N, tile.BN),)](
            X, W.codes, expand(*W.parts[1:]), S, U, bias, Y, *mask, M, N, K, *X.stride(), *U.stride(),
            SLICES=with_rows(slices), R=R, DROPOUT=mask.threshold > 0, HAS_BIAS=bias is not None, TRANSPOSED=W.transposed,
            PRECISION=precision(), BM=tile.BM, BN=tile.BN, BK=tile.BK, BR=block_of_ranks(R, X.element_size()), GROUP=8,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return Y


def outer(P: Tensor, S: Tensor, U: Tensor, slices: Slices, mask: Mask = NO_MASK) -> Tensor:
    """D, laid out as U and in its dtype."""
    M, R = len(P), U.shape[1]
    tile, BR = tiles.for_outer(P.element_size(), aligned(P)), block_of_ranks(R, P.element_size())
    blocks, ranks = triton.cdiv(widest(slices), tile.BN), triton.cdiv(R, BR)
    splits = tiles.split(blocks * len(slices) * ranks, M, least=512)
    D = partial_like(U, splits)
    outer_kernel[(len(slices) * blocks, splits, ranks)](
        P, S, D, *mask, M, *P.stride(), *D.stride(),
        SLICES=with_rows(slices), R=R, SPLITS=splits, BLOCKS=blocks, DROPOUT=mask.threshold > 0, PRECISION=precision(),
        BM=tile.BM, BN=tile.BN, BR=BR, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return total(D, U.dtype)


def sweep(P: Tensor, U: Tensor, S: Tensor, slices: Slices, factor: float) -> tuple[Tensor, Tensor]:
    """T as S, and D as U; in two passes over P where one would move more bytes."""
    M, R, G = len(P), U.shape[1], len(slices)
    if M == 0 or not tiles.sweep_wins(P.element_size(), R, aligned(P)):
        return down(P, U, slices, factor), outer(P, S, U, slices)
    tile = tiles.for_sweep(P.element_size())
    rows = triton.cdiv(M, tile.BM)
    splits = tiles.split(rows * G, widest(slices), least=512)
    T = P.new_empty(splits, M, G * R, dtype=P.dtype if splits == 1 else torch.float32)
    D = partial_like(U, rows)
    sweep_kernel[(rows, G * splits)](
        P, U, S, T, D, factor, M, *P.stride(), *U.stride(), *D.stride(),
        SLICES=with_rows(slices), R=R, SPLITS=splits, PRECISION=precision(),
        BM=tile.BM, BN=tile.BN, BR=block_of_ranks(R, P.element_size()), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return total(T, P.dtype), total(D, U.dtype)


def arch() -> int:
    """The GPU that kernels are compiled for: 90 is sm_90."""
    return triton.runtime.driver.active.get_current_target().arch


def precision() -> str:
    """How float32 is multiplied: as torch.matmul was told to, exactly unless TF32 is allowed."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def block_of_ranks(R: int, itemsize: int) -> int:
    """Ranks that one product takes: tensor cores want 16 at least; more than 64 (32 in float32) would crowd the registers."""
    return min(128 // itemsize, max(16, triton.next_power_of_2(R)))


def aligned(P: Tensor) -> bool:
    """Whether every row (or column, where those are contiguous) starts at a multiple of 16 bytes: what one load can take."""
    return all(stride == 1 or stride * P.element_size() % 16 == 0 for stride in P.stride())


def widest(slices: Slices) -> int:
    return max(stop - start for start, stop in slices)


def with_rows(slices: Slices) -> tuple[tuple[int, int, int], ...]:
    """Each slice's (start, stop, first row of U), which kernels take as constants: a model has few kinds of slices."""
    rows = itertools.accumulate((stop - start for start, stop in slices), initial=0)
    return tuple((start, stop, row) for (start, stop), row in zip(slices, rows, strict=False))


def partial_like(U: Tensor, count: int) -> Tensor:
    """Room for count partial sums in float32, each laid out as U."""
    return U.new_empty_strided((count, *U.shape), (U.numel(), *U.stride()), dtype=torch.float32)


def total(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """The partial sums added over the first dimension, always in the same order."""
    return (partial[0] if len(partial) == 1 else partial.sum(dim=0)).to(dtype)
