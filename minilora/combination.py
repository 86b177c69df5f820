"""A weighted sum of adapters as one adapter, exactly: their ranks stand side by side, and may be unlike.

    Σ_i w_i s_i B_i A_i = B A        A = [A_1; A_2; …] (Σ r_i, in),  B = [w_1 s_1 B_1, w_2 s_2 B_2, …] (out, Σ r_i)

Adding up the A's and the B's of equal ranks, each for itself, is another thing and not offered: (B_1 + B_2)(A_1 + A_2) holds the
products B_1 A_2 and B_2 A_1 too, which nobody trained. PEFT calls that one "linear", and this one "cat".
"""

import math
import re
from collections.abc import Sequence
from functools import reduce

import torch
from torch import nn

from minilora.adapter import fuse
from minilora.config import LoraConfig
from minilora.layers import Linear
from minilora.switching import Adapter, adapters_of, add_adapter


@torch.no_grad()
def add_weighted_adapter(model: nn.Module, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
    """Adds an adapter whose ΔW is the weighted sum of the named adapters' in every layer, and makes it the active one.

    A layer that only some of them adapt is adapted by those. Ranks add up; dropout is 0, and every scaling 1.

    Args:
        weights: one for each of the adapters, of any sign.
        adapter_name: of the sum.

    Raises:
        ValueError: there is no such adapter, one adapts other layers than linear ones, a weight is missing or not finite, the
            name is taken, or a layer is merged; the model is unchanged.
    """
    if not adapters or len(adapters) != len(weights) or not all(map(math.isfinite, weights)):
        raise ValueError(f"each adapter must have one finite weight, not {list(weights)} for {list(adapters)}")
    parts: dict[str, list[tuple[float, Linear]]] = {}
    for name, weight in zip(adapters, weights, strict=True):
        for path, layer in adapters_of(model)[name].layers.items():
            parts.setdefault(path, []).append((weight, layer))
    others = [path for path, layers in parts.items() if not all(isinstance(layer, Linear) for _, layer in layers)]
    if others:
        raise ValueError(f"adapters of linear layers can be added up, and these are of others: {', '.join(others)}")
    base = adapters_of(model).base
    layers = {path: _sum(base[path], weighted) for path, weighted in parts.items()}
    add_adapter(model, adapter_name, Adapter(_config(layers), layers))


def _sum(linear: nn.Linear, weighted: list[tuple[float, Linear]]) -> Linear:
    """One layer around a linear layer's own weight, with the weighted sum of other layers' adapters."""
    dtype = reduce(torch.promote_types, [layer.lora_A.dtype for _, layer in weighted])
    r = sum(layer.lora_A.shape[0] for _, layer in weighted)
    added = Linear.around(linear, dtype, r=r, lora_alpha=r)
    added.lora_A.copy_(torch.cat([layer.lora_A.to(dtype) for _, layer in weighted]))
    scaled = [
        weight * layer.scaling * fuse(layer.lora_B.to(dtype), layer.slices, layer.out_features) for weight, layer in weighted
    ]
    added.lora_B.copy_(torch.cat(scaled, dim=1))
    return added


def _config(layers: dict[str, Linear]) -> LoraConfig:
    ranks = {f"^{re.escape(path)}": layer.r for path, layer in layers.items()}
    r = max(ranks.values())
    unlike = {path: rank for path, rank in ranks.items() if rank != r}
    return LoraConfig(r=r, lora_alpha=r, target_modules=list(layers), rank_pattern=unlike, alpha_pattern=unlike)
