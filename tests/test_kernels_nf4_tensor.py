"""A 4-bit weight in a weight's place: the same results as with what it dequantises to, in less memory."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import rms_error
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_linear_cases import TOLERANCE, cases, usual_case
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from minilora.adapters.layers import Linear
from minilora.kernels import blocks, lora_linear_torch, nf4_tensor
from minilora.kernels.dropout import draw_seed
from minilora.kernels.lora_linear import backward, forward, lora_linear, lora_linear_reference
from minilora.kernels.nf4 import compress, dequantize_blocks, expand, quantize_blocks
from minilora.kernels.nf4_tensor import NF4Tensor, linear

matrices = st.tuples(st.integers(1, 40), st.integers(1, 70))


@pytest.fixture(autouse=True)
def blocks_of_few_rows(monkeypatch):
    """The tests' weights are tiny: in blocks of their true size each would be one."""
    monkeypatch.setattr(blocks, "block_values", lambda M: 100)


def random_weight(N=11, K=7, dtype=torch.float32):
    return torch.randn(N, K, generator=torch.Generator().manual_seed(N * K)).to(dtype)


def four_bit_layer(N=11, K=7, dtype=torch.float32) -> nn.Linear:
    layer = nn.Linear(K, N, dtype=dtype)
    layer.weight = nn.Parameter(NF4Tensor.quantize(random_weight(N, K, dtype)), requires_grad=False)
    return layer


def dequantised(layer: nn.Linear) -> nn.Linear:
    layer = copy.deepcopy(layer)
    layer.weight = nn.Parameter(layer.weight.dequantize(), requires_grad=False)
    return layer


@given(matrices, st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]), st.integers(1, 500))
def test_any_blocks_of_rows_are_those_of_the_flat_law(shape, dtype, values):
    weight = random_weight(*shape, dtype)
    codes, absmax = quantize_blocks(weight.flatten())
    expected = dequantize_blocks(codes, expand(*compress(absmax)), weight.numel(), dtype).view(shape)
    quantised = NF4Tensor.quantize(weight)
    assert (quantised.shape, quantised.dtype, quantised.device) == (weight.shape, weight.dtype, weight.device)
    assert torch.equal(quantised.dequantize(), expected)
    assert torch.equal(quantised.t().dequantize(), expected.T)
    blocks = [(rows, found.clone()) for rows, found in quantised.row_blocks(values)]
    assert torch.equal(torch.cat([rows for _, rows in blocks]), expected)
    assert all(torch.equal(expected[rows], found) for rows, found in blocks)


def test_quantised_in_chunks_it_is_the_same(monkeypatch):
    weight = random_weight(37, 41)
    whole = NF4Tensor.quantize(weight)
    monkeypatch.setattr(nf4_tensor, "CHUNK", 128)
    for part, same in zip(NF4Tensor.quantize(weight).parts, whole.parts, strict=True):
        assert torch.equal(part, same)


@pytest.mark.parametrize("weight", [torch.ones(4), torch.ones(2, 2).int(), torch.ones(0, 3), torch.ones(1, 2, 3)])
def test_what_is_no_floating_matrix_is_not_quantised(weight):
    with pytest.raises(ValueError, match=r"stands for a floating \(N, K\) matrix, not torch"):
        NF4Tensor.quantize(weight)


@pytest.mark.parametrize("leading", [(), (0,), (5,), (2, 3)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_plain_layer_and_its_gradients_are_those_of_the_dequantised_weight(leading, bias, dtype):
    layer = four_bit_layer(33, 40, dtype)
    plain = dequantised(layer).double()
    x = torch.randn(*leading, 40).to(dtype).requires_grad_()
    y = F.linear(x, layer.weight, layer.bias if bias else None)
    expected = F.linear(x.double(), plain.weight, layer.bias.double() if bias else None)
    dy = torch.randn_like(y)
    wanted = (x, layer.bias) if bias else (x,)
    found = [y, *torch.autograd.grad(y, wanted, dy)]
    for actual, exact in zip(found, [expected, *torch.autograd.grad(expected, wanted, dy.double())], strict=True):
        assert actual.dtype == dtype
        assert rms_error(actual, exact) <= TOLERANCE[dtype]


@torch.inference_mode()
def test_a_plain_layer_gives_the_same_in_inference_mode():
    layer, x = four_bit_layer(), torch.randn(3, 7)
    torch.testing.assert_close(layer(x), dequantised(layer)(x))


def run(function, tensors, weight, case, dy, **more):
    """y and the gradients of x, lora_A, lora_B and bias."""
    torch.manual_seed(case.seed)
    y = function(**tensors | {"weight": weight}, scaling=case.scaling, dropout=case.dropout, slices=case.slices, **more)
    wanted = {name: tensor for name, tensor in tensors.items() if name != "weight" and tensor is not None}
    return {"y": y} | dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), dy), strict=True))


