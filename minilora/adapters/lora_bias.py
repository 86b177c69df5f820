"""A bias on the adapter, PEFT's lora_bias: y = x Wᵀ + bias + s · (drop(x) Aᵀ Bᵀ + b), b from zero."""

from torch import Tensor, nn

from minilora.adapters.layers import MergedLinear, spread


class BiasedLinear(MergedLinear):
    """A linear layer whose adapters have a bias each. It cannot be merged: a weight holds no bias.

    Parameters:
        lora_A, lora_B as in MergedLinear; lora_bias (outputs of the enabled slices,).
    """

    def _make_adapter(self, like: Tensor) -> None:
        self.lora_bias = nn.Parameter(like.new_empty(sum(stop - start for start, stop in self.slices)))
        super()._make_adapter(like)

    def reset_lora_parameters(self) -> None:
        super().reset_lora_parameters()
        nn.init.zeros_(self.lora_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        y = super().forward(x)
        return y + (self.scaling * self.spread_bias()).to(y.dtype) if self._adds() else y

    def spread_bias(self) -> Tensor:
        """b of every output, zero outside the slices, (out_features,)."""
        return spread(self.lora_bias, self.slices, self.lora_bias.new_zeros(self.out_features))
