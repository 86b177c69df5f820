"""A plain linear layer with a weight of any kind: F.linear, on CPUs that multiply 16-bit numbers and on those that do not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import rms_error
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import minilora as lora
from minilora.kernels import arithmetic, blocks
from minilora.kernels.linear import Linear, linear, product
from minilora.kernels.nf4_tensor import NF4Tensor

HALVES = [torch.bfloat16, torch.float16]
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # RMS error allowed: the largest of one rounding


@pytest.fixture(autouse=True)
def blocks_of_few_rows(monkeypatch):
    """The tests' weights are tiny: in blocks of their true size each would be one."""
    monkeypatch.setattr(blocks, "block_values", lambda M: 100)


@pytest.fixture(params=[True, False], ids=["16-bit arithmetic", "none"])
def cpu_multiplies(request, monkeypatch) -> bool:
    monkeypatch.setattr(arithmetic, "multiplies", lambda dtype: request.param or dtype not in HALVES)
    return request.param


def results(function, x, weight, bias, dy) -> list[torch.Tensor]:
    """y, and the gradients of what asks for one."""
    wanted = [tensor for tensor in (x, weight, bias) if tensor is not None and tensor.requires_grad]
    y = function(x, weight, bias)
    return [y, *torch.autograd.grad(y, wanted, dy)]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("leading", [(0,), (2,), (9,), (2, 4)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_it_and_its_gradients_are_those_in_float64(cpu_multiplies, dtype, leading, with_bias, trained, transposed):
    torch.manual_seed(0)
    weight = (torch.randn(40, 33).T if transposed else torch.randn(33, 40)).to(dtype) / 8
    x, bias = torch.randn(*leading, 40).to(dtype), torch.randn(33).to(dtype) if with_bias else None
    dy = torch.randn(*leading, 33).to(dtype)
    given = [x.requires_grad_(), weight.requires_grad_(trained), bias if bias is None else bias.requires_grad_()]
    exact = [None if of is None else of.detach().double().requires_grad_(of.requires_grad) for of in given]
    for actual, expected in zip(results(linear, *given, dy), results(F.linear, *exact, dy.double()), strict=True):
        assert actual.dtype == dtype
        assert rms_error(actual, expected) <= ROUNDING[dtype]


@given(st.integers(0, 9), st.integers(1, 20), st.integers(1, 20), st.booleans())
def test_a_product_in_a_wider_dtype_than_the_weights_is_exact_to_it(M, N, K, transposed):
    weight = torch.randn(K, N).bfloat16().T if transposed else torch.randn(N, K).bfloat16()
    x, bias = torch.randn(M, K, dtype=torch.float64), torch.randn(N, dtype=torch.float64)
    assert rms_error(product(x, weight, bias), F.linear(x, weight.double(), bias)) < 1e-14


@pytest.mark.parametrize("dtype", HALVES)
def test_a_four_bit_weight_is_multiplied_likewise(cpu_multiplies, dtype):
    weight = NF4Tensor.quantize(torch.randn(33, 40).to(dtype) / 8)
    x, dy = torch.randn(9, 40).to(dtype).requires_grad_(), torch.randn(9, 33).to(dtype)
    exact = results(F.linear, x.detach().double().requires_grad_(), weight.dequantize().double(), None, dy.double())
    for actual, expected in zip(results(linear, x, weight, None, dy), exact, strict=True):
        assert rms_error(actual, expected) <= ROUNDING[dtype]


class WidestFloat32(TorchDispatchMode):
    """The elements of the largest float32 tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("transposed", [True, False])
def test_no_float32_tensor_of_the_weights_size_is_made(transposed):
    weight = torch.randn(40, 50).bfloat16()
    with WidestFloat32() as widest:
        product(torch.randn(4, 40) if transposed else torch.randn(4, 50), weight.t() if transposed else weight)
    assert 0 < widest.elements <= 200


def test_compiled_without_a_break_it_gives_the_same(cpu_multiplies):
    layer, x = Linear(40, 33).bfloat16(), torch.randn(5, 40).bfloat16()
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_autocast_leaves_the_wide_product_wide(monkeypatch):
    layer, x = Linear(40, 33).bfloat16(), torch.randn(5, 40).bfloat16()
    monkeypatch.setattr(arithmetic, "multiplies", lambda dtype: False)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), expected)


def test_a_layer_is_nn_linear_with_the_same_parameters_and_takes_an_adapter():
    layer = Linear(8, 6)
    assert isinstance(layer, nn.Linear)
    x, plain = torch.randn(3, 8), nn.Linear(8, 6)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), plain(x))
    for model in (nn.Sequential(layer), nn.Sequential(copy.deepcopy(plain))):
        lora.inject(model, lora.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"))
        assert isinstance(model[0], lora.Linear)
