"""Rotary position embedding: the angles, growing with their position, by which kernels.rope turns queries and keys.

    angle(t, i) = t · θ^(−2i/d),   i = 0 … d/2 − 1

d is the rotary dimension; dimensions past it, under partial rotary, pass through.
Source: Su et al. 2021, "RoFormer", §3.2.

LongRoPE extends a context of L tokens (original_max_position_embeddings) to one f times as long. It stretches every
wavelength by a factor of its own, found by search, and scales cosine and sine, so that attention stays sharp over more keys:

    angle(t, i) = t · θ^(−2i/d) / λ_i        λ = long_factor in a sequence of more than L tokens, else short_factor
    s = sqrt(1 + ln f / ln L), or 1 when f ≤ 1        the same in short and long sequences

One λ serves a whole sequence, its first tokens too: keys turned by one do not fit queries turned by the other.
Source: Ding et al. 2024, "LongRoPE"; s as in the published code of Phi-3.
"""

import math

import torch
from torch import Tensor

from minilora.phi3.config import Phi3Config


def rotary_tables(config: Phi3Config, positions: Tensor, lengths: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The scaled cosine and sine of every angle, found in float32 and rounded once to dtype.

    Args:
        positions: (B, T) integers; B may be 1 for a whole batch.
        lengths: (B, T), or 1 in place of either: tokens of the sequence that each position is in, which choose its λ.

    Returns:
        cos, sin: (B, 1, T, d/2), the 1 for the heads.
    """
    i = torch.arange(0, config.rotary_dim, 2, device=positions.device, dtype=torch.float32)
    wavelengths = _stretch(config, lengths) * config.rope_theta ** (i / config.rotary_dim)  # (B, T, d/2), over 2π
    angles = (positions[..., None].float() * (1.0 / wavelengths))[:, None]  # (B, 1, T, d/2)
    s = attention_factor(config)
    return (s * angles.cos()).to(dtype), (s * angles.sin()).to(dtype)


def _stretch(config: Phi3Config, lengths: Tensor) -> Tensor:
    """λ, (B, T, d/2) with 1 for what is the same throughout."""
    if config.longrope is None:
        return torch.ones(1, 1, 1, device=lengths.device)
    short, long = (
        torch.tensor(factors, dtype=torch.float32, device=lengths.device)
        for factors in (config.longrope.short_factor, config.longrope.long_factor)
    )
    return torch.where(lengths[..., None] > config.original_max_position_embeddings, long, short)


def attention_factor(config: Phi3Config) -> float:
    """s, which multiplies cosine and sine; 1 without LongRoPE."""
    if config.longrope is None:
        return 1.0
    L, longrope = config.original_max_position_embeddings, config.longrope
    f = longrope.factor or config.max_position_embeddings / L
    return longrope.attention_factor or math.sqrt(1 + math.log(max(f, 1)) / math.log(L))
