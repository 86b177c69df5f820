"""NormalFloat-4 on flat values: codes, scales and values are those of bitsandbytes on a CPU, bit for bit."""

import bitsandbytes.functional as theirs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minilora.kernels.nf4 import DYNAMIC, LEVELS, compress, dequantize_blocks, expand, quantize_blocks

SIZES = [1, 63, 64, 65, 127, 128, 64 * 255, 64 * 256, 64 * 256 + 1, 64 * 600 + 37]  # at the edges of blocks and groups


@st.composite
def weights(draw):
    """(n,) values: of any size, denormal in float32 or large in float16, with zero blocks and outliers."""
    n = draw(st.integers(1, 300) | st.sampled_from(SIZES))
    values = torch.randn(n, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
    values *= draw(st.sampled_from([1.0, 0.02, 1e-6, 1e-39, 1e3]))
    for start in draw(st.lists(st.integers(0, n - 1), max_size=3)):
        values[start : start + draw(st.sampled_from([1, 64, 128, n]))] = 0
    if draw(st.booleans()):
        values[draw(st.integers(0, n - 1))] = draw(st.sampled_from([-3e4, 40.0]))
    return values.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))


@given(weights())
def test_codes_scales_and_values_are_those_of_bitsandbytes(values):
    packed, state = theirs.quantize_4bit(values, blocksize=64, quant_type="nf4", compress_statistics=True)
    uncompressed = theirs.quantize_4bit(values, blocksize=64, quant_type="nf4", compress_statistics=False)[1]

    codes, absmax = quantize_blocks(values)
    assert torch.equal(codes, packed.flatten())
    assert torch.equal(absmax, uncompressed.absmax)

    absmax_codes, nested, offset = compress(absmax)
    assert torch.equal(absmax_codes, state.absmax)
    assert torch.equal(nested, state.state2.absmax)
    assert torch.equal(offset, state.offset)

    back = dequantize_blocks(codes, expand(absmax_codes, nested, offset), len(values), values.dtype)
    expected = theirs.dequantize_4bit(packed, state).flatten()
    if values.dtype == torch.bfloat16:
        # A CPU with an instruction that rounds to bfloat16 makes zeros there of what is smaller than a normal number.
        flushed = (expected == 0) & (back.abs() < torch.finfo(torch.bfloat16).tiny)
        back, expected = back.masked_fill(flushed, 0), expected.masked_fill(flushed, 0)
    assert torch.equal(back, expected)


def test_the_tables_are_those_of_bitsandbytes():
    assert torch.equal(LEVELS, theirs.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(DYNAMIC, theirs.create_dynamic_map())


def test_a_line_of_64_values_becomes_these_codes():
    codes, absmax = quantize_blocks(torch.linspace(-1, 1, 64) * 0.05)
    assert bytes(codes.tolist()).hex() == "00000111111112222233344445556667788899aaabbbccccddddeeeeeeefffff"
    assert absmax.tolist() == [0.05000000074505806]


def test_a_block_of_zeros_has_the_code_of_zero_and_comes_back_as_zeros():
    codes, absmax = quantize_blocks(torch.zeros(128))
    assert bytes(codes.tolist()).hex() == "77" * 64
    assert absmax.tolist() == [0, 0]
    assert not dequantize_blocks(codes, torch.full((2,), 9.0), 128, torch.float32).any()


@given(weights())
def test_a_value_moves_by_at_most_half_the_widest_gap_between_levels(values):
    codes, absmax = quantize_blocks(values)
    back = dequantize_blocks(codes, absmax, len(values), torch.float32)
    scale = absmax.repeat_interleave(64)[: len(values)]
    half_gap = LEVELS.diff().max() / 2
    assert ((back - values.float()).abs() <= (half_gap + 1e-6) * scale + 1e-38).all()


def test_what_is_dequantised_is_quantised_to_the_same_codes():
    codes, absmax = quantize_blocks(torch.randn(64 * 40, generator=torch.Generator().manual_seed(0)))
    again, same = quantize_blocks(dequantize_blocks(codes, absmax, 64 * 40, torch.float32))
    assert torch.equal(again, codes)
    assert torch.equal(same, absmax)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_are_rounded_once_to_the_dtype_that_is_asked_for(dtype):
    codes, absmax = quantize_blocks(torch.randn(100, generator=torch.Generator().manual_seed(0)))
    exact = dequantize_blocks(codes, absmax, 100, torch.float32)
    rounded = dequantize_blocks(codes, absmax, 100, dtype)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, exact.to(dtype))


@pytest.mark.parametrize("position", [0, 63, 64, 129])
@pytest.mark.parametrize(("value", "kinds"), [(float("nan"), "1 NaN and 0 infinite"), (float("-inf"), "0 NaN and 1 infinite")])
def test_what_is_not_finite_is_refused_by_name(position, value, kinds):
    values = torch.ones(130)
    values[position] = value
    with pytest.raises(ValueError, match=f"must be finite in float32, not {kinds} of 130 values"):
        quantize_blocks(values)


def test_a_float64_beyond_float32_is_refused():
    with pytest.raises(ValueError, match="0 NaN and 1 infinite"):
        quantize_blocks(torch.tensor([1.0, 1e300], dtype=torch.float64))
