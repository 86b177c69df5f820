"""The mask in Triton: the bits of the PyTorch mask, whatever the tile."""

import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from without_gpu import compiling, interpreting

from minilora.kernels.dropout import keep, threshold
from minilora.kernels.dropout_triton import keep_tile


@triton.jit
def mask_kernel(MASK, SEED, threshold, M, N, BM: tl.constexpr, BN: tl.constexpr):
    rm, first = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN
    rn = first + tl.arange(0, BN)
    mask = keep_tile(tl.load(SEED), rm, first, threshold, BM, BN)
    tl.store(MASK + rm[:, None] * N + rn[None, :], mask, mask=(rm[:, None] < M) & (rn[None, :] < N))


def mask_of_tiles(M: int, N: int, p: float, seed: torch.Tensor, BM: int, BN: int) -> torch.Tensor:
    mask = torch.empty(M, N, dtype=torch.bool, device=seed.device)
    mask_kernel[(triton.cdiv(M, BM), triton.cdiv(N, BN))](mask, seed, threshold(p), M, N, BM=BM, BN=BN)
    return mask


sizes = st.integers(1, 70)
powers = st.sampled_from([16, 32, 64])


@settings(max_examples=30)
@given(sizes, sizes, st.floats(0.01, 0.99), st.integers(0, 2**63 - 1).map(torch.tensor), powers, powers)
def test_it_is_the_mask_of_pytorch_bit_for_bit_for_any_tile(M, N, p, seed, BM, BN):
    with interpreting():
        assert torch.equal(mask_of_tiles(M, N, p, seed, BM, BN), keep(M, N, p, seed))


def test_one_call_of_the_generator_decides_eight_elements():
    with compiling(90) as compiled:
        mask_of_tiles(512, 512, 0.1, torch.empty((), dtype=torch.int64, device="meta"), 64, 64)
    calls = 64 * 64 / 8 / (32 * compiled[0].constants.get("num_warps", 4))  # by each thread
    wide_products = sum(compiled[0].opcodes[name] for name in ("IMAD", "UIMAD"))
    assert calls * 7 * 2 <= wide_products < 2 * calls * 7 * 4  # two 32 × 32 → 64 bit products a round, seven rounds
