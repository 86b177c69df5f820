"""Dropout from a seed: the mask is a function of the seed and the shape, and of nothing else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minilora.kernels.dropout import draw_seed, drop

shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)
probabilities = st.floats(0.01, 0.95)
seeds = st.integers(0, 2**63 - 1)


@given(shapes, probabilities, seeds, st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
def test_each_element_is_zero_or_divided_by_the_rate_of_keeping(shape, p, seed, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype) + 8  # never zero itself
    y = drop(x, p, seed)
    kept = y != 0
    assert y.dtype == dtype
    assert y.shape == shape
    torch.testing.assert_close(y[kept], (x.double() / (1 - p)).to(dtype)[kept], rtol=torch.finfo(dtype).eps, atol=0)


@given(shapes, probabilities, seeds)
def test_the_same_seed_drops_the_same_elements_whatever_the_values_dtype_and_layout(shape, p, seed):
    mask = drop(torch.ones(shape), p, seed) != 0
    other = 3 * torch.ones(shape[::-1], dtype=torch.bfloat16).permute(tuple(reversed(range(len(shape)))))
    assert torch.equal(drop(other, p, seed) != 0, mask)


@given(probabilities, st.lists(seeds, min_size=2, max_size=2, unique=True))
def test_different_seeds_drop_different_elements(p, two):
    x = torch.ones(4096)
    assert not torch.equal(drop(x, p, two[0]), drop(x, p, two[1]))


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_each_element_is_dropped_with_probability_p(p):
    n = 200_000
    dropped = int((drop(torch.ones(n), p, seed=7) == 0).sum())
    assert abs(dropped - p * n) < 5 * (n * p * (1 - p)) ** 0.5  # five standard deviations of a binomial


def test_neighbours_are_dropped_independently():
    n, p = 400, 0.3
    dropped = (drop(torch.ones(n, n), p, seed=5) == 0).double() - p
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
    assert drop(x, 0.0, seed=1) is x


def test_x_is_not_overwritten():
    x = torch.ones(64)
    drop(x, 0.5, seed=1)
    assert torch.equal(x, torch.ones(64))


def test_dropping_leaves_the_default_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    drop(torch.ones(64), 0.5, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_drawn_seeds_follow_the_default_generator():
    torch.manual_seed(4)
    first = [draw_seed() for _ in range(50)]
    torch.manual_seed(4)
    assert [draw_seed() for _ in range(50)] == first
    assert len(set(first)) == 50
    assert all(0 <= seed < 2**63 for seed in first)
    assert max(first) > 2**61  # all 63 bits are drawn
