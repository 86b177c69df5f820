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
from torch import Tensor, nn

from minilora.adapters.config import LoraConfig
from minilora.adapters.injection import KINDS, as_linear, plain_kind
from minilora.adapters.layers import LoRALayer, MergedLinear
from minilora.adapters.offset import OffsetLinear
from minilora.adapters.peft_tensors import by_slices, fuse
from minilora.adapters.switching import Adapter, adapters_of, add_adapter
from minilora.adapters.tying import TiedLinear, with_shared_adapters

SUMMABLE = {*KINDS.values(), MergedLinear, OffsetLinear, TiedLinear}  # what they add is their factors() and no more


@torch.no_grad()
def add_weighted_adapter(model: nn.Module, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
    """Adds an adapter whose ΔW is the weighted sum of the named adapters' in every layer, and makes it the active one.

    A layer that only some of them adapt is adapted by those. Ranks add up; dropout is 0, and every scaling 1.

    Args:
        weights: one for each of the adapters, of any sign.
        adapter_name: of the sum.

    Raises:
        ValueError: there is no such adapter, one is more than B A in some layer, a weight is missing or not finite, the
            name is taken, or a layer is merged; the model is unchanged.
    """
    if not adapters or len(adapters) != len(weights) or not all(map(math.isfinite, weights)):
        raise ValueError(f"each adapter must have one finite weight, not {list(weights)} for {list(adapters)}")
    parts: dict[str, list[tuple[float, nn.Module]]] = {}
    for name, weight in zip(adapters, weights, strict=True):
        for path, module in adapters_of(model)[name].modules.items():
            parts.setdefault(path, []).append((weight, module))
    others = [path for path, weighted in parts.items() if any(type(module) not in SUMMABLE for _, module in weighted)]
    if others:
        raise ValueError(
            "an adapter must be one product B A a layer to be added up (no DoRA, lora_bias or modules_to_save), and is more in "
            f"{', '.join(others)}: switch to it with set_adapter instead"
        )
    base = adapters_of(model).base
    layers = {path: _sum(base[path], weighted) for path, weighted in parts.items()}
    alike: dict[tuple[Tensor, ...], list[str]] = {}  # the adapters that are summed → the paths where they are, several where tied
    for path, weighted in parts.items():
        alike.setdefault(tuple(layer.lora_A for _, layer in weighted), []).append(path)
    for paths in alike.values():
        layers |= with_shared_adapters({path: layers[path] for path in paths})
    add_adapter(model, adapter_name, Adapter(_config(layers), layers))


def _sum(module: nn.Module, weighted: list[tuple[float, LoRALayer]]) -> LoRALayer:
    """One layer around a module's own weight, with the weighted sum of other layers' adapters."""
    dtype = reduce(torch.promote_types, [layer.lora_A.dtype for _, layer in weighted])
    pairs = [_whole_pair(layer) for _, layer in weighted]
    r = sum(len(A) for A, _ in pairs)
    added = KINDS[plain_kind(module)].around(as_linear(module), dtype, r=r, lora_alpha=r)
    scales = [weight * layer.scaling for weight, layer in weighted]
    added.lora_A.copy_(torch.cat([A.to(dtype) for A, _ in pairs]))
    added.lora_B.copy_(torch.cat([scale * B.to(dtype) for scale, (_, B) in zip(scales, pairs, strict=True)], dim=1))
    return added


def _whole_pair(layer: LoRALayer) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) for the whole layer, which adapters by slices are too."""
    A, B = layer.factors()
    return A, fuse(B, layer.slices, layer.out_features) if by_slices(layer) else B


def _config(layers: dict[str, LoRALayer]) -> LoraConfig:
    ranks = {f"^{re.escape(path)}": layer.r for path, layer in layers.items()}
    r = max(ranks.values())
    unlike = {path: rank for path, rank in ranks.items() if rank != r}
    tied = any(isinstance(layer, TiedLinear) for layer in layers.values())
    settings = {"rank_pattern": unlike, "alpha_pattern": unlike, "ensure_weight_tying": tied}
    return LoraConfig(r=r, lora_alpha=r, target_modules=list(layers), **settings)
