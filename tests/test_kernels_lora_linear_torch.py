"""The steps in PyTorch: each is its equation, in float64 to the last bits, for any slices."""

import itertools

import pytest
import torch
from helpers import rms_error
from hypothesis import given
from hypothesis import strategies as st

from minilora.kernels import lora_linear_torch as steps
from minilora.kernels.dropout import keep


def dense(slices, U, N):
    """The slices' factors as one matrix (N, G·R), zero where a column has no slice or another one."""
    R, row = U.shape[1], 0
    matrix = torch.zeros(N, len(slices) * R, dtype=U.dtype)
    for g, (start, stop) in enumerate(slices):
        matrix[start:stop, g * R : (g + 1) * R] = U[row : row + stop - start]
        row += stop - start
    return matrix


def stacked(slices, D, R):
    """The blocks of a dense (N, G·R) that belong to slices, as U has them."""
    return torch.cat([D[start:stop, g * R : (g + 1) * R] for g, (start, stop) in enumerate(slices)])


@st.composite
def problems(draw):
    M, N, R = draw(st.integers(0, 6)), draw(st.integers(1, 12)), draw(st.integers(1, 3))
    cuts = sorted(draw(st.sets(st.integers(0, N), min_size=2, max_size=4)))
    slices = tuple(itertools.pairwise(cuts))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rand = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    return slices, rand(M, N), rand(sum(b - a for a, b in slices), R), rand(M, len(slices) * R)


@given(problems())
def test_down_outer_and_sweep_are_their_equations(problem):
    slices, P, U, S = problem
    expected_S, expected_D = 1.5 * P @ dense(slices, U, P.shape[1]), stacked(slices, P.T @ S, U.shape[1])
    assert rms_error(steps.down(P, U, slices, 1.5), expected_S) < 1e-13
    assert rms_error(steps.outer(P, S, U, slices), expected_D) < 1e-13
    T, D = steps.sweep(P, U, S, slices, 1.5)
    assert rms_error(T, expected_S) < 1e-13
    assert rms_error(D, expected_D) < 1e-13


@given(problems(), st.integers(1, 5), st.booleans())
def test_gemm_is_its_equation(problem, K, with_bias):
    slices, P, U, S = problem
    X, W = torch.ones(len(P), K, dtype=torch.float64), P[:1].T.expand(-1, K) if len(P) else torch.ones(P.shape[1], K).double()
    bias = U.new_ones(P.shape[1]) if with_bias else None
    expected = X @ W.T + S @ dense(slices, U, P.shape[1]).T + (bias if with_bias else 0)
    assert rms_error(steps.gemm(X, W, S, U, slices, bias), expected) < 1e-13


@pytest.mark.parametrize("p", [0.3, 0.7])
def test_each_drops_by_the_mask_of_the_seed_and_scales_nothing(p):
    M, N, K, R, seed = 9, 13, 5, 2, torch.tensor(11)
    torch.manual_seed(0)
    P, X, W, U, S = (torch.randn(shape, dtype=torch.float64) for shape in [(M, N), (M, K), (N, K), (N, R), (M, R)])
    whole, mask = ((0, N),), steps.make_mask(M, N, p, seed)
    kept = keep(M, N, p, seed).double()
    assert rms_error(steps.down(P, U, whole, 2.0, mask), 2 * (kept * P) @ U) < 1e-13
    assert rms_error(steps.outer(P, S, U, whole, mask), (kept * P).T @ S) < 1e-13
    assert rms_error(steps.gemm(X, W, S, U, whole, None, mask), X @ W.T + kept * (S @ U.T)) < 1e-13


def test_results_have_the_dtypes_that_are_promised():
    P, U, S = torch.ones(3, 4).bfloat16(), torch.ones(4, 2), torch.ones(3, 2).bfloat16()
    assert steps.down(P, U, ((0, 4),), 1.0).dtype == torch.bfloat16
    assert steps.outer(P, S, U, ((0, 4),)).dtype == torch.float32
    assert steps.gemm(P, torch.ones(4, 4).bfloat16(), S, U, ((0, 4),)).dtype == torch.bfloat16
