"""Products by blocks of rows of a weight: those with the whole weight, however it is cut."""

import pytest
import torch
from helpers import rms_error
from hypothesis import given
from hypothesis import strategies as st

from minilora.kernels import blocks
from minilora.kernels.blocks import block_rows, brought, by_column, by_row
from minilora.kernels.nf4_tensor import NF4Tensor

sizes = st.integers(1, 30)


@given(st.integers(0, 7), sizes, sizes, st.integers(1, 200), st.booleans(), st.sampled_from([torch.float32, torch.float64]))
def test_both_products_are_those_with_the_whole_weight(M, N, K, values, with_bias, dtype):
    weight, x, dy = torch.randn(N, K).bfloat16(), torch.randn(M, K, dtype=dtype), torch.randn(M, N, dtype=dtype)
    bias, other = (torch.randn(size, dtype=dtype) if with_bias else None for size in (N, K))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "block_values", lambda M: values)
        y = by_row(x, brought(weight, dtype, M), N, bias)
        dx = by_column(dy, brought(weight, dtype, M), K, other)
    exact = weight.double()
    expected = x.double() @ exact.T + (0 if bias is None else bias.double())
    expected_dx = dy.double() @ exact + (0 if other is None else other.double())
    assert (y.dtype, dx.dtype) == (dtype, dtype)
    assert rms_error(y, expected) < 3e-7
    assert rms_error(dx, expected_dx) < 3e-7


@pytest.mark.parametrize("four_bit", [False, True])
def test_the_blocks_are_the_weights_rows_in_order_made_wider_exactly(monkeypatch, four_bit):
    monkeypatch.setattr(blocks, "block_values", lambda M: 50)
    weight = torch.randn(23, 7).bfloat16()
    weight = NF4Tensor.quantize(weight) if four_bit else weight
    found = [(rows, values.clone()) for rows, values in brought(weight, torch.float32, 1)]
    assert [rows for rows, _ in found] == [slice(0, 7), slice(7, 14), slice(14, 21), slice(21, 23)]
    assert all(values.dtype == torch.float32 for _, values in found)
    assert torch.equal(torch.cat([values for _, values in found]), (weight.dequantize() if four_bit else weight).float())


def test_a_block_of_the_right_dtype_is_no_copy():
    weight = torch.randn(5, 3)
    (_, values), *_ = brought(weight, torch.float32, 1)
    assert values.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize(("values", "K", "rows"), [(5, 7, 1), (440, 7, 62), (455, 7, 64), (2**21, 3072, 640), (2**22, 8192, 512)])
def test_many_rows_are_a_multiple_of_64(values, K, rows):
    assert block_rows(values, K) == rows


def test_the_sum_over_blocks_is_not_rounded_between_them(monkeypatch):
    """bfloat16 holds 256 + 1 as 256: adding 1 by 1 would never get past it."""
    monkeypatch.setattr(blocks, "block_values", lambda M: 1)
    weight = torch.cat([torch.full((1, 1), 256.0), torch.ones(64, 1)]).bfloat16()
    assert by_column(torch.ones(1, 65).bfloat16(), brought(weight, torch.bfloat16, 1), 1, None).item() == 320
