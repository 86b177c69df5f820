"""Rotary position embedding: queries and keys turn by an angle that grows with their position.

    angle(t, i) = t · θ^(−2i/d),   i = 0 … d/2 − 1
    (u_i, u_{i + d/2}) ↦ (u_i cos − u_{i + d/2} sin,  u_{i + d/2} cos + u_i sin)

d is the rotary dimension; dimensions past it, under partial rotary, pass through.
Source: Su et al. 2021, "RoFormer", §3.2, in the half-split pairing of GPT-NeoX that Phi-3's weights expect.
"""

import torch
from torch import Tensor

from minilora.phi3.config import Phi3Config


def rotary_tables(config: Phi3Config, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The cosine and sine of every angle, found in float32 and rounded once to dtype.

    Args:
        positions: (B, T) integers; B may be 1 for a whole batch.

    Returns:
        cos, sin: (B, 1, T, d/2), the 1 for the heads.
    """
    i = torch.arange(0, config.rotary_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = 1.0 / config.rope_theta ** (i / config.rotary_dim)  # (d/2,)
    angles = positions[:, None, :, None].float() * frequencies  # (B, 1, T, d/2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns x (B, H, T, D) by the angles whose cos and sin are (B, 1, T, d/2), d ≤ D."""
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