DTYPES = [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16,) * 2]
SOME = cases(
    dtypes=DTYPES,
    leadings=st.sampled_from([(8,), (17,), (2, 1, 4)]),
    sizes=st.sampled_from([24, 33, 64]),
    ranks=st.sampled_from([4, 5]),
    least_columns=20,
)


@settings(max_examples=25)
@given(SOME)
def test_lora_linear_and_every_gradient_are_those_of_the_dequantised_weight(case):
    weight = NF4Tensor.quantize(case.tensors["weight"])
    double = {name: None if t is None else t.detach().double().requires_grad_() for name, t in case.tensors.items()}
    actual = run(lora_linear, case.tensors, weight, case, case.dy)
    torch.manual_seed(case.seed)
    seed = draw_seed()  # the one that lora_linear draws
    exact = run(lora_linear_reference, double, weight.dequantize().double(), case, case.dy.double(), seed=seed)
    for name, tensor in exact.items():
        assert rms_error(actual[name], tensor) <= TOLERANCE[case.tensors["x"].dtype], name


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("slices", [None, ((0, 5), (7, 9))])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lora_linear_is_the_same_operation_as_on_a_plain_weight(dropout, slices, dtype):
    case = usual_case(dtype, slices=slices, dropout=dropout)
    weight = NF4Tensor.quantize(case.tensors["weight"])
    actual = run(lora_linear, case.tensors, weight, case, case.dy)
    for name, tensor in run(lora_linear, case.tensors, weight.dequantize(), case, case.dy).items():
        assert rms_error(actual[name], tensor) <= TOLERANCE[dtype], name


def test_x_s_and_four_bits_are_saved_and_no_wider_weight():
    case = usual_case(torch.float32, dropout=0.0)
    weight, saved = NF4Tensor.quantize(case.tensors["weight"]), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        lora_linear(**case.tensors | {"weight": weight}, scaling=1.5, slices=case.slices)
    own = {t.data_ptr(): name for name, t in case.tensors.items()} | {t.data_ptr(): "parts" for t in weight.parts}
    assert sorted(own.get(tensor.data_ptr(), "s") for tensor in saved) == ["lora_A", "lora_B", *["parts"] * 4, "s", "x"]


