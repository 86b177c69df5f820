"""lora_linear against the float64 run of its reference: values, every gradient, what it saves, computes and refuses."""

import itertools
import re
from dataclasses import dataclass

import pytest
import torch
from helpers import Multiplications, rms_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from minilora.kernels.dropout import draw_seed
from minilora.kernels.lora_linear import lora_linear, lora_linear_reference

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
        seed = draw_seed() if self.dropout else 0
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


ANY_SHAPE = cases(
    dtypes=[(torch.float64, torch.float64)],
    leadings=st.sampled_from([(), (0,), (1,), (5,), (3, 0), (2, 3), (2, 1, 4)]),
    sizes=st.integers(1, 40),
    ranks=st.integers(1, 6),
    least_columns=1,
)
# Every intermediate has 32 numbers or more: one alone may cancel to near zero, where no rounding has a small relative error.
ROUNDED = cases(
    dtypes=[
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
    leadings=st.sampled_from([(8,), (17,), (3, 5), (2, 1, 4)]),
    sizes=st.sampled_from([24, 33, 40]),  # few, as each new shape costs oneDNN 10 ms of compilation in bfloat16
    ranks=st.sampled_from([4, 5]),
    least_columns=20,
)


def assert_equals_reference(case: Case) -> None:
    tolerance = TOLERANCE[case.tensors["x"].dtype]
    actual, reference = case.operation(), case.reference()
    errors = {name: rms_error(actual[name], reference[name]) for name in reference}
    assert all(error <= tolerance for error in errors.values()), f"{errors} must be at most {tolerance}"
    for name, tensor in case.tensors.items():
        assert tensor is None or actual[name].dtype == tensor.dtype, f"the gradient of {name} must have its dtype"
    assert actual["y"].dtype == case.tensors["x"].dtype


@given(ANY_SHAPE)
def test_value_and_every_gradient_equal_the_reference_for_any_shape(case):
    assert_equals_reference(case)


@settings(max_examples=25)
@given(ROUNDED)
def test_value_and_every_gradient_stay_within_rounding_of_the_float64_reference(case):
    assert_equals_reference(case)


def usual_case(dtype=torch.float64, adapter_dtype=None, dropout=0.3, slices=((0, 5), (7, 9)), leading=(2, 3), **fields) -> Case:
    settings = {"bias": True, "layout": "contiguous", "expanded": False, "scaling": 1.5, "seed": 3} | fields
    return make_case(leading, 7, 11, 2, slices, dtype, adapter_dtype or dtype, dropout=dropout, **settings)


def test_the_measure_rejects_zeros_and_nan():
    for name, expected in usual_case().reference().items():
        assert rms_error(torch.zeros_like(expected), expected) > 100 * max(TOLERANCE.values()), name
        assert not rms_error(torch.full_like(expected, torch.nan), expected) <= 1, name


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("slices", [None, ((0, 4), (6, 9))])
def test_gradients_of_operation_and_reference_agree_with_finite_differences(dropout, slices):
    tensors = list(usual_case(slices=slices).tensors.values())

    def operation(x, weight, A, B, bias):
        torch.manual_seed(5)
        return lora_linear(x, weight, A, B, 0.7, bias, dropout, slices)

    def reference(x, weight, A, B, bias):
        return lora_linear_reference(x, weight, A, B, 0.7, bias, dropout, 11, slices)

    assert torch.autograd.gradcheck(operation, tensors)
    assert torch.autograd.gradcheck(reference, tensors)


@pytest.mark.parametrize("function", [lora_linear, lora_linear_reference])
def test_slice_g_takes_the_g_th_r_rows_of_a_and_its_own_rows_of_b(function):
    t = usual_case().tensors  # R = 2, columns 0..5 and 7..9 of 11
    products = {
        (0, 5): t["x"] @ t["lora_A"][:2].T @ t["lora_B"][:5].T,
        (7, 9): t["x"] @ t["lora_A"][2:].T @ t["lora_B"][5:].T,
    }
    expected = t["x"] @ t["weight"].T + t["bias"]
    for (start, stop), product in products.items():
        expected[..., start:stop] += 1.5 * product
    torch.testing.assert_close(function(**t, scaling=1.5, slices=((0, 5), (7, 9))), expected)


def test_columns_outside_the_slices_are_those_of_the_frozen_layer_bit_for_bit():
    case = usual_case(torch.float32)
    y = case.operation()["y"]
    frozen = torch.nn.functional.linear(case.tensors["x"], case.tensors["weight"], case.tensors["bias"])
    outside = [5, 6, 9, 10]
    assert torch.equal(y[..., outside], frozen[..., outside])
    assert (y != frozen)[..., [0, 1, 2, 3, 4, 7, 8]].all()


def test_a_second_derivative_is_refused():
    tensors = usual_case(slices=None).tensors
    (dx,) = torch.autograd.grad(lora_linear(**tensors, scaling=1.0).sum() ** 2, tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_x_s_and_the_parameters_are_all_that_is_saved(dtype):
    tensors = usual_case(dtype, torch.float32).tensors
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        lora_linear(**tensors, scaling=1.5, dropout=0.3, slices=((0, 5), (7, 9)))
    own = {tensor.data_ptr(): name for name, tensor in tensors.items()}
    assert sorted(own.get(tensor.data_ptr(), "s") for tensor in saved) == ["lora_A", "lora_B", "s", "weight", "x"]
    (s,) = (tensor for tensor in saved if tensor.data_ptr() not in own)
    assert s.shape == (6, 4)  # (M, G·R)
    assert s.dtype == dtype


def test_inputs_and_the_incoming_gradient_are_not_overwritten():
    case = usual_case(torch.float32)
    before = {name: tensor.detach().clone() for name, tensor in case.tensors.items()} | {"dy": case.dy.clone()}
    case.operation()
    assert all(torch.equal(before[name], tensor) for name, tensor in (case.tensors | {"dy": case.dy}).items())


subsets = [set(names) for n in range(1, 5) for names in itertools.combinations(TENSORS[:4], n)]


@pytest.mark.parametrize("wanted", subsets, ids="+".join)
def test_backward_computes_no_product_that_nobody_asked_for(wanted):
    M, K, N, R = 5, 7, 11, 2
    tensors = usual_case(torch.float32, slices=None, leading=(M,)).tensors
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in wanted)
    with Multiplications() as forward:
        y = lora_linear(**tensors, scaling=2.0)
    with Multiplications() as backward:
        y.sum().backward()
    assert forward.count == M * (N * K + R * K + N * R)
    products = {"x": M * N * K + M * R * K, "weight": M * N * K, "lora_A": M * R * K, "lora_B": M * N * R}
    t = M * N * R if wanted & {"x", "lora_A"} else 0  # T = s · dY B serves both
    assert backward.count == t + sum(products[name] for name in wanted)
    assert {name for name, tensor in tensors.items() if tensor.grad is not None} == wanted


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_replays_the_same_dropout(use_reentrant):
    case = usual_case(torch.float32, dropout=0.5)
    plain = case.operation()
    torch.manual_seed(case.seed)
    y = checkpoint(
        lambda *tensors: lora_linear(*tensors[:4], case.scaling, tensors[4], case.dropout, case.slices),
        *(case.tensors[name] for name in TENSORS),
        use_reentrant=use_reentrant,
    )
    torch.rand(3)  # what a training step does between forward and backward
    y.backward(case.dy)
    assert torch.equal(y, plain["y"])
    for name, tensor in case.tensors.items():
        assert torch.equal(tensor.grad, plain[name]), name


@pytest.mark.parametrize(("dropout", "draws"), [(0.0, 0), (0.5, 1)])
def test_one_call_draws_one_seed_and_without_dropout_none(dropout, draws):
    tensors = usual_case().tensors
    torch.manual_seed(0)
    for _ in range(draws):
        draw_seed()
    expected = torch.get_rng_state()
    torch.manual_seed(0)
    lora_linear(**tensors, scaling=1.0, dropout=dropout, slices=((0, 5), (7, 9)))
    assert torch.equal(torch.get_rng_state(), expected)


def arguments(**replaced) -> dict:
    M, K, N, R = 5, 7, 11, 2
    fitting = {
        "x": torch.zeros(M, K),
        "weight": torch.zeros(N, K),
        "lora_A": torch.zeros(R, K),
        "lora_B": torch.zeros(N, R),
        "scaling": 1.0,
        "bias": torch.zeros(N),
    }
    return fitting | replaced


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"x": torch.zeros(5, 6)}, "x must end in K = 7 features, not (5, 6)"),
        ({"x": torch.zeros(5, 7).half()}, "x and weight must share a dtype, not torch.float16 and torch.float32: cast x"),
        ({"lora_A": torch.zeros(3, 7)}, "lora_A must be (G·R, K) = (2, 7), not (3, 7)"),
        ({"lora_A": torch.zeros(7)}, "lora_A must be (G·R, K) = (2, 7), not (7,)"),
        ({"lora_B": torch.zeros(10, 2)}, "lora_B must be (width of the slices, R) = (11, 2), not (10, 2)"),
        ({"slices": ((0, 3), (5, 8))}, "lora_A must be (G·R, K) = (4, 7), not (2, 7)"),
        ({"slices": ((0, 3), (5, 8))}, "lora_B must be (width of the slices, R) = (6, 2), not (11, 2)"),
        ({"slices": ((5, 8), (0, 3))}, "slices must ascend without overlap within 0..11, not ((5, 8), (0, 3))"),
        ({"slices": ((0, 6), (5, 8))}, "slices must ascend without overlap within 0..11"),
        ({"slices": ((0, 12),)}, "slices must ascend without overlap within 0..11"),
        ({"slices": ((-1, 4),)}, "slices must ascend without overlap within 0..11"),
        ({"slices": ((4, 3),)}, "slices must ascend without overlap within 0..11"),
        ({"bias": torch.zeros(7)}, "bias must be (N,) = (11,), not (7,)"),
        ({"dropout": 1.0}, "dropout must lie in [0, 1), not 1.0"),
        ({"dropout": -0.1}, "dropout must lie in [0, 1), not -0.1"),
        ({"dropout": float("nan")}, "dropout must lie in [0, 1), not nan"),
        # The docstring promises these dtypes: nothing else may come in silently.
        ({"bias": torch.zeros(11).double()}, "bias"),
        ({"lora_A": torch.zeros(2, 7).int()}, "lora_A"),
        ({"lora_B": torch.zeros(11, 2).int()}, "lora_B"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(replaced, message):
    with pytest.raises(ValueError, match="^lora_linear: .*" + re.escape(message)):
        lora_linear(**arguments(**replaced))


def test_all_faults_are_told_at_once():
    replaced = {
        "x": torch.zeros(5, 6).half(), "lora_A": torch.zeros(3, 3), "lora_B": torch.zeros(3, 5), "bias": torch.zeros(1),
        "dropout": 2.0, "slices": ((9, 8),),
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"^lora_linear: ") as raised:
        lora_linear(**arguments(**replaced))
    assert [fault.split(" must")[0] for fault in str(raised.value).removeprefix("lora_linear: ").split("; ")] == [
        "x", "x and weight", "slices", "lora_A", "lora_B", "bias", "dropout",
    ]  # fmt: skip


def test_the_arguments_of_these_refusals_fit_otherwise():
    assert lora_linear(**arguments()).shape == (5, 11)
