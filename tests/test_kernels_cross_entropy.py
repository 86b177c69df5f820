"""head_cross_entropy against the float64 run of its reference: loss, gradients, memory, and what it refuses."""

import copy
import math

import pytest
import torch
from helpers import multiplications, peak_bytes, rms_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from minilora.kernels import cross_entropy
from minilora.kernels.cross_entropy import CHUNK, IGNORE, cross_entropy_reference, head_cross_entropy, losses_and_dlogits_
from minilora.kernels.linear import Linear

C, V = 24, 40


@pytest.fixture(scope="module", autouse=True)
def _small_chunks():
    """Of CHUNK rows, however few logits they have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "LOGITS", 1)
        yield


TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2}


def linear_head():
    return nn.Linear(C, V, bias=False)


def biased_head():
    return nn.Linear(C, V)


def frozen_head():
    return linear_head().requires_grad_(False)


def deep_head():
    return nn.Sequential(nn.Linear(C, 16), nn.Tanh(), nn.Linear(16, V, bias=False))


def partly_frozen_head():
    head = deep_head()
    head[0].requires_grad_(False)
    return head


def phi3_head():
    return Linear(C, V, bias=False).requires_grad_(False)


HEADS = [linear_head, biased_head, frozen_head, phi3_head, deep_head, partly_frozen_head]


def make_inputs(make_head, n, dtype, seed=0, ignored=0.3):
    torch.manual_seed(seed)
    head = make_head().to(dtype)
    x = torch.randn(n, C).to(dtype).requires_grad_()
    labels = torch.where(torch.rand(n) < ignored, IGNORE, torch.randint(V, (n,)))
    labels[n // 2] = 1  # one target at least
    return head, x, labels


def loss_and_gradients(loss_of, head, x, labels, scale):
    loss = loss_of(head, x, labels)
    wanted = {name: p for name, p in head.named_parameters() if p.requires_grad} | ({"x": x} if x.requires_grad else {})
    return {"loss": loss} | dict(zip(wanted, torch.autograd.grad(loss * scale, list(wanted.values())), strict=True))


@settings(max_examples=40)
@given(
    st.sampled_from(HEADS),
    st.sampled_from([1, 2, 7, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5]),
    st.sampled_from(list(TOLERANCE)),
    st.sampled_from([1.0, 0.25]),
    st.sampled_from([0.0, 0.3, 0.9]),
    st.integers(0, 2**31),
)
def test_loss_and_every_gradient_equal_the_float64_reference(make_head, n, dtype, scale, ignored, seed):
    head, x, labels = make_inputs(make_head, n, dtype, seed, ignored)
    double = (copy.deepcopy(head).double(), x.detach().double().requires_grad_(), labels)
    actual = loss_and_gradients(head_cross_entropy, head, x, labels, scale)
    reference = loss_and_gradients(cross_entropy_reference, *double, scale)
    errors = {name: rms_error(actual[name], reference[name]) for name in reference}
    assert all(error <= TOLERANCE[dtype] for error in errors.values()), f"{errors} must be at most {TOLERANCE[dtype]}"
    assert actual["loss"].dtype == torch.promote_types(dtype, torch.float32)
    assert actual["loss"].shape == ()


def test_the_softmax_of_bfloat16_logits_runs_in_float32():
    head, x, labels = make_inputs(linear_head, 3 * CHUNK, torch.bfloat16, ignored=0.0)
    logits = torch.cat([head(rows) for rows in x.split(CHUNK)]).double()
    assert rms_error(head_cross_entropy(head, x, labels), torch.nn.functional.cross_entropy(logits, labels)) < 1e-6


def test_the_measure_rejects_zeros():
    for name, expected in loss_and_gradients(cross_entropy_reference, *make_inputs(deep_head, 30, torch.float64), 1.0).items():
        assert rms_error(torch.zeros_like(expected), expected) > 50 * max(TOLERANCE.values()), name


@pytest.mark.parametrize("make_head", HEADS)
def test_gradients_agree_with_finite_differences(make_head):
    head, x, labels = make_inputs(make_head, 5, torch.float64)
    loss = nn.Module()
    loss.head = head
    loss.forward = lambda x, labels: head_cross_entropy(head, x, labels)
    parameters = {name: p for name, p in loss.named_parameters() if p.requires_grad}

    def loss_of(x, *values):
        return functional_call(loss, dict(zip(parameters, values, strict=True)), (x, labels))

    assert torch.autograd.gradcheck(loss_of, [x, *parameters.values()], fast_mode=True)


def test_the_head_never_sees_more_rows_than_a_chunk_and_no_ignored_one():
    class Recorder(nn.Linear):
        rows: list[int]

        def forward(self, x):
            self.rows.append(len(x))
            return super().forward(x)

    head, x, labels = make_inputs(lambda: Recorder(C, V), 4 * CHUNK, torch.float32)
    head.rows = []
    head_cross_entropy(head, x, labels).backward()
    assert max(head.rows) <= CHUNK
    assert sum(head.rows) == int((labels != IGNORE).sum())  # once each: forward's logits serve backward too


def test_a_small_vocabulary_has_chunks_of_more_rows_on_a_cpu(monkeypatch):
    monkeypatch.setattr(cross_entropy, "LOGITS", 2**24)
    assert [cross_entropy.chunk_rows(2**11, "cpu", V) for V in (200064, 32064, 8192)] == [256, 512, 2048]
    assert cross_entropy.chunk_rows(2**11, "cpu") == 256
    assert cross_entropy.chunk_rows(2**11, "cuda", 32064) == cross_entropy.chunk_rows(2**11, "cuda") == 1024


@given(st.integers(1, 10**6), st.sampled_from(["cpu", "cuda"]), st.integers(1, 300_000))
def test_chunks_are_as_few_as_can_be_and_of_one_size(n, device, V):
    most, rows = cross_entropy.chunk_rows(2**40, device, V), cross_entropy.chunk_rows(n, device, V)
    sizes = [len(chunk) for chunk in torch.empty(n).split(rows)]
    assert max(sizes) <= most
    assert len(sizes) == math.ceil(n / most)
    assert max(sizes) - min(sizes) < len(sizes)  # all full but the last, which lacks less than a row of each


def test_nothing_of_the_size_of_the_logits_is_kept_for_backward():
    head, x, labels = make_inputs(linear_head, 4 * CHUNK, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        head_cross_entropy(head, x, labels)
    assert max(tensor.numel() for tensor in saved) <= x.numel() < len(x) * V


@pytest.mark.parametrize("make_head", [frozen_head, partly_frozen_head])
@pytest.mark.parametrize(("dtype", "bytes_each"), [(torch.float32, 4), (torch.bfloat16, 6)])
def test_one_chunk_of_logits_exists_at_a_time_and_becomes_its_gradient(make_head, dtype, bytes_each, monkeypatch):
    monkeypatch.setattr("test_kernels_cross_entropy.V", 2000)
    head, x, labels = make_inputs(make_head, 4 * CHUNK, dtype, ignored=0.0)
    logits = CHUNK * 2000 * bytes_each  # those in 16 bits beside a copy in float32
    assert logits < peak_bytes(lambda: head_cross_entropy(head, x, labels).backward()) < 1.3 * logits


def test_rows_without_a_target_take_part_in_no_product():
    head, x, labels = make_inputs(frozen_head, 2 * CHUNK, torch.float32, ignored=0.5)
    assert multiplications(lambda: head_cross_entropy(head, x, labels)) == 2 * int((labels != IGNORE).sum()) * C * V


@pytest.mark.parametrize(
    ("make_head", "x_wanted", "products"),
    [(linear_head, True, 3), (frozen_head, True, 2), (linear_head, False, 2), (frozen_head, False, 1)],
)
def test_only_the_gradients_asked_for_are_computed(make_head, x_wanted, products):
    head, x, labels = make_inputs(make_head, CHUNK + 3, torch.float32, ignored=0.0)
    x.requires_grad_(x_wanted)
    assert multiplications(lambda: head_cross_entropy(head, x, labels)) == products * len(x) * C * V


def test_evaluation_without_gradients_costs_the_logits_only():
    head, x, labels = make_inputs(linear_head, CHUNK + 3, torch.float32, ignored=0.0)
    with torch.no_grad():
        loss = head_cross_entropy(head, x, labels)
        assert multiplications(lambda: head_cross_entropy(head, x, labels)) == len(x) * C * V
    assert not loss.requires_grad
    assert rms_error(loss, cross_entropy_reference(head, x, labels)) < 1e-6


def test_ignored_rows_get_exactly_no_gradient():
    head, x, labels = make_inputs(linear_head, 50, torch.float32)
    head_cross_entropy(head, x, labels).backward()
    assert (x.grad[labels == IGNORE] == 0).all()
    assert (x.grad[labels != IGNORE] != 0).all()


def test_a_second_derivative_is_refused():
    head, x, labels = make_inputs(linear_head, 5, torch.float32)
    (dx,) = torch.autograd.grad(head_cross_entropy(head, x, labels) ** 2, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


def test_gradients_of_several_backward_passes_add_up():
    head, x, labels = make_inputs(linear_head, 5, torch.float32)
    head_cross_entropy(head, x, labels).backward()
    once = head.weight.grad.clone()
    head_cross_entropy(head, x, labels).backward()
    torch.testing.assert_close(head.weight.grad, 2 * once)


@pytest.mark.parametrize("n", [0, 5])
def test_labels_that_are_all_ignored_are_an_error(n):
    with pytest.raises(ValueError, match=r"every label is -100 \(ignored\): a loss needs at least one target token"):
        head_cross_entropy(linear_head(), torch.randn(n, C), torch.full((n,), IGNORE))


class TransposedHead(nn.Module):
    """Its logits are no contiguous matrix."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(C, V))

    def forward(self, x):
        return (self.weight.T @ x.T).T


