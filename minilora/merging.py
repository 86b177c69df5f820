"""Adapters into the weights and out again: W + scaling · B A, found in float32 and rounded once to the weight's dtype."""

import torch
from torch import nn

from minilora.layers import LoRALayer, adapted_layers
from minilora.lora_bias import BiasedLinear


def _layers(model: nn.Module, merged: bool) -> dict[str, LoRALayer]:
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("the model has no adapter to merge or unmerge")
    wrong = [path for path, layer in layers.items() if layer.merged != merged]
    if wrong:
        state = "merged already" if not merged else "not merged"
        raise ValueError(f"{len(wrong)} adapted layers are {state}: {', '.join(wrong)}")
    return layers


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Adds every adapter to its layer's weight, so that the layer costs no more than a plain one.

    The base weights are kept aside, on the same device, for unmerge: adapted layers take twice their memory.

    Raises:
        ValueError: there is no adapter, one is merged already, a weight is shared with another module, or a merged weight would
            not be finite; nothing changes then.
    """
    layers, merged = _layers(model, merged=False), {}
    biased = [path for path, layer in layers.items() if isinstance(layer, BiasedLinear)]
    if biased:
        raise ValueError(f"lora_bias cannot be merged into a weight; it stands in {', '.join(biased)}")
    shared = _shared_weights(model, layers)
    if shared:
        raise ValueError(f"a merged weight must be its layer's alone, and these are one weight: {'; '.join(shared)}")
    for path, layer in layers.items():
        weight, delta = layer.weight.detach().clone(), layer.delta()
        widths = [stop - start for start, stop in layer.slices]
        rows = weight.T if layer.fan_in_fan_out else weight
        for (start, stop), part in zip(layer.slices, delta.split(widths), strict=True):
            rows[start:stop] = rows[start:stop].to(part.dtype) + part  # rounded once, here
        merged[path] = weight
    infinite = [path for path, weight in merged.items() if not weight.isfinite().all()]
    if infinite:
        raise ValueError(f"merged weights must be finite; NaN or infinity came out in {', '.join(infinite)}: check the adapter")
    for path, layer in layers.items():
        layer.base_weight, layer.weight.data, layer.merged = layer.weight.data, merged[path], True


def _shared_weights(model: nn.Module, layers: dict[str, LoRALayer]) -> list[str]:
    """For each adapted layer whose weight other modules use too, the names of all."""
    owners = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, []).append(name)
    return [" and ".join(owners[layer.weight]) for layer in layers.values() if len(owners[layer.weight]) > 1]


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Restores every layer's weight as it was before merge, bit for bit.

    Raises:
        ValueError: there is no adapter, or one is not merged.
    """
    for layer in _layers(model, merged=True).values():
        layer.weight.data, layer.merged = layer.base_weight, False
        del layer.base_weight
