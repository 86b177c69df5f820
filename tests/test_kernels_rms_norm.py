"""rms_norm and add_rms_norm against the float64 run of their reference: values, gradients, what is kept, what is refused."""

import re

import pytest
import torch
from elementwise_cases import EPS, add_rms_norm_reference, assert_equals_reference, every_dtype, rms_norm_cases
from helpers import rms_error
from hypothesis import given
from torch.utils.checkpoint import checkpoint

from minilora.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_reference


@given(rms_norm_cases(every_dtype))
def test_values_and_gradients_equal_the_float64_reference(case):
    assert_equals_reference(case)


def tensors(dtype=torch.float64, shape=(2, 3, 8)):
    torch.manual_seed(0)
    x, delta = torch.randn(2, *shape).to(dtype)
    return x.requires_grad_(), delta.requires_grad_(), torch.randn(shape[-1]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_those_of_the_reference_bit_for_bit(dtype):
    x, delta, weight = tensors(dtype, (50, 96))
    h, y = add_rms_norm(x, delta.clone(), weight, EPS)
    assert torch.equal(h, x + delta)
    assert torch.equal(y, rms_norm_reference(h, weight, EPS))
    assert torch.equal(rms_norm(x, weight, EPS), rms_norm_reference(x, weight, EPS))


def test_gradients_agree_with_finite_differences():
    x, delta, weight = tensors()
    assert torch.autograd.gradcheck(lambda x, delta: add_rms_norm(x, delta.clone(), weight, EPS), [x, delta], fast_mode=True)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, EPS), [x], fast_mode=True)


def test_a_weight_that_is_trained_gets_its_gradient():
    x, delta, weight = tensors()
    weight.requires_grad_()
    found = torch.autograd.grad(add_rms_norm(x, delta, weight, EPS)[1].square().sum(), weight)[0]
    expected = torch.autograd.grad(rms_norm_reference(x + delta, weight, EPS).square().sum(), weight)[0]
    assert rms_error(found, expected) < 1e-13
    assert rms_error(torch.autograd.grad(rms_norm(x + delta, weight, EPS).square().sum(), weight)[0], expected) < 1e-13


def test_dtypes_that_differ_are_promoted_as_torch_does():
    x, delta, weight = tensors(torch.float32)
    h, y = add_rms_norm(x, delta.bfloat16(), weight, EPS)
    assert h.dtype == y.dtype == rms_norm(x.bfloat16(), weight, EPS).dtype == torch.float32
    assert torch.equal(y, rms_norm_reference(x + delta.bfloat16(), weight, EPS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_sum_and_one_number_a_row_are_kept(dtype):
    x, delta, weight = tensors(dtype, (64, 96))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        h, _ = add_rms_norm(x, delta, weight, EPS)
    assert sorted(t.numel() for t in kept) == [64, 96, 64 * 96]
    assert any(t.data_ptr() == h.data_ptr() for t in kept)


def test_the_sum_takes_the_memory_of_delta_and_who_keeps_that_for_its_backward_is_told():
    x, delta, weight = tensors()
    h, y = add_rms_norm(x, out := delta.exp(), weight, EPS)  # exp keeps its result
    assert h.data_ptr() == out.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_gradient_of_one_result_alone_is_right():
    x, delta, weight = tensors()
    for i in range(2):
        found = torch.autograd.grad(add_rms_norm(x, delta.clone(), weight, EPS)[i].square().sum(), [x, delta])
        expected = torch.autograd.grad(add_rms_norm_reference(x, delta, weight, EPS)[i].square().sum(), [x, delta])
        assert all(rms_error(one, other) < 1e-13 for one, other in zip(found, expected, strict=True))


def test_compiled_without_a_break_and_checkpointed_it_gives_the_same():
    x, delta, weight = tensors(torch.float32)

    def run(x, delta):
        h, y = add_rms_norm(x, delta.clone(), weight, EPS)
        return h * rms_norm(y, weight, EPS)

    eager = run(x, delta)
    gradients = torch.autograd.grad(eager.sum(), [x, delta])
    for other in (
        torch.compile(run, fullgraph=True, backend="aot_eager"),
        lambda x, delta: checkpoint(run, x, delta, use_reentrant=False),
    ):
        y = other(x, delta)
        assert rms_error(y, eager) < 1e-6
        again = torch.autograd.grad(y.sum(), [x, delta])
        assert all(rms_error(one, other) < 1e-6 for one, other in zip(again, gradients, strict=True))


def test_a_second_derivative_is_refused():
    x, _, weight = tensors()
    (dx,) = torch.autograd.grad(rms_norm(x, weight, EPS).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


def test_what_does_not_fit_is_refused_at_once():
    with pytest.raises(ValueError, match=re.escape("rms_norm: weight must be (C,) = (4,), as x ends, not (5,)")):
        rms_norm(torch.ones(2, 4), torch.ones(5), EPS)
    with pytest.raises(ValueError, match=r"weight must be .*; delta must be \(2, 4\) as x is, not \(4,\)"):
        add_rms_norm(torch.ones(2, 4), torch.ones(4), torch.ones(5), EPS)
