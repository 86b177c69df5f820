"""lora_linear against the float64 run of its reference: values, every gradient, what it saves, computes and refuses."""

import itertools
import re

import pytest
import torch
from helpers import Multiplications, rms_error
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_linear_cases import TENSORS, TOLERANCE, assert_equals_reference, cases, tensors_of, usual_case
from torch.utils.checkpoint import checkpoint

from minilora.kernels import arithmetic, blocks, lora_linear_torch
from minilora.kernels.dropout import draw_seed
from minilora.kernels.lora_linear import backward, forward, lora_linear, lora_linear_reference

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


@given(ANY_SHAPE)
def test_value_and_every_gradient_equal_the_reference_for_any_shape(case):
    assert_equals_reference(case)


@pytest.mark.parametrize("multiplies", [True, False], ids=["16-bit arithmetic", "none"])
@settings(max_examples=25)
@given(case=ROUNDED)
def test_value_and_every_gradient_stay_within_rounding_of_the_float64_reference(multiplies, case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arithmetic, "multiplies", lambda dtype: multiplies or dtype.itemsize > 2)
        patch.setattr(blocks, "block_values", lambda M: 100)
        assert_equals_reference(case)


def test_backward_inside_autocast_gives_the_same_gradients(monkeypatch):
    monkeypatch.setattr(arithmetic, "multiplies", lambda dtype: False)
    case = usual_case(torch.bfloat16, torch.float32, leading=(8,))
    expected = case.operation()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = case.operation()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_without_16_bit_arithmetic_every_product_is_in_float32(monkeypatch, dropout):
    monkeypatch.setattr(arithmetic, "multiplies", lambda dtype: False)
    inputs, dy, _ = tensors_of(8, 32, 24, 4, dtype=torch.bfloat16)
    dtypes = []

    def noted(step):
        return lambda P, *others: (dtypes.append(P.dtype), step(P, *others))[1]

    for name in ("down", "outer"):
        monkeypatch.setattr(lora_linear_torch, name, noted(getattr(lora_linear_torch, name)))
    monkeypatch.setattr(lora_linear_torch, "product", noted(lora_linear_torch.product))
    x, weight, lora_A, lora_B, _ = (None if tensor is None else tensor.requires_grad_() for tensor in inputs)
    lora_linear(x, weight.requires_grad_(False), lora_A, lora_B, 1.5, None, dropout).backward(dy)
    assert dtypes == [torch.float32] * len(dtypes)
    assert len(dtypes) == 6


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
        return lora_linear_reference(x, weight, A, B, 0.7, bias, dropout, torch.tensor(11), slices)

    assert torch.autograd.gradcheck(operation, tensors)
    assert torch.autograd.gradcheck(reference, tensors)
    assert torch.autograd.gradgradcheck(reference, tensors)  # the operation refuses a second derivative, below


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
    with pytest.raises(RuntimeError, match=r"differentiated twice.*lora_linear_reference"):
        dx.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_x_s_the_mask_and_the_parameters_are_all_that_is_saved(dtype):
    tensors = usual_case(dtype, torch.float32).tensors
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        lora_linear(**tensors, scaling=1.5, dropout=0.3, slices=((0, 5), (7, 9)))
    own = {tensor.data_ptr(): name for name, tensor in tensors.items()}
    assert sorted(own[t.data_ptr()] for t in saved if t.data_ptr() in own) == ["lora_A", "lora_B", "weight", "x"]
    assert sorted((tuple(t.shape), t.dtype) for t in saved if t.data_ptr() not in own) == [((6, 4), dtype), ((6, 7), torch.bool)]


def test_inputs_and_the_incoming_gradient_are_not_overwritten():
    case = usual_case(torch.float32)
    before = {name: tensor.detach().clone() for name, tensor in case.tensors.items()} | {"dy": case.dy.clone()}
    case.operation()
    assert all(torch.equal(before[name], tensor) for name, tensor in (case.tensors | {"dy": case.dy}).items())


subsets = [names for n in range(1, 5) for names in itertools.combinations(TENSORS[:4], n)]


@pytest.mark.parametrize("wanted", subsets, ids="+".join)
def test_no_product_is_computed_that_nobody_asked_for(wanted):
    M, K, N, R = 5, 7, 11, 2
    case = usual_case(torch.float32, slices=None, leading=(M,))
    x, weight, lora_A, lora_B, bias = (case.tensors[name].detach() for name in TENSORS)
    constants = (None, 2.0, 0.0, ((0, N),))  # seed, scaling, dropout, slices
    with Multiplications() as there:
        _, s = forward(lora_linear_torch, x, weight, lora_A, lora_B, bias, *constants)
    with Multiplications() as back:
        found = backward(
            lora_linear_torch, case.dy, x, s, weight, lora_A, lora_B, *constants, [name in wanted for name in TENSORS]
        )
    assert len(found) == len(wanted)
    assert there.count == M * (N * K + R * K + N * R)
    products = {"x": M * N * K + M * R * K, "weight": M * N * K, "lora_A": M * R * K, "lora_B": M * N * R}
    t = M * N * R if {"x", "lora_A"}.intersection(wanted) else 0  # T = s · dY B serves both
    assert back.count == t + sum(products[name] for name in wanted)


