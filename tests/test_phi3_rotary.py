"""Rotary embedding: it turns without stretching, and what attention sees is the distance alone."""

import dataclasses
import math

import pytest
import torch
from helpers import rms_error, tiny_config
from hypothesis import given
from hypothesis import strategies as st

from minilora.kernels.rope import rotate
from minilora.phi3.config import LongRope
from minilora.phi3.rotary import attention_factor, rotary_tables

FULL = tiny_config(head_dim=16)
PARTIAL = tiny_config(head_dim=16, partial_rotary_factor=0.75)
SHORT, LONG = [1.0, 1.5, 2.0, 3.0, 5.0, 8.0], [1.5, 3.0, 6.0, 12.0, 24.0, 48.0]
EXTENDED = dataclasses.replace(
    PARTIAL, longrope=LongRope(SHORT, LONG), max_position_embeddings=1024, original_max_position_embeddings=16
)
either = pytest.mark.parametrize("config", [FULL, PARTIAL], ids=["full", "partial"])


def vectors(T, seed=0):
    return torch.randn(2, 3, T, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)  # (B, H, T, D)


def rotated(config, x, positions):
    return rotate(x, *rotary_tables(config, positions, positions + 1, torch.float64))


@either
def test_angles_are_position_times_powers_of_theta(config):
    positions = torch.tensor([[0, 1, 7], [5, 900, 1000]])
    cos, sin = rotary_tables(config, positions, positions + 1, torch.float32)
    d = config.rotary_dim
    assert cos.shape == sin.shape == (2, 1, 3, d // 2)
    for b, t in [(0, 0), (0, 2), (1, 1), (1, 2)]:
        for i in range(d // 2):
            angle = int(positions[b, t]) * config.rope_theta ** (-2 * i / d)
            assert math.isclose(float(cos[b, 0, t, i]), math.cos(angle), abs_tol=2e-4)  # 1000 rad in float32
            assert math.isclose(float(sin[b, 0, t, i]), math.sin(angle), abs_tol=2e-4)


@either
def test_rotation_preserves_the_length_of_every_pair(config):
    x = vectors(9)
    y, half = rotated(config, x, torch.arange(9)[None] * 37), config.rotary_dim // 2
    for i in range(half):
        torch.testing.assert_close(y[..., [i, i + half]].norm(dim=-1), x[..., [i, i + half]].norm(dim=-1), rtol=1e-6, atol=0)


@either
def test_position_zero_turns_nothing(config):
    x = vectors(1)
    assert torch.equal(rotated(config, x, torch.zeros(1, 1, dtype=torch.long)), x)


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500), st.sampled_from([FULL, PARTIAL]))
def test_products_of_queries_and_keys_depend_on_their_distance_only(m, n, shift, config):
    q, k = vectors(1), vectors(1, seed=1)

    def product(m, n):
        return (rotated(config, q, torch.tensor([[m]])) * rotated(config, k, torch.tensor([[n]]))).sum(-1)

    assert (product(m, n) - product(m + shift, n + shift)).abs().max() < 2e-3  # the angles are rounded to float32


def test_products_do_depend_on_the_distance():
    q, k = vectors(1), vectors(1, seed=1)
    near, far = ((rotated(FULL, q, torch.tensor([[d]])) * k).sum(-1) for d in (1, 2))
    assert (near - far).abs().min() > 1e-2


def test_dimensions_past_the_rotary_ones_pass_through_untouched():
    x = vectors(5)
    y = rotated(PARTIAL, x, torch.arange(1, 6)[None])
    assert torch.equal(y[..., 12:], x[..., 12:])
    assert (y[..., :12] != x[..., :12]).all()