class LargestFloatTensor(TorchDispatchMode):
    """The numbers in the largest floating tensor that any operation under it makes; views are not made."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        tensors = [each for each in (result, *args) if type(each) is torch.Tensor]
        memory = [each.untyped_storage().data_ptr() for each in tensors]
        if tensors and tensors[0] is result and result.is_floating_point() and memory[0] not in memory[1:]:
            self.numbers = max(self.numbers, result.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_the_weights_size_is_made(dtype):
    M, N, K, R = 3, 128, 192, 2
    weight = NF4Tensor.quantize(random_weight(N, K, dtype))
    x, dy, A, B = (torch.randn(shape).to(dtype) for shape in [(M, K), (M, N), (R, K), (N, R)])
    constants = (None, 1.0, 0.0, ((0, N),))
    with LargestFloatTensor() as made:
        _, s = forward(lora_linear_torch, x, weight, A, B, None, *constants)
        backward(lora_linear_torch, dy, x, s, weight, A, B, *constants, [True, False, True, True, False])
    assert 0 < made.numbers <= max(M * N, M * K, N * K // 64, K + 128)  # results, scales, a row and its blocks' ends


def test_quantising_makes_little_beside_the_result(monkeypatch):
    monkeypatch.setattr(nf4_tensor, "CHUNK", 256)
    weight = random_weight(64, 64, torch.bfloat16)
    with LargestFloatTensor() as made:
        NF4Tensor.quantize(weight)
    assert 0 < made.numbers <= 256


def test_an_adapter_goes_around_a_four_bit_layer_and_learns_the_same():
    layer = four_bit_layer(33, 40)
    results = []
    for base in layer, dequantised(layer):
        torch.manual_seed(0)
        adapted = Linear.around(base, torch.float32, r=4)
        nn.init.normal_(adapted.lora_B)
        y = adapted(torch.randn(5, 40))
        y.square().sum().backward()
        results.append((y, adapted.lora_A.grad, adapted.lora_B.grad, adapted.bias.grad))
        assert adapted.weight is base.weight
    for four, plain in zip(*results, strict=True):
        assert rms_error(four, plain) < 1e-6


def call(layer, x):
    return layer(x)


@pytest.mark.parametrize("adapted", [False, True])
def test_compiled_without_a_break_and_checkpointed_it_gives_the_same(adapted):
    layer, x = four_bit_layer(), torch.randn(3, 7, requires_grad=True)
    if adapted:
        layer = Linear.around(layer, torch.float32, r=2)
        nn.init.normal_(layer.lora_B)
    y = layer(x)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    again = torch.compile(lambda layer, x: checkpoint(layer, x, use_reentrant=False), fullgraph=True, backend="aot_eager")
    for function in compiled, again, lambda layer, x: checkpoint(layer, x, use_reentrant=True):
        other = function(layer, x)
        assert torch.equal(other, y)
        x.grad = None
        other.square().sum().backward()
        assert torch.equal(x.grad, dx)


def test_they_are_torch_operations_in_order():
    case = usual_case(torch.float32, dropout=0.0)
    weight = NF4Tensor.quantize(case.tensors["weight"])
    x, A, B, bias = (case.tensors[name].detach() for name in ("x", "lora_A", "lora_B", "bias"))
    x, constants = x.flatten(0, 1), (None, 1.5, 0.0, [0, 5, 7, 9], weight.parts[1:])
    for transposed, input_, bias_ in (False, x, bias), (False, x, None), (True, torch.randn(3, 11), None):
        torch.library.opcheck(torch.ops.minilora.nf4_linear, (input_, weight.parts, [11, 7], transposed, bias_))
    torch.library.opcheck(torch.ops.minilora.lora_linear, (x, weight.codes, A, B, bias, *constants, 11))
    y, s = torch.ops.minilora.lora_linear(x, weight.codes, A, B, bias, *constants, 11)
    needed = [True, False, True, True, True]
    torch.library.opcheck(torch.ops.minilora.lora_linear_backward, (y, x, s, weight.codes, A, B, *constants, needed))


@pytest.mark.parametrize("adapted", [False, True])
def test_autocast_rounds_as_it_does_with_a_plain_weight(adapted):
    layer, x = four_bit_layer(33, 40), torch.randn(8, 40, requires_grad=True)
    plain = dequantised(layer)
    if adapted:
        layer, plain = (Linear.around(each, torch.float32, r=2) for each in (layer, plain))
    results = []
    for each in layer, plain:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = each(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, each.bias))))
    for four, expected in zip(*results, strict=True):
        assert four.dtype == expected.dtype
        assert rms_error(four, expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_dtype_changes_what_it_dequantises_to_and_never_expands_it(dtype):
    layer = four_bit_layer()
    codes, exact = layer.weight.codes, layer.weight.dequantize()
    layer.to(dtype)
    assert isinstance(layer.weight, NF4Tensor)
    assert isinstance(layer.weight, nn.Parameter)
    assert not layer.weight.requires_grad
    assert (layer.weight.dtype, layer.bias.dtype) == (dtype, dtype)
    assert torch.equal(layer.weight.codes, codes)
    assert torch.equal(layer.weight.dequantize(), exact.to(dtype))
    assert layer(torch.randn(2, 7).to(dtype)).dtype == dtype
    assert torch.equal(layer.to(torch.float32).weight.dequantize(), exact)  # the scales kept what the narrow dtype had not


def test_a_model_moves_to_another_device_with_all_that_is_inside():
    layer = four_bit_layer().to("meta")
    assert layer.weight.device.type == "meta"
    assert {part.device.type for part in layer.weight.parts} == {"meta"}
    with pytest.raises(ValueError, match=r"all tensors must be on one device"):
        lora_linear(torch.ones(1, 7), layer.weight, torch.ones(1, 7), torch.ones(11, 1), 1.0)


def test_copies_and_state_dicts_hold_the_same_four_bits_of_their_own():
    layer = four_bit_layer()
    deep, clone, empty = copy.deepcopy(layer), layer.weight.clone(), four_bit_layer()
    empty.weight.codes.zero_()
    empty.load_state_dict(layer.state_dict())
    assigned = four_bit_layer()
    assigned.load_state_dict(layer.state_dict(), assign=True)
    for weight in deep.weight, clone, empty.weight, assigned.weight:
        assert isinstance(weight, NF4Tensor)
        assert torch.equal(weight.dequantize(), layer.weight.dequantize())
    assert isinstance(deep.weight, nn.Parameter)
    owners = itertools.chain(layer.weight.parts, deep.weight.parts, clone.parts, empty.weight.parts)
    assert len({part.data_ptr() for part in owners}) == 16


def test_it_prints_its_shape_and_no_numbers():
    assert repr(four_bit_layer().weight) == "NF4Tensor((11, 7), dtype=torch.float32, device=cpu)"


@pytest.mark.parametrize(
    "operation",
    [
        lambda weight: weight + 1,
        lambda weight: weight[0],
        lambda weight: weight.sum(),
        lambda weight: torch.cat([weight, weight]),
        lambda weight: weight.add_(1),
        lambda weight: torch.ones(11, 7).copy_(weight),
        lambda weight: weight.clone().copy_(torch.ones(11, 7)),
        lambda weight: weight @ torch.ones(7, 2),
        lambda weight: F.linear(weight, weight),
    ],
)
def test_what_it_cannot_do_is_refused_and_says_what_to_do(operation):
    with pytest.raises(NotImplementedError, match=r"dequantize\(\)"):
        operation(four_bit_layer().weight)


def test_a_gradient_of_it_is_refused():
    weight, adapter = NF4Tensor.quantize(random_weight()), (torch.ones(1, 7), torch.ones(11, 1), 1.0)
    with pytest.raises(ValueError, match=r"frozen and has no gradient: nn.Parameter\(weight, requires_grad=False\)"):
        nn.Parameter(weight)
    with pytest.raises(ValueError, match="must be frozen"):
        lora_linear(torch.ones(1, 7), weight.t(), torch.ones(1, 11), torch.ones(7, 1), 1.0)
    weight.requires_grad = True
    with pytest.raises(ValueError, match="must be frozen, requires_grad=False"):
        lora_linear(torch.ones(1, 7), weight, *adapter)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool])
def test_it_stands_for_no_integers(dtype):
    with pytest.raises(ValueError, match="stands for floating numbers, not torch"):
        four_bit_layer().weight.to(dtype)


def test_x_of_another_dtype_is_refused():
    layer = four_bit_layer(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"must share a dtype, not torch.float32 and torch.bfloat16.*cast x"):
        F.linear(torch.ones(1, 7), layer.weight)
    with pytest.raises(ValueError, match=r"must share a dtype, not torch.float32 and torch.bfloat16: cast x"):
        lora_linear(torch.ones(1, 7), layer.weight, torch.ones(1, 7), torch.ones(11, 1), 1.0)


def test_the_transposed_weight_multiplies_too():
    weight, x, bias = NF4Tensor.quantize(random_weight()), torch.randn(3, 11), torch.randn(7)
    torch.testing.assert_close(linear(x, weight.t(), bias), F.linear(x, weight.dequantize().t(), bias))
    torch.testing.assert_close(x @ weight, x @ weight.dequantize())
