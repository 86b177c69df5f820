"""bitsandbytes reads what is written here, and what it writes is read here, bit for bit; what is broken is refused by name."""

import json
import re

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from hypothesis import given
from hypothesis import strategies as st

from minilora.kernels.nf4_state import STATE, from_bitsandbytes, to_bitsandbytes
from minilora.kernels.nf4_tensor import NF4Tensor

shapes = st.tuples(st.integers(1, 40), st.integers(1, 40)) | st.just((130, 257))
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@pytest.fixture(autouse=True, scope="module")
def uncompiled():
    """bitsandbytes compiles what it does with rows of odd length, anew for every shape."""
    with torch.compiler.set_stance("force_eager"):
        yield


def saved_by_bitsandbytes(weight):
    codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    return {"weight": codes} | {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}


def dequantised_by_bitsandbytes(codes, state):
    """As one row: of a matrix with rows of 16, say, bitsandbytes 0.50.2 mixes up the scales on a CPU with AVX-512."""
    shape, state.shape = state.shape, (state.shape.numel(),)
    return dequantize_4bit(codes, state).view(shape)


def random_weight(shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@given(shapes, dtypes)
def test_the_tensors_are_those_that_bitsandbytes_saves(shape, dtype):
    weight = random_weight(shape, dtype)
    theirs, ours = saved_by_bitsandbytes(weight), to_bitsandbytes(NF4Tensor.quantize(weight), "weight")
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(ours[name], tensor), name


@given(shapes, dtypes)
def test_what_bitsandbytes_saved_is_read_and_dequantised_as_there(shape, dtype):
    weight = random_weight(shape, dtype)
    ours = from_bitsandbytes(saved_by_bitsandbytes(weight), "weight")
    codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert (ours.shape, ours.dtype) == (weight.shape, dtype)
    assert torch.equal(ours.dequantize(), dequantised_by_bitsandbytes(codes, state))


@given(shapes, dtypes)
def test_bitsandbytes_dequantises_what_is_written_here_to_the_same(shape, dtype):
    weight = NF4Tensor.quantize(random_weight(shape, dtype))
    tensors = to_bitsandbytes(weight, "a.weight")
    state = QuantState.from_dict({name.removeprefix("a.weight."): t for name, t in tensors.items() if name != "a.weight"}, "cpu")
    assert torch.equal(dequantised_by_bitsandbytes(tensors["a.weight"], state), weight.dequantize())


def test_a_dtype_that_bitsandbytes_lacks_is_refused():
    with pytest.raises(ValueError, match=r"a: bitsandbytes knows no 4-bit float64.*cast"):
        to_bitsandbytes(NF4Tensor.quantize(torch.ones(2, 2).double()), "a")


def packed(**changes) -> torch.Tensor:
    """The JSON of a weight (5, 30) with some entries replaced, or dropped where None."""
    state = json.loads(bytes(saved_by_bitsandbytes(random_weight((5, 30)))[f"weight.{STATE}"].tolist())) | changes
    return as_bytes(json.dumps({key: value for key, value in state.items() if value is not None}))


def as_bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


BROKEN = [
    (STATE, packed(quant_type="fp4"), "quant_type must be 'nf4', not 'fp4'"),
    (STATE, packed(blocksize=128), "blocksize must be 64, not 128"),
    (STATE, packed(nested_blocksize=None), "nested_blocksize must be 256, not None"),
    (STATE, packed(nested_dtype="float16"), "nested_dtype must be 'float32', not 'float16'"),
    (STATE, packed(dtype="int8"), "dtype must be float32, bfloat16, float16, not 'int8'"),
    (STATE, packed(dtype=["float32"]), "dtype must be float32, bfloat16, float16, not ['float32']"),
    (STATE, packed(shape=[150]), "shape must be two positive sizes, not [150]"),
    (STATE, packed(shape=[-5, -30]), "shape must be two positive sizes, not [-5, -30]"),
    (STATE, packed(shape=[5.0, 30]), "shape must be two positive sizes, not [5.0, 30]"),
    (STATE, packed(shape=[2**40, 2**40]), "shape must be two positive sizes"),
    (STATE, packed(shape=[5, 31]), "the codes must be torch.uint8 (78, 1) for 155 numbers, not torch.uint8 (75, 1)"),
    (STATE, packed(nested_offset=float("nan")), "nested_offset must be a finite float32, not nan"),
    (STATE, packed(nested_offset=1e39), "nested_offset must be a finite float32, not 1e+39"),
    (STATE, packed(nested_offset="1"), "nested_offset must be a finite float32, not '1'"),
    (STATE, packed(nested_offset=True), "nested_offset must be a finite float32, not True"),
    (STATE, as_bytes("{"), f"{STATE} is no JSON"),
    (STATE, as_bytes("[" * 4000), f"{STATE} is no JSON"),
    (STATE, torch.full((9,), 255, dtype=torch.uint8), f"{STATE} is no JSON"),
    (STATE, as_bytes("[1]"), f"{STATE} must hold a JSON object, not [1]"),
    (STATE, as_bytes(" " * 5000), f"{STATE} must be at most 4096 bytes"),
    (STATE, torch.zeros(3), f"{STATE} must be at most 4096 bytes, not torch.float32 (3,)"),
    ("absmax", torch.zeros(3), "absmax must be torch.uint8 (3,) for 150 numbers, not torch.float32 (3,)"),
    ("nested_absmax", torch.zeros(2), "nested_absmax must be torch.float32 (1,) for 150 numbers, not torch.float32 (2,)"),
    ("nested_absmax", torch.full((1,), torch.inf), "nested_absmax must be finite"),
    ("quant_map", torch.zeros(16), "quant_map must be the table of NF4, and is another one"),
    ("nested_quant_map", torch.zeros(4), "nested_quant_map must be the table of 8-bit dynamic numbers, and is another one"),
]


@pytest.mark.parametrize(("suffix", "tensor", "message"), BROKEN)
def test_what_is_broken_is_refused_by_name(suffix, tensor, message):
    tensors = saved_by_bitsandbytes(random_weight((5, 30)))
    from_bitsandbytes(tensors, "weight")  # as it is, it can be read
    with pytest.raises(ValueError, match=f"^weight is no 4-bit weight that can be read here: .*{re.escape(message)}"):
        from_bitsandbytes(tensors | {f"weight.{suffix}": tensor}, "weight")


def test_missing_tensors_are_named_all_at_once():
    _, state = quantize_4bit(random_weight((5, 30)), blocksize=64, quant_type="nf4")  # without double quantisation
    tensors = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    with pytest.raises(ValueError, match=r"weight is missing; weight.nested_absmax is .*; weight.nested_quant_map is"):
        from_bitsandbytes(tensors, "weight")


def test_all_faults_are_told_at_once():
    tensors = saved_by_bitsandbytes(random_weight((5, 30))) | {
        f"weight.{STATE}": packed(quant_type="fp4", blocksize=32), "weight.quant_map": torch.zeros(16),
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"quant_type must be .*; blocksize must be .*; quant_map must be"):
        from_bitsandbytes(tensors, "weight")