def test_the_first_half_pairs_with_the_second():
    x = torch.zeros(1, 1, 1, 16, dtype=torch.float64)
    x[..., 0] = 1.0
    y = rotated(FULL, x, torch.tensor([[1]]))[0, 0, 0]
    assert y.nonzero().flatten().tolist() == [0, 8]
    torch.testing.assert_close(y[[0, 8]], torch.tensor([math.cos(1), math.sin(1)], dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tables_of_a_small_dtype_are_the_float32_ones_rounded_once(dtype):
    positions = torch.arange(1000)[None]
    tables = (rotary_tables(EXTENDED, positions, positions + 1, kind) for kind in (dtype, torch.float32))
    for small, exact in zip(*tables, strict=True):
        assert torch.equal(small, exact.to(dtype))


def test_tables_are_those_of_exact_arithmetic_up_to_float32():
    positions = torch.arange(1000)[None]
    frequencies = 10000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    angles = positions[:, None, :, None] * frequencies
    for table, exact in zip(
        rotary_tables(FULL, positions, positions + 1, torch.float32), (angles.cos(), angles.sin()), strict=True
    ):
        assert rms_error(table, exact) < 2e-5


@either
def test_each_row_turns_by_its_own_positions_whatever_the_head(config):
    x, positions = vectors(4), torch.tensor([[0, 1, 2, 3], [9, 3, 3, 700]])
    y = rotated(config, x, positions)
    for b in range(2):
        for h in range(3):
            alone = rotated(config, x[b : b + 1, h : h + 1], positions[b : b + 1])
            assert torch.equal(y[b : b + 1, h : h + 1], alone)


@pytest.mark.parametrize(("length", "factors"), [(1, SHORT), (16, SHORT), (17, LONG), (1000, LONG)])
def test_longrope_stretches_each_wavelength_by_the_factors_for_the_length_of_the_sequence(length, factors):
    positions = torch.tensor([[0, 3, length - 1]])
    tables = rotary_tables(EXTENDED, positions, torch.tensor([[length]]), torch.float64)
    frequencies = 10000.0 ** (-torch.arange(0, 12, 2, dtype=torch.float64) / 12) / torch.tensor(factors, dtype=torch.float64)
    angles = positions[:, None, :, None] * frequencies
    scale = math.sqrt(1 + math.log(64) / math.log(16))  # 1024 tokens over 16
    for table, exact in zip(tables, (angles.cos(), angles.sin()), strict=True):
        assert rms_error(table, scale * exact) < 1e-5


def test_each_position_turns_by_the_length_of_its_own_sequence():
    positions, lengths = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]]), torch.tensor([[9, 9, 17, 16], [40, 1, 16, 17]])
    tables = rotary_tables(EXTENDED, positions, lengths, torch.float32)
    for b in range(2):
        for t in range(4):
            alone = rotary_tables(EXTENDED, positions[b : b + 1, t : t + 1], lengths[b : b + 1, t : t + 1], torch.float32)
            for table, one in zip(tables, alone, strict=True):
                assert torch.equal(table[b, 0, t], one[0, 0, 0])


@pytest.mark.parametrize(
    ("settings", "original", "expected"),
    [
        ({}, 4096, 1.1902380714238083),  # 131072 over 4096, that of every release
        ({"factor": 4.0}, 4096, math.sqrt(1 + math.log(4) / math.log(4096))),
        ({"factor": 0.5}, 4096, 1.0),
        ({}, 131072, 1.0),
        ({}, 262144, 1.0),
        ({"attention_factor": 1.5, "factor": 4.0}, 4096, 1.5),
    ],
)
def test_the_attention_factor_is_that_of_the_extension_unless_given(settings, original, expected):
    longrope = LongRope(SHORT, LONG, **settings)
    config = dataclasses.replace(
        PARTIAL, longrope=longrope, max_position_embeddings=131072, original_max_position_embeddings=original
    )
    assert math.isclose(attention_factor(config), expected, rel_tol=1e-15)


def test_without_longrope_nothing_is_scaled_whatever_the_lengths():
    assert attention_factor(FULL) == 1.0
    positions = torch.arange(9)[None]
    short, long = (rotary_tables(FULL, positions, torch.tensor([[n]]), torch.float32) for n in (9, 99999))
    assert torch.equal(short[0], long[0])
