"""Cases of lora_linear and the float64 run of its reference to hold them to, for the PyTorch and the Triton steps alike."""

import itertools
from dataclasses import dataclass

import torch
from helpers import rms_error
from hypothesis import strategies as st

from minilora.kernels.dropout import draw_seed
from minilora.kernels.lora_linear import backward, forward, lora_linear, lora_linear_reference

TENSORS = ("x", "weight", "lora_A", "lora_B", "bias")
# Largest RMS(error) / RMS(reference) allowed, by the dtype of x: about 1.4 times the worst of 1,500 cases, 60 times in float64.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-7, torch.float16: 1e-3, torch.bfloat16: 7e-3}


@dataclass(repr=False)
class Case:
    tensors: dict[str, torch.Tensor | None]
    scaling: float
    dropout: float
    slices: tuple[tuple[int, int], ...] | None
    dy: torch.Tensor
    seed: int  # of torch's default generator just before the operation

    def __repr__(self):
        shapes = {name: (*t.shape, t.dtype, t.stride()) for name, t in self.tensors.items() if t is not None}
        return f"{shapes}, scaling {self.scaling}, dropout {self.dropout}, slices {self.slices}, seed {self.seed}"

    def operation(self):
        torch.manual_seed(self.seed)
        return self._run(self.tensors, self.dy, lora_linear)

    def reference(self):
        torch.manual_seed(self.seed)
        seed = draw_seed() if self.dropout else None
        double = {name: None if t is None else t.detach().double().requires_grad_() for name, t in self.tensors.items()}
        return self._run(double, self.dy.double(), lora_linear_reference, seed=seed)

    def _run(self, tensors, dy, function, **more):
        y = function(**tensors, scaling=self.scaling, dropout=self.dropout, slices=self.slices, **more)
        given = {name: t for name, t in tensors.items() if t is not None}
        return {"y": y} | dict(zip(given, torch.autograd.grad(y, list(given.values()), dy), strict=True))


def make_case(leading, K, N, R, slices, dtype, adapter_dtype, *, bias, layout, expanded, scaling, dropout, seed) -> Case:
    """Random tensors scaled by 1/sqrt(fan_in): x and dy of unit size, so that no result's size hides another's error."""
    torch.manual_seed(seed)
    edges = slices or ((0, N),)
    x = torch.randn(*leading, K)
    if layout == "transposed":
        x = torch.randn(K, *leading).movedim(0, -1)
    elif layout == "strided":
        x = torch.randn(*leading, 2 * K)[..., ::2]
    shape_A, width = (len(edges) * R, K), sum(stop - start for start, stop in edges)
    return Case(
        {
            "x": x.to(dtype).requires_grad_(),
            "weight": (torch.randn(N, K) / K**0.5).to(dtype).requires_grad_(),
            "lora_A": (torch.randn(shape_A) / K**0.5).to(adapter_dtype).requires_grad_(),
            "lora_B": (torch.randn(width, R) / R**0.5).to(adapter_dtype).requires_grad_(),
            "bias": torch.randn(N).to(dtype).requires_grad_() if bias else None,
        },
        scaling,
        dropout,
        slices,
        torch.randn(N).to(dtype).expand(*leading, N) if expanded else torch.randn(*leading, N).to(dtype),
        seed,
    )


@st.composite
def cases(draw, dtypes, leadings, sizes, ranks, least_columns):
    K, N, R = draw(sizes), draw(sizes), draw(ranks)
    cuts = sorted(draw(st.sets(st.integers(0, N), min_size=2, max_size=5)))
    slices = tuple(sorted(draw(st.lists(st.sampled_from(list(itertools.pairwise(cuts))), min_size=1, unique=True))))
    if draw(st.booleans()) or sum(stop - start for start, stop in slices) < least_columns:
        slices = None
    dtype, adapter_dtype = draw(st.sampled_from(dtypes))
    return make_case(
        draw(leadings), K, N, R, slices, dtype, adapter_dtype,
        bias=draw(st.booleans()),
        layout=draw(st.sampled_from(["contiguous", "transposed", "strided"])),
        expanded=draw(st.booleans()) and dtype == torch.float64,
        scaling=draw(st.sampled_from([1.0, 0.25, 2.0, -1.5])),
        dropout=draw(st.sampled_from([0.0, 0.1, 0.6])),
        seed=draw(st.integers(0, 2**31)),
    )  # fmt: skip


def tensors_of(M, N, K, R, slices=None, dtype=torch.float32, adapter=torch.float32, device="cpu", bias=False):
    """x, weight, lora_A, lora_B, bias and dy, scaled so that every product is of unit size; and the slices."""
    slices = slices or ((0, N),)
    rand = lambda *shape, as_: torch.randn(shape, device=device).to(as_)  # noqa: E731
    x, dy = rand(M, K, as_=dtype), rand(M, N, as_=dtype)
    weight = (rand(N, K, as_=torch.float32) / K**0.5).to(dtype)
    lora_A = rand(len(slices) * R, K, as_=adapter) / K**0.5
    lora_B = rand(sum(stop - start for start, stop in slices), R, as_=adapter) / R**0.5
    return [x, weight, lora_A, lora_B, rand(N, as_=dtype) if bias else None], dy, slices


def run(steps, inputs, dy, slices, seed=None, scaling=1.5, dropout=0.0, needed=(True, False, True, True, False)):
    """Everything that a training step computes: y, s and the gradients that are needed."""
    x, weight, lora_A, lora_B, bias = inputs
    y, s = forward(steps, x, weight, lora_A, lora_B, bias, seed, scaling, dropout, slices)
    return [y, s, *backward(steps, dy, x, s, weight, lora_A, lora_B, seed, scaling, dropout, slices, list(needed))]


@st.composite
def slices_of(draw, N: int):
    """None, for one slice that is all, or some of the parts into which cuts anywhere divide the columns."""
    parts = list(itertools.pairwise(sorted(draw(st.sets(st.integers(0, N), min_size=2, max_size=5)))))
    return draw(st.none() | st.lists(st.sampled_from(parts), min_size=1, unique=True).map(sorted).map(tuple))


def assert_equals_reference(case: Case) -> None:
    tolerance = TOLERANCE[case.tensors["x"].dtype]
    actual, reference = case.operation(), case.reference()
    errors = {name: rms_error(actual[name], reference[name]) for name in reference}
    assert all(error <= tolerance for error in errors.values()), f"{errors} must be at most {tolerance}"
    for name, tensor in case.tensors.items():
        assert tensor is None or actual[name].dtype == tensor.dtype, f"the gradient of {name} must have its dtype"
    assert actual["y"].dtype == case.tensors["x"].dtype


def usual_case(dtype=torch.float64, adapter_dtype=None, dropout=0.3, slices=((0, 5), (7, 9)), leading=(2, 3), **fields) -> Case:
    settings = {"bias": True, "layout": "contiguous", "expanded": False, "scaling": 1.5, "seed": 3} | fields
    return make_case(leading, 7, 11, 2, slices, dtype, adapter_dtype or dtype, dropout=dropout, **settings)
