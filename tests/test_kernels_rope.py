"""rope against the float64 run of its reference: values, gradients, what is kept, what is refused."""

import re

import pytest
import torch
from elementwise_cases import assert_equals_reference, every_dtype, rope_cases
from helpers import rms_error
from hypothesis import given
from torch.utils.checkpoint import checkpoint

from minilora.kernels.rope import rope, rope_reference


@given(rope_cases(every_dtype))
def test_values_and_gradient_equal_the_float64_reference(case):
    assert_equals_reference(case)


def arguments(dtype=torch.float64, B=2, T=3, heads=4, kv_heads=2, D=6, half=2):
    torch.manual_seed(0)
    qkv, angles = torch.randn(B, T, (heads + 2 * kv_heads) * D).to(dtype).requires_grad_(), 6 * torch.rand(B, 1, T, half)
    return qkv, angles.cos().to(dtype), angles.sin().to(dtype), heads, kv_heads


def test_it_gives_queries_keys_and_values_in_the_memory_of_what_it_was_given():
    qkv, *constants = arguments()
    before = qkv.detach().clone()
    q, k, v = rope(qkv, *constants)
    assert (q.shape, k.shape, v.shape) == ((2, 4, 3, 6), (2, 2, 3, 6), (2, 2, 3, 6))
    assert torch.equal(v, before[..., 36:].view(2, 3, 2, 6).transpose(1, 2))
    assert torch.equal(torch.cat([u.transpose(1, 2).flatten(2) for u in (q, k, v)], dim=-1), qkv)
    assert {u.untyped_storage().data_ptr() for u in (q, k, v)} == {qkv.untyped_storage().data_ptr()}


def test_who_keeps_the_projection_for_its_backward_is_told():
    qkv, *constants = arguments()
    q, _, _ = rope(qkv.exp(), *constants)  # exp keeps its result
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        q.sum().backward()


def test_gradients_agree_with_finite_differences():
    qkv, *constants = arguments()
    assert torch.autograd.gradcheck(lambda qkv: rope(qkv.clone(), *constants), [qkv], fast_mode=True)


@pytest.mark.parametrize("i", range(3))
def test_a_gradient_of_one_result_alone_is_right(i):
    qkv, *constants = arguments()
    expected, found = (torch.autograd.grad(f(qkv, *constants)[i].square().sum(), qkv)[0] for f in (rope_reference, rope))
    assert rms_error(found, expected) < 1e-13


def test_the_tables_alone_are_kept():
    (qkv, cos, sin, *heads), kept = arguments(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rope(qkv, cos, sin, *heads)
    assert [t.data_ptr() for t in kept] == [cos.data_ptr(), sin.data_ptr()]


def test_compiled_without_a_break_and_checkpointed_it_gives_the_same():
    qkv, *constants = arguments(torch.float32)

    def run(qkv):
        return torch.cat([u.square() for u in rope(qkv.clone(), *constants)], dim=1)

    eager = run(qkv)
    (gradient,) = torch.autograd.grad(eager.sum(), qkv)
    for other in (
        torch.compile(run, fullgraph=True, backend="aot_eager"),
        lambda qkv: checkpoint(run, qkv, use_reentrant=False),
    ):
        y = other(qkv)
        assert rms_error(y, eager) < 1e-6
        assert rms_error(torch.autograd.grad(y.sum(), qkv)[0], gradient) < 1e-6


def test_tables_of_another_dtype_are_rounded_to_that_of_qkv():
    qkv, cos, sin, *heads = arguments(torch.bfloat16)
    results = rope(qkv.clone(), cos.float(), sin.float(), *heads)
    assert all(torch.equal(one, other) for one, other in zip(results, rope(qkv, cos, sin, *heads), strict=True))


def test_a_second_derivative_is_refused():
    qkv, *constants = arguments()
    (d,) = torch.autograd.grad(rope(qkv, *constants)[0].square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        d.sum().backward()


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"D": 3, "half": 2}, "the tables must turn d ≤ D = 3 dimensions, not 4"),
        ({"heads": 5}, "qkv must end in 9 heads of one size, not in 48 features"),
        ({"cos": torch.ones(2, 1, 4, 2)}, "cos and sin must be (B or 1, 1, T, d/2) for B, T = 2, 3, not (2, 1, 4, 2)"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(replaced, message):
    sizes = {name: replaced.pop(name) for name in ("D", "half") if name in replaced}
    fitting = dict(zip(("qkv", "cos", "sin", "heads", "kv_heads"), arguments(**sizes), strict=True))
    with pytest.raises(ValueError, match="^rope: .*" + re.escape(message)):
        rope(**fitting | replaced)
