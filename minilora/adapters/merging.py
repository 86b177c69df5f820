"""Adapters into the weights and out again: W + scaling · B A, found in float32 and rounded once to the weight's dtype.

A 4-bit weight becomes a plain one of the dtype that it stands for, since rounding the sum to 4 bits would lose most of B A.
"""

import torch
from torch import Tensor, nn

from minilora.adapters.four_bit import dense
from minilora.adapters.layers import LoRALayer, adapted_layers
from minilora.adapters.lora_bias import BiasedLinear


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

    The base weights are kept aside, on the same device, for unmerge: adapted layers take twice their memory. Over 4-bit weights
    the result is the dequantised base with the adapter, which is what the adapter was trained beside.

    A weight that several modules share (tied embedding and head) stays one parameter. It is merged where all of those modules
    carry the same ΔW, as those do that share one adapter (tying.py); where they do not, no single weight computes what
    the unmerged model does, and merging is refused.

    Raises:
        ValueError: there is no adapter, one is merged already or has a bias, a merged weight would not be finite, or a shared
            weight would have to differ from module to module; nothing changes then.
    """
    layers = _layers(model, merged=False)
    biased = [path for path, layer in layers.items() if isinstance(layer, BiasedLinear)]
    if biased:
        raise ValueError(f"lora_bias cannot be merged into a weight; it stands in {', '.join(biased)}")
    merged = {path: _sum(layer).to(layer.weight.dtype) for path, layer in layers.items()}  # rounded once, here
    infinite = [path for path, weight in merged.items() if not weight.isfinite().all()]
    if infinite:
        raise ValueError(f"merged weights must be finite; NaN or infinity came out in {', '.join(infinite)}: check the adapter")
    torn = _torn_weights(model, layers)
    if torn:
        raise ValueError(
            "a weight that modules share can be merged only where all of them carry the same adapter, and these do not: "
            f"{'; '.join(torn)}: train it with ensure_weight_tying = True, or first give each module a weight of its own "
            "(minilora merge --untie)"
        )
    weights = {layer.weight: merged[path] for path, layer in layers.items()}  # one for modules that share theirs
    for layer in layers.values():
        layer.register_buffer("base_weight", layer.weight.data, persistent=False)  # a buffer, so that it moves with the model
    for layer in layers.values():
        _put(layer, weights[layer.weight])
        layer.merged = True


def _put(layer: LoRALayer, weight: Tensor) -> None:
    """Into the layer's parameter, which other modules may share; in place of it where the one is 4-bit and the other is not."""
    if type(layer.weight.data) is type(weight):
        layer.weight.data = weight
    else:
        layer.weight = nn.Parameter(weight, requires_grad=False)


def _sum(layer: LoRALayer) -> Tensor:
    """The merged weight before it is rounded."""
    delta = layer.delta()
    weight = dense(layer.weight, torch.promote_types(layer.weight.dtype, delta.dtype))
    rows = weight.T if layer.fan_in_fan_out else weight
    for (start, stop), part in zip(layer.slices, delta.split([stop - start for start, stop in layer.slices]), strict=True):
        rows[start:stop] += part
    return weight


def _torn_weights(model: nn.Module, layers: dict[str, LoRALayer]) -> list[str]:
    """The shared weights that would have to be merged into different ones, each by all its names."""
    owners: dict[nn.Parameter, dict[str, str]] = {}  # weight → path of a module that holds it → its name there
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(parameter, {})[path] = f"{path}.{name}"
    shared = [owners[weight] for weight in {layer.weight for layer in layers.values()} if len(owners[weight]) > 1]
    return [" and ".join(names.values()) for names in shared if not _merge_alike(list(names), layers)]


def _merge_alike(paths: list[str], layers: dict[str, LoRALayer]) -> bool:
    """Whether all of the modules that share a weight are adapted, and by the same ΔW up to float32's rounding."""
    if not layers.keys() >= set(paths):
        return False
    first, *others = (_sum(layers[path]) for path in paths)
    tolerance = 8 * torch.finfo(torch.float32).eps * float(first.abs().max())
    return all(torch.allclose(first, other, rtol=0, atol=tolerance) for other in others)


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Restores every layer's weight as it was before merge, bit for bit.

    Raises:
        ValueError: there is no adapter, or one is not merged.
    """
    for layer in _layers(model, merged=True).values():
        _put(layer, layer.base_weight)
        layer.merged = False
        del layer.base_weight
