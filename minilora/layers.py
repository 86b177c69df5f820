"""Linear layers with a low-rank adapter beside a frozen weight, under loralib's names.

    y = x Wᵀ + bias + scaling · drop(x) lora_Aᵀ lora_Bᵀ

`train()` and `eval()` never touch the weights: merging is an explicit verb (minilora.merging).
Source: Hu et al. 2021, "LoRA", eq. 3, §4.1.
"""

import math
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from minilora.config import scaling
from minilora.kernels.lora_linear import Slices, lora_linear


def enabled_slices(enable_lora: list[bool], out_splits: list[int]) -> Slices:
    """(start, stop) of the enabled ones among consecutive parts of a layer's outputs."""
    edges = pairwise(accumulate(out_splits, initial=0))
    return tuple(edge for edge, enabled in zip(edges, enable_lora, strict=True) if enabled)


def spread(values: Tensor, slices: Slices, elsewhere: Tensor) -> Tensor:
    """One value for each output of a layer: those of the slices in their order, and between them those of elsewhere (N,)."""
    rows = torch.cat([torch.arange(start, stop, device=values.device) for start, stop in slices])
    return elsewhere.to(values.dtype).index_put((rows,), values)


class Linear(nn.Linear):
    """A linear layer with an adapter on all of its outputs.

    Args:
        r: rank, at least 1.
        lora_alpha: the adapter is scaled by lora_alpha / r, or / sqrt(r) with use_rslora.
        lora_dropout: probability with which the adapter's input loses an element in training.
        lora_dtype: of lora_A and lora_B; the weight's when None.

    Parameters:
        weight (out_features, in_features), bias (out_features,) or None, lora_A (r, in_features), lora_B (out_features, r).
        lora_B starts at zero, so that the layer starts as the frozen one.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        lora_dtype: torch.dtype | None = None,
        bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        if r < 1 or not 0 <= lora_dropout < 1:
            raise ValueError(f"r must be at least 1 and lora_dropout lie in [0, 1), not {r} and {lora_dropout}")
        self.r, self.lora_alpha, self.lora_dropout, self.use_rslora = r, lora_alpha, lora_dropout, use_rslora
        self.scaling = scaling(r, lora_alpha, use_rslora)
        self.merged = False
        self._make_adapter(torch.empty(0, dtype=lora_dtype or self.weight.dtype, device=self.weight.device))

    @property
    def slices(self) -> Slices:
        """(start, stop) of the outputs that each adapter adds to."""
        return ((0, self.out_features),)

    def _make_adapter(self, like: Tensor) -> None:
        self.lora_A = nn.Parameter(like.new_empty(len(self.slices) * self.r, self.in_features))
        self.lora_B = nn.Parameter(like.new_empty(sum(stop - start for start, stop in self.slices), self.r))
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """lora_A as nn.Linear starts its weight, which is PEFT's and loralib's start; lora_B zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @classmethod
    def around(cls, linear: nn.Linear, lora_dtype: torch.dtype, **settings) -> "Linear":
        """The layer with an adapter that takes over a plain layer's weight and bias, not copies of them."""
        layer = cls(linear.in_features, linear.out_features, bias=False, device="meta", lora_dtype=lora_dtype, **settings)
        layer.weight, layer.bias = linear.weight, linear.bias
        layer._make_adapter(torch.empty(0, dtype=lora_dtype, device=linear.weight.device))
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if not self.merged:
            dropout = self.lora_dropout if self.training else 0.0
            return lora_linear(x, self.weight, self.lora_A, self.lora_B, self.scaling, self.bias, dropout, self.slices)
        if self.training and torch.is_grad_enabled():
            raise ValueError("this layer's adapter is merged into its weight: unmerge before training")
        return super().forward(x)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (G·R, in_features) and B (width of the slices, R) of the whole update, with R ranks for each of G slices."""
        return self.lora_A, self.lora_B

    def set_factors(self, A: Tensor, B: Tensor) -> None:
        """Takes over what factors gives."""
        self.lora_A.copy_(A)
        self.lora_B.copy_(B)

    def delta(self) -> Tensor:
        """What the adapters add to each slice of the weight, (width of the slices, in_features), in float32 or better."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        A, B = self.factors()
        widths = [stop - start for start, stop in self.slices]
        pairs = zip(B.to(dtype).split(widths), A.to(dtype).chunk(len(widths)), strict=True)
        return torch.cat([self.scaling * (B_g @ A_g) for B_g, A_g in pairs])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}"


class MergedLinear(Linear):
    """Several linear layers fused into one weight, with an adapter for each that is enabled.

    Args:
        enable_lora: for each fused layer, whether it has an adapter; at least one must.
        out_splits: outputs of each fused layer, in order; equal parts when None.

    Parameters:
        lora_A (number enabled · r, in_features), lora_B (outputs of those enabled, r), in the order of the fused layers.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        enable_lora: list[bool] = (True,),
        out_splits: list[int] | None = None,
        **settings,
    ):
        if not any(enable_lora):
            raise ValueError("enable_lora must enable at least one slice; a layer without adapters is nn.Linear")
        out_splits = out_splits or [out_features // len(enable_lora)] * len(enable_lora)
        if sum(out_splits) != out_features or len(out_splits) != len(enable_lora) or min(out_splits) < 0:
            raise ValueError(
                f"out_splits must be {len(enable_lora)} sizes (one for each of enable_lora) that add up to out_features = "
                f"{out_features}, not {list(out_splits)}"
            )
        self.enable_lora, self.out_splits = list(enable_lora), list(out_splits)
        super().__init__(in_features, out_features, r, **settings)

    @property
    def slices(self) -> Slices:
        return enabled_slices(self.enable_lora, self.out_splits)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, enable_lora={self.enable_lora}, out_splits={self.out_splits}"
