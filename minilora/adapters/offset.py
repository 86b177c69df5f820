"""Adapters that start from the weight itself, PiSSA and OLoRA, with that start subtracted: the layer starts as the frozen one.

    y = x Wᵀ + bias + s · x (B A − B₀ A₀)ᵀ        A, B trained from A₀, B₀

The papers take s B₀ A₀ out of W. Here W stays, and the start is a part of the adapter that is not trained: the same function,
without rounding W anew. So it is also saved: as an ordinary LoRA of the unchanged base with twice the rank, [A; A₀] and [B, −B₀].
"""

from dataclasses import replace

import torch
from torch import Tensor

from minilora.adapters.config import LoraConfig
from minilora.adapters.layers import MergedLinear


def pissa(weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A₀ (r, in), B₀ (out, r) with s B₀ A₀ the best approximation of rank r: the principal singular values and vectors of W.

    Source: Meng et al. 2024, "PiSSA: Principal Singular Values and Singular Vectors Adaptation", eq. 2, 3.
    """
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    root = (S[:r] / scaling).sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root


def olora(weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A₀ (r, in), B₀ (out, r) from W = Q R: r rows of R, and r orthonormal columns of Q.

    Source: Büyükakyüz 2024, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models".
    """
    Q, R = torch.linalg.qr(weight)
    return R[:r], Q[:, :r]


STARTS = {"pissa": pissa, "olora": olora}


def start_factors(layer: MergedLinear, start: str) -> tuple[Tensor, Tensor]:
    """A₀ and B₀ of all slices of a layer, stacked as lora_A and lora_B are; found in float32."""
    parts = [layer.matrix.detach()[first:last].float() for first, last in layer.slices]
    factors = [STARTS[start](part, layer.r, layer.scaling) for part in parts]
    return torch.cat([A for A, _ in factors]), torch.cat([B for _, B in factors])


class OffsetLinear(MergedLinear):
    """A linear layer whose adapters start at parts of its own weight, with that start subtracted.

    Args:
        start: "pissa" or "olora".

    Parameters:
        lora_A, lora_B as in MergedLinear. Their start lies in the buffers lora_A_start and lora_B_start.

    Raises:
        ValueError: r is larger than a slice has rows or columns, or there is dropout: the start must not fall under it.
    """

    def __init__(self, *args, start: str, **settings):
        self.start = start
        super().__init__(*args, **settings)

    def _adapt(self, *args, start: str | None = None, **settings) -> None:
        self.start = start or self.start  # around tells it here
        super()._adapt(*args, **settings)
        if self.lora_dropout:
            raise ValueError(f"an adapter that starts by {self.start} must have lora_dropout 0, not {self.lora_dropout}")

    def _make_adapter(self, like: Tensor) -> None:
        self.register_buffer("lora_A_start", like.new_empty(len(self.slices) * self.r, self.in_features))
        self.register_buffer("lora_B_start", like.new_empty(sum(stop - start for start, stop in self.slices), self.r))
        super()._make_adapter(like)

    def reset_lora_parameters(self) -> None:
        A, B = start_factors(self, self.start)
        with torch.no_grad():
            for factor, start in ((self.lora_A, A), (self.lora_A_start, A), (self.lora_B, B), (self.lora_B_start, B)):
                factor.copy_(start)

    def factors(self) -> tuple[Tensor, Tensor]:
        """[A_g; A₀_g] of each slice, stacked, and [B, −B₀]: the whole adapter as one pair of twice the rank."""
        pairs = zip(self.lora_A.chunk(len(self.slices)), self.lora_A_start.chunk(len(self.slices)), strict=True)
        return torch.cat([part for pair in pairs for part in pair]), torch.cat([self.lora_B, -self.lora_B_start], dim=1)

    def set_factors(self, A: Tensor, B: Tensor) -> None:
        parts = A.chunk(2 * len(self.slices))
        self.lora_A.copy_(torch.cat(parts[::2]))
        self.lora_A_start.copy_(torch.cat(parts[1::2]))
        self.lora_B.copy_(B[:, : self.r])
        self.lora_B_start.copy_(-B[:, self.r :])


def as_saved(config: LoraConfig) -> LoraConfig:
    """The config of the same adapter as an ordinary LoRA: twice the rank, and alpha so that the scaling stays."""
    growth = 2**0.5 if config.use_rslora else 2
    return replace(
        config,
        init_lora_weights=True,
        r=2 * config.r,
        lora_alpha=growth * config.lora_alpha,
        rank_pattern={key: 2 * rank for key, rank in config.rank_pattern.items()},
        alpha_pattern={key: growth * alpha for key, alpha in config.alpha_pattern.items()},
    )
