"""swiglu against the float64 run of its reference: values, gradients, what is kept, what is refused."""

import pytest
import torch
from elementwise_cases import assert_equals_reference, every_dtype, swiglu_cases
from helpers import rms_error
from hypothesis import given
from torch.utils.checkpoint import checkpoint

from minilora.kernels.swiglu import swiglu, swiglu_reference


@given(swiglu_cases(every_dtype))
def test_value_and_gradient_equal_the_float64_reference(case):
    assert_equals_reference(case)


def packed(dtype=torch.float64, shape=(2, 3, 16)):
    torch.manual_seed(0)
    return torch.randn(shape).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_value_is_that_of_the_reference_bit_for_bit(dtype):
    x = packed(dtype, (50, 96))
    assert torch.equal(swiglu(x), swiglu_reference(x))


def test_gradients_agree_with_finite_differences_and_stay_finite_far_out():
    assert torch.autograd.gradcheck(swiglu, [packed()], fast_mode=True)
    x = torch.tensor([[-1e4, -100.0, 100.0, 1e4, 1.0, 2.0, 3.0, 4.0]], requires_grad=True)
    (dx,) = torch.autograd.grad(swiglu(x).sum(), x)
    assert dx.tolist() == [[0.0, 0.0, 3.0, 4.0, 0.0, 0.0, 100.0, 1e4]]


def test_the_packed_projection_alone_is_kept():
    x, kept = packed(torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        swiglu(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


def test_compiled_without_a_break_and_checkpointed_it_gives_the_same():
    x = packed(torch.float32)
    eager = swiglu(x)
    (gradient,) = torch.autograd.grad(eager.sum(), x)
    for other in (
        torch.compile(swiglu, fullgraph=True, backend="aot_eager"),
        lambda x: checkpoint(swiglu, x, use_reentrant=False),
    ):
        y = other(x)
        assert rms_error(y, eager) < 1e-6
        assert rms_error(torch.autograd.grad(y.sum(), x)[0], gradient) < 1e-6


def test_a_second_derivative_is_refused():
    x = packed()
    (dx,) = torch.autograd.grad(swiglu(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


def test_what_has_no_halves_is_refused():
    with pytest.raises(ValueError, match="swiglu: packed must end in 2·I features, gate and up, not in 5"):
        swiglu(torch.ones(2, 5))
