"""The table of tiles: every choice is one that a program can be, and few tokens get more programs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.kernels import tiles

archs, itemsizes = st.sampled_from([80, 86, 89, 90, 100, 120]), st.sampled_from([2, 4])
sizes = st.integers(1, 20_000)


@given(archs, itemsizes, sizes, sizes, st.integers(1, 512), st.booleans(), st.booleans())
def test_tiles_are_powers_of_two_that_fill_tensor_cores(arch, itemsize, M, N, rank, dropout, aligned):
    chosen = [
        tiles.for_gemm(arch, itemsize, M, N, rank, dropout, aligned),
        tiles.for_down(arch, itemsize, dropout),
        tiles.for_outer(itemsize, aligned),
        tiles.for_sweep(itemsize),
    ]
    for tile in chosen:
        assert all(n >= 16 and n & (n - 1) == 0 for n in (tile.BM, tile.BN))
        assert tile.num_warps in (4, 8)
    assert chosen[0].BK in (32, 64)
    assert all(tile.BN % 8 == 0 for tile in chosen)  # one call of the mask's generator decides eight columns


@pytest.mark.parametrize("arch", [80, 89, 90])
def test_few_tokens_get_smaller_tiles_so_that_more_programs_run(arch):
    few, many = tiles.for_gemm(arch, 2, 256, 3072, 16, False, True), tiles.for_gemm(arch, 2, 4096, 3072, 16, False, True)
    assert few.BM * few.BN < many.BM * many.BN


@given(st.integers(0, 500), sizes, st.sampled_from([64, 512]))
def test_a_sum_is_cut_only_where_processors_idle_and_never_into_crumbs(programs, length, least):
    shares = tiles.split(programs, length, least)
    assert shares >= 1
    if shares > 1:
        assert shares * programs <= tiles.PROGRAMS
        assert length // shares >= least


@given(itemsizes, sizes, sizes)
def test_a_4_bit_weight_is_dequantised_inside_only_by_one_row_of_tiles_of_whole_blocks(itemsize, M, K):
    tile = tiles.for_gemm_nf4(itemsize, M)
    assert 64 % tile.BK == 64 % tile.BN == 0
    assert not tiles.dequantise_inside(M, K) or (tile.BM >= M and K % 64 == 0)
