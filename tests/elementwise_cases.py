"""Cases of the decoder's elementwise operations, and the float64 runs of their references to hold them to."""

import torch
from helpers import rms_error
from hypothesis import strategies as st

from minilora.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_reference
from minilora.kernels.rope import rope, rope_reference
from minilora.kernels.swiglu import swiglu, swiglu_reference

# Largest RMS(error) / RMS(reference) allowed, by dtype; a value may be rounded twice, before and after its last factor.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}
EPS = 1e-5

every_dtype = st.sampled_from(list(TOLERANCE))
gpu_dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
layouts = st.sampled_from(["contiguous", "transposed", "strided"])


class Case:
    """An operation, its reference and the tensors that both take, differentiable but for the constants after them."""

    def __init__(self, operation, reference, tensors: list, constants: tuple):
        self.operation, self.reference, self.tensors, self.constants = operation, reference, tensors, constants

    def __repr__(self):
        return f"{self.operation.__name__} of {[(*t.shape, t.dtype, t.stride()) for t in self.tensors]}, {self.constants[-2:]}"

    def run(self, function, tensors, constants) -> list:
        """Every result, and the gradient of every tensor of a loss that weighs all of them differently."""
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = function(*leaves, *constants)
        out = out if isinstance(out, tuple) else (out,)
        torch.manual_seed(1)
        weights = [torch.randn(y.shape).to(self.tensors[0].dtype).to(y.dtype) for y in out]
        return [*out, *torch.autograd.grad(out, leaves, weights)]

    def found(self) -> list:
        return self.run(self.operation, self.tensors, self.constants)

    def expected(self) -> list:
        constants = [c.double() if isinstance(c, torch.Tensor) else c for c in self.constants]
        return self.run(self.reference, [t.double() for t in self.tensors], constants)


def assert_equals_reference(case: Case) -> None:
    expected, found = case.expected(), case.found()  # in this order: an operation may overwrite what it was given
    errors = [rms_error(one, other) for one, other in zip(found, expected, strict=True)]
    tolerance = TOLERANCE[case.tensors[0].dtype]
    assert all(error <= tolerance for error in errors), f"{errors} must be at most {tolerance}"
    assert all(one.dtype == case.tensors[0].dtype for one in found)


def random(shape, dtype, layout="contiguous"):
    if layout == "transposed":
        return torch.randn(*shape[:-2], shape[-1], shape[-2]).to(dtype).transpose(-1, -2)
    if layout == "strided":
        return torch.randn(*shape, 2).to(dtype)[..., 0]
    return torch.randn(shape).to(dtype)


def add_rms_norm_reference(x, delta, weight, eps):
    h = x + delta
    return h, rms_norm_reference(h, weight, eps)


@st.composite
def rms_norm_cases(draw, dtypes):
    """With a delta or without. In rows of a few features the terms of the gradient cancel, and leave any relative error."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype, leading = draw(dtypes), draw(st.sampled_from([(1,), (7,), (2, 3)]))
    shape = *leading, draw(st.integers(16, 70) | st.sampled_from([576, 1030]))
    tensors = [random(shape, dtype, draw(layouts)) for _ in range(draw(st.integers(1, 2)))]
    constants = random(shape[-1:], dtype), EPS
    if len(tensors) == 1:
        return Case(rms_norm, rms_norm_reference, tensors, constants)
    return Case(add_rms_norm, add_rms_norm_reference, tensors, constants)


@st.composite
def swiglu_cases(draw, dtypes):
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype, leading = draw(dtypes), draw(st.sampled_from([(1,), (7,), (2, 3)]))
    shape = *leading, 2 * draw(st.integers(1, 70) | st.sampled_from([576, 1030]))
    return Case(swiglu, swiglu_reference, [4 * random(shape, dtype, draw(layouts))], ())


@st.composite
def rope_cases(draw, dtypes):
    """Grouped, multi-head and multi-query heads, of even and odd sizes, rotated whole or in part."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    B, T, kv_heads, D = (draw(st.integers(1, most)) for most in (3, 5, 3, 40))
    D, heads, dtype = max(D, 2), kv_heads * draw(st.integers(1, 4)), draw(dtypes)
    angles = 6 * torch.rand(draw(st.sampled_from([1, B])), 1, T, draw(st.integers(1, D // 2)))
    qkv = random((B, T, (heads + 2 * kv_heads) * D), dtype)
    return Case(rope, rope_reference, [qkv], (angles.cos().to(dtype), angles.sin().to(dtype), heads, kv_heads))
