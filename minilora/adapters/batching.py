"""A batch whose rows use different adapters, in one forward.

    y_i = x_i Wᵀ + bias + s_g drop(x_i) A_gᵀ B_gᵀ        for each row i of the batch that uses adapter g

Rows of one adapter are one group: the frozen product runs once over the whole batch, the low-rank ones once a group.
Source: Chen et al. 2023, "Punica: Multi-Tenant LoRA Serving", whose kernel computes the same sum.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.adapters.layers import Linear, MergedLinear
from minilora.adapters.offset import OffsetLinear
from minilora.adapters.switching import BASE, adapters_of, moved, placed
from minilora.kernels.lora_linear import Slices

MIXABLE = (Linear, MergedLinear, OffsetLinear)  # what they add is their factors() and no more


class Group(NamedTuple):
    """The rows of a batch that use one adapter, and that adapter's factors for one layer, as lora_linear takes them."""

    rows: Tensor  # (n,) int64
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    slices: Slices
    dropout: float = 0.0


def grouped_lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, groups: Sequence[Group]) -> Tensor:
    """The equation above, in plain differentiable PyTorch.

    Args:
        x: (B, ..., K).
        weight, bias: (N, K) and (N,) or None, x's dtype.
        groups: of disjoint rows; a row in none of them has no adapter.

    Returns:
        (B, ..., N).
    """
    y = F.linear(x, weight, bias)  # (B, ..., N)
    for rows, lora_A, lora_B, scaling, slices, dropout in groups:
        s = F.linear(F.dropout(x[rows], dropout, dropout > 0), lora_A.to(x.dtype))  # (n, ..., G·R)
        blocks = lora_B.to(x.dtype).split([stop - start for start, stop in slices])
        for (start, stop), s_g, B_g in zip(slices, s.chunk(len(slices), dim=-1), blocks, strict=True):
            y[..., start:stop].index_add_(0, rows, F.linear(s_g, B_g), alpha=scaling)
    return y


class MixedLinear(nn.Module):
    """A linear layer whose rows of the batch use the adapters of different layers around the same weight."""

    def __init__(self, linear: nn.Module, layers: list[tuple[Tensor, Linear]], batch_size: int):
        super().__init__()
        self.weight, self.bias, self.fan_in_fan_out = linear.weight, linear.bias, layers[0][1].fan_in_fan_out
        self.layers, self.batch_size = layers, batch_size  # in a list, the layers are no part of the model

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., in_features) -> (B, ..., out_features)."""
        if x.shape[0] != self.batch_size:
            raise ValueError(
                f"adapter_names names {self.batch_size} rows, and a layer got {tuple(x.shape)}: the batch must come first, "
                "a row for each name; a loss that gives the head chunks of tokens has lost the rows: find it from the logits"
            )
        groups = [
            Group(rows, *layer.factors(), layer.scaling, layer.slices, layer.lora_dropout if self.training else 0.0)
            for rows, layer in self.layers
        ]
        return grouped_lora_linear(x, self.weight.T if self.fan_in_fan_out else self.weight, self.bias, groups)


@contextmanager
def mixed_batch(model: nn.Module, adapter_names: Sequence[str]) -> Iterator[nn.Module]:
    """Inside a with statement, row i of every batch uses the adapter adapter_names[i], or none where that is "__base__".

    Backward of a model under activation checkpointing must run inside too. The adapters' factors keep their requires_grad, and
    are no part of model.parameters() meanwhile.

    Raises:
        ValueError: there is no such adapter, one is more than low-rank pairs of linear layers, or a layer is merged.
    """
    adapters = adapters_of(model)
    named = {name: adapters[name] for name in dict.fromkeys(adapter_names) if name != BASE}
    rows = {name: [i for i, other in enumerate(adapter_names) if other == name] for name in named}
    others = [
        f"{path} is {type(module).__name__} in {name}"
        for name, adapter in named.items()
        for path, module in adapter.modules.items()
        if type(module) not in MIXABLE
    ]
    if others:
        raise ValueError(
            "rows can differ in the plain adapters of linear layers alone (no DoRA, lora_bias or modules_to_save), and "
            f"{', '.join(others)}: give such rows a batch of their own, with set_adapter"
        )
    mixed = {}
    for path, module in adapters.base.items():
        layers = [(rows[name], adapter.layers[path]) for name, adapter in named.items() if path in adapter.layers]
        if layers:
            device = module.weight.device
            layers = [(torch.tensor(indices, device=device), moved(layer, device)) for indices, layer in layers]
            mixed[path] = MixedLinear(module, layers, len(adapter_names))
    with placed(model, mixed):
        yield model