def hooked_head():
    head = linear_head()
    head.register_forward_hook(lambda module, arguments, logits: 2 * logits)
    return head


@pytest.mark.parametrize("make_head", [TransposedHead, hooked_head])
def test_whatever_makes_the_logits_is_followed(make_head):
    head, x, labels = make_inputs(make_head, 50, torch.float64)
    found, expected = (loss_and_gradients(run, head, x, labels, 1.0) for run in (head_cross_entropy, cross_entropy_reference))
    assert all(rms_error(found[name], expected[name]) < 1e-13 for name in expected)


@pytest.mark.parametrize("make_head", [linear_head, deep_head])
def test_autocast_reaches_the_head(make_head):
    head, x, labels = make_inputs(make_head, 50, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (loss_and_gradients(run, head, x, labels, 1.0) for run in (head_cross_entropy, cross_entropy_reference))
    assert rms_error(found["loss"], expected["loss"]) < 1e-6 < rms_error(found["loss"], cross_entropy_reference(head, x, labels))
    assert all(rms_error(found[name], expected[name]) < 1e-2 for name in expected)


@pytest.mark.parametrize("make_head", [frozen_head, biased_head, phi3_head])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_break_it_gives_the_same(make_head, dynamic):
    head, x, labels = make_inputs(make_head, CHUNK + 3, torch.float32)
    torch.compiler.reset()  # of what the other heads compiled to: eight forms of a function are the limit
    compiled = torch.compile(head_cross_entropy, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    found, expected = (loss_and_gradients(run, head, x, labels, 0.5) for run in (compiled, head_cross_entropy))
    assert all(rms_error(found[name], expected[name]) < 1e-6 for name in expected)
    with torch.no_grad():
        assert rms_error(compiled(head, x, labels), expected["loss"]) < 1e-6
    with pytest.raises(ValueError, match="a loss needs at least one target token"):
        compiled(head, x, torch.full_like(labels, IGNORE))


def test_they_are_torch_operations_in_order():
    head, x, labels = make_inputs(biased_head, 7, torch.float32)
    x, weight, bias = (tensor.detach() for tensor in (x, head.weight, head.bias))
    torch.library.opcheck(torch.ops.minilora.count_targets.default, (labels,))
    torch.library.opcheck(torch.ops.minilora.cross_entropy_.default, (head(x).detach(), labels))
    for needed, last in (([True, True, True], bias), ([True, False, False], None)):
        torch.library.opcheck(torch.ops.minilora.linear_cross_entropy.default, (labels, needed, x, weight, last))


def test_logits_far_out_give_finite_gradients_and_no_probability_to_minus_infinity():
    logits = torch.tensor([[float("-inf"), 1.0, 2.0], [3e4, -3e4, 0.0], [1.0, 2.0, 3.0]])
    losses = losses_and_dlogits_(logits, torch.tensor([2, 1, IGNORE]))
    assert losses.tolist() == pytest.approx([0.3132617, 6e4, 0.0])
    torch.testing.assert_close(logits, torch.tensor([[0.0, 0.2689414, -0.2689414], [1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]))
