"""Dropout from a seed: the mask is a function of seed, row and column, and of nothing else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minilora.kernels import dropout
from minilora.kernels.dropout import draw_seed, drop, keep, kept_share, philox

shapes = st.lists(st.integers(0, 6), min_size=1, max_size=4).map(tuple)
probabilities = st.floats(0.01, 0.95)
seeds = st.integers(0, 2**63 - 1).map(torch.tensor)


def philox_by_hand(key: int, c0: int, c1: int) -> list[int]:
    """Salmon et al. 2011, in Python's whole numbers, seven rounds."""
    k0, k1, c2, c3 = key % 2**32, key >> 32, 0, 0
    for _ in range(7):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = b // 2**32 ^ c1 ^ k0, b % 2**32, a // 2**32 ^ c3 ^ k1, a % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def test_philox_gives_the_words_that_its_authors_published():
    zero = torch.tensor(0)  # "philox4x32 7" with key and counter 0, in the known answers of Random123
    assert [int(word) for word in philox(zero, (zero, zero))] == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_philox_equals_its_definition(seed, c0, c1):
    assert [int(w) for w in philox(torch.tensor(seed), (torch.tensor(c0), torch.tensor(c1)))] == philox_by_hand(seed, c0, c1)


@given(st.integers(0, 5), st.integers(0, 40), probabilities, st.integers(0, 2**63 - 1))
def test_the_mask_is_what_the_equation_says(M, N, p, seed):
    mask = keep(M, N, p, torch.tensor(seed))
    assert mask.shape == (M, N)
    for i in range(M):
        for n in range(N):
            q, w, h = n // 8, n % 8 // 2, n % 2
            half = philox_by_hand(seed, q, i)[w] >> 16 * h & 0xFFFF
            assert bool(mask[i, n]) == (half >= round(p * 2**16))


@given(st.integers(1, 60), st.integers(1, 60), seeds, st.integers(1, 9))
def test_blocks_of_rows_do_not_show_in_the_mask(M, N, seed, calls):
    whole = keep(M, N, 0.3, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dropout, "CALLS", calls)
        assert torch.equal(keep(M, N, 0.3, seed), whole)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 29), st.integers(0, 29), seeds)
def test_an_element_keeps_its_fate_in_a_smaller_matrix(M, N, fewer_rows, fewer_columns, seed):
    m, n = max(1, M - fewer_rows), max(1, N - fewer_columns)
    assert torch.equal(keep(m, n, 0.5, seed), keep(M, N, 0.5, seed)[:m, :n])


@pytest.mark.parametrize("p", [1 - 2**-20, 1e-9])
def test_extreme_probabilities_divide_by_no_zero(p):
    y = drop(torch.ones(1000, 8), p, torch.tensor(3))
    assert torch.isfinite(y).all()
    assert 0 < kept_share(p) <= 1


@given(shapes, probabilities, seeds, st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
def test_each_element_is_zero_or_divided_by_the_rate_of_keeping(shape, p, seed, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype) + 8  # never zero itself
    y = drop(x, p, seed)
    kept = y != 0
    assert y.dtype == dtype
    assert y.shape == shape
    torch.testing.assert_close(y[kept], (x.double() / kept_share(p)).to(dtype)[kept], rtol=torch.finfo(dtype).eps, atol=0)


@given(shapes, probabilities, seeds)
def test_the_same_seed_drops_the_same_elements_whatever_the_values_dtype_and_layout(shape, p, seed):
    mask = drop(torch.ones(shape), p, seed) != 0
    other = 3 * torch.ones(shape[::-1], dtype=torch.bfloat16).permute(tuple(reversed(range(len(shape)))))
    assert torch.equal(drop(other, p, seed) != 0, mask)


@given(probabilities, st.lists(st.integers(0, 2**63 - 1), min_size=2, max_size=2, unique=True))
def test_different_seeds_drop_different_elements(p, two):
    x = torch.ones(4096)
    assert not torch.equal(drop(x, p, torch.tensor(two[0])), drop(x, p, torch.tensor(two[1])))


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_each_element_is_dropped_with_probability_p(p):
    n = 200_000
    dropped = int((drop(torch.ones(n // 100, 100), p, torch.tensor(7)) == 0).sum())
    assert abs(dropped - p * n) < 5 * (n * p * (1 - p)) ** 0.5  # five standard deviations of a binomial


def test_neighbours_are_dropped_independently():
    n, p = 400, 0.3
    dropped = (drop(torch.ones(n, n), p, torch.tensor(5)) == 0).double() - p
    for one, other in [(dropped[1:], dropped[:-1]), (dropped[:, 1:], dropped[:, :-1])]:
        assert abs(float((one * other).mean())) < 5 * p * (1 - p) / n


@given(shapes, probabilities, seeds)
def test_drop_is_its_own_transpose(shape, p, seed):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    dy = torch.randn(shape, generator=generator, dtype=torch.float64)
    y = drop(x, p, seed)
    torch.testing.assert_close((y * dy).sum(), (x * drop(dy, p, seed)).sum())
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(dx, drop(dy, p, seed))


def test_probability_zero_gives_x_itself():
    x = torch.randn(3, 4)
    assert drop(x, 0.0, torch.tensor(1)) is x


def test_x_is_not_overwritten():
    x = torch.ones(64)
    drop(x, 0.5, torch.tensor(1))
    assert torch.equal(x, torch.ones(64))


def test_dropping_leaves_the_default_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    drop(torch.ones(64), 0.5, torch.tensor(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_drawn_seeds_follow_the_default_generator():
    torch.manual_seed(4)
    first = [int(draw_seed()) for _ in range(50)]
    torch.manual_seed(4)
    assert [int(draw_seed()) for _ in range(50)] == first
    assert len(set(first)) == 50
    assert all(0 <= seed < 2**63 for seed in first)
    assert max(first) > 2**61  # all 63 bits are drawn