@pytest.mark.parametrize("wanted", [*subsets, ("bias",), TENSORS], ids="+".join)
def test_autograd_asks_for_the_gradients_that_are_wanted_and_no_others(wanted, monkeypatch):
    case = usual_case(torch.float32)
    asked = []
    monkeypatch.setattr("minilora.kernels.lora_linear.backward", lambda *args: asked.append(args[-1]) or backward(*args))
    for name, tensor in case.tensors.items():
        tensor.requires_grad_(name in wanted)
    lora_linear(**case.tensors, scaling=1.5, slices=case.slices).backward(case.dy)
    assert asked == [[name in wanted for name in TENSORS]]
    assert {name for name, tensor in case.tensors.items() if tensor.grad is not None} == set(wanted)


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


def op_arguments(dropout: float) -> tuple:
    t = {name: tensor.detach() for name, tensor in usual_case(torch.float32).tensors.items()}
    x = t["x"].flatten(0, 1)
    seed = torch.tensor(5) if dropout else None
    return x, t["weight"], t["lora_A"], t["lora_B"], t["bias"], seed, 1.5, dropout, [0, 5, 7, 9], [], 11


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_it_is_a_torch_operation_in_order(dropout):
    torch.library.opcheck(torch.ops.minilora.lora_linear.default, op_arguments(dropout))
    x, weight, lora_A, lora_B, _, *constants, N = op_arguments(dropout)
    y, s = torch.ops.minilora.lora_linear(x, weight, lora_A, lora_B, None, *constants, N)
    for needed in [True] * 5, [False, False, True, True, False]:
        operation = torch.ops.minilora.lora_linear_backward.default
        torch.library.opcheck(operation, (y, x, s, weight, lora_A, lora_B, *constants, needed))


@pytest.mark.parametrize("slices", [None, ((0, 5), (7, 9))])
def test_compiled_without_a_break_it_gives_the_same(slices):
    case = usual_case(torch.float32, dropout=0.0, slices=slices)
    eager = case.operation()
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    y = compiled(**case.tensors, scaling=case.scaling, dropout=case.dropout, slices=slices)
    y.backward(case.dy)
    assert torch.equal(y, eager["y"])
    assert all(torch.equal(tensor.grad, eager[name]) for name, tensor in case.tensors.items())


def test_compiled_and_checkpointed_with_dropout_backward_knows_the_mask():
    case = usual_case(torch.float64, dropout=0.5, slices=None)

    def run(x, weight, lora_A, lora_B, bias):
        inner = lambda x: lora_linear(x, weight, lora_A, lora_B, case.scaling, bias, case.dropout)  # noqa: E731
        return checkpoint(inner, x, use_reentrant=False)

    x, *others = case.tensors.values()
    y = torch.compile(run, fullgraph=True, backend="aot_eager")(x, *others)
    y.backward(case.dy)
    # y is linear in x, whatever the mask: with the mask of forward in backward, x · dx is (y − bias) · dy.
    torch.testing.assert_close((x * x.grad).sum(), ((y - case.tensors["bias"]) * case.dy).sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_x_weight_and_bias_and_keeps_the_gradients_dtypes(dtype):
    case = usual_case(torch.float32, dropout=0.0)
    with torch.autocast("cpu", dtype=dtype):
        y = lora_linear(**case.tensors, scaling=case.scaling, slices=case.slices)
    y.backward(case.dy.to(dtype))
    reference = case.reference()
    assert y.dtype == dtype
    assert rms_error(y, reference["y"]) < TOLERANCE[dtype]
    for name, tensor in case.tensors.items():
        assert tensor.grad.dtype == torch.float32
        assert rms_error(tensor.grad, reference[name]) < 2 * TOLERANCE[dtype], name


def test_autocast_admits_what_it_makes_agree():
    tensors = arguments(x=torch.zeros(5, 7).half(), bias=torch.zeros(11).double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert lora_linear(**tensors).dtype == torch.bfloat16


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
        ({"lora_A": torch.zeros(2, 7, device="meta")}, "all tensors must be on one device, not on cpu and meta"),
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
