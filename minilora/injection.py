"""Adapters into any model and out again: the layers that a LoraConfig names are replaced, in this one place.

A layer with an attribute `packed`, a dict of names to rows, is several layers fused into one (Phi-3's qkv_proj is q_proj, k_proj
and v_proj); each of those names is a target too, and gives its own rows an adapter of their own.
"""

import re
from dataclasses import dataclass

import torch
from torch import nn

from minilora.config import LoraConfig
from minilora.convolution import Conv1d, Conv2d, Conv3d
from minilora.embedding import Embedding
from minilora.kernels.lora_linear import Slices
from minilora.layers import Linear, LoRALayer, MergedLinear, adapted_layers, enabled_slices
from minilora.switching import Adapter, adapters_of, add_adapter, base_modules, place

KINDS = {nn.Linear: Linear, nn.Embedding: Embedding, nn.Conv1d: Conv1d, nn.Conv2d: Conv2d, nn.Conv3d: Conv3d}


@dataclass(frozen=True)
class Target:
    """A layer to adapt: whole when `enabled` is empty, else those of the layers fused in it."""

    path: str
    module: nn.Module
    enabled: tuple[str, ...]
    r: int
    lora_alpha: float

    def layer(self, config: LoraConfig, dtype: torch.dtype | None, device=None) -> LoRALayer:
        """The same layer with its adapter, around the same weight; dtype and device None for the weight's own."""
        settings = {
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": config.lora_dropout,
            "use_rslora": config.use_rslora,
        }
        dtype = dtype or self.module.weight.dtype
        if self.enabled:
            return MergedLinear.around(self.module, dtype, device, **self._splits(), **settings)
        return KINDS[plain_kind(self.module)].around(self.module, dtype, device, **settings)

    @property
    def slices(self) -> Slices:
        """(start, stop) of the rows of the weight that each adapter adds to."""
        return enabled_slices(**self._splits()) if self.enabled else ((0, len(self.module.weight)),)

    def _splits(self) -> dict[str, list]:
        packed = self.module.packed
        return {"enable_lora": [name in self.enabled for name in packed], "out_splits": list(packed.values())}

    @property
    def parameters(self) -> int:
        """How many an adapter of this layer trains."""
        layer = self.layer(LoraConfig(), None, device="meta")
        return layer.lora_A.numel() + layer.lora_B.numel()


def plain_kind(module: nn.Module) -> type[nn.Module] | None:
    """The kind of layer that a module is, among those that take an adapter."""
    return next((kind for kind in KINDS if isinstance(module, kind)), None)


def inject(
    model: nn.Module, config: LoraConfig, dtype: torch.dtype | None = torch.float32, adapter_name: str = "default"
) -> nn.Module:
    """Replaces every linear layer, embedding and convolution that config.target_modules names by one with an adapter, in place.

    Names match by PEFT's rules: an entry of a list is a module's path or the end of one after a dot; a string is a regular
    expression for whole paths, or "all-linear". The model's own parameters stay the same objects under the same names; what is
    trained is decided by mark_only_lora_as_trainable. A model that has adapters gets one more beside them, the active one then
    (minilora.switching). remove undoes it.

    Args:
        dtype: of the adapters; each weight's own when None. float32 keeps small updates that bfloat16 would round away.

    Returns:
        The model.

    Raises:
        ValueError: a name matches nothing, a layer is named both whole and by slice or computes in a way of its own, slices of
            one layer have unlike ranks, the model has an adapter of that name, or layers made with adapters, or a layer is
            merged; all faults of the targets at once, and the model is unchanged.
    """
    if adapted_layers(model) and not adapters_of(model).named:
        raise ValueError("this model is made with adapters already: inject takes one of plain layers")
    layers = {target.path: target.layer(config, dtype) for target in find_targets(model, config)}
    add_adapter(model, adapter_name, Adapter(config, layers))
    return model


def remove(model: nn.Module) -> nn.Module:
    """Puts the modules that inject replaced back in their places, the same objects with the same parameters; returns the model.

    All adapters go, those that are not active too. Parameters that were frozen stay so.

    Raises:
        ValueError: the model has no adapter, one is merged into its weight, or a layer was made with its adapter, so that there
            is none to put back; the model is unchanged.
    """
    layers, base = adapted_layers(model), adapters_of(model).base
    if not layers:
        raise ValueError("the model has no adapter to remove")
    faults = [f"{path} is merged: unmerge it first" for path, layer in layers.items() if layer.merged]
    faults += [f"{path} was made with its adapter, not by inject" for path in layers if path not in base]
    if faults:
        raise ValueError("; ".join(faults))
    place(model, {})
    del model.lora_adapters, model.lora_config
    return model


def find_targets(model: nn.Module, config: LoraConfig) -> list[Target]:
    """The layers that inject would replace, in the model's order; errors as there."""
    wanted, hit, faults, targets = config.target_modules, set(), [], []
    for path, module in base_modules(model).items():
        kind = plain_kind(module)
        if kind is None or (wanted == "all-linear" and kind is not nn.Linear):
            continue
        whole = _matches(path, wanted, hit)
        prefix = path[: path.rfind(".") + 1]
        if whole and isinstance(wanted, str):
            enabled = ()  # a pattern that fits the layer means the layer, though it may fit the slices too
        else:
            enabled = tuple(name for name in getattr(module, "packed", ()) if _matches(prefix + name, wanted, hit))
        if whole and enabled:
            faults.append(f"{path} is named whole and by its slices {', '.join(enabled)}: name one or the other")
        elif whole or enabled:
            if reason := _unfit(path, module, model):
                faults.append(f"{path} cannot take an adapter: {reason}")
            paths = [prefix + name for name in enabled] or [path]
            settings = {(config.rank(path), config.alpha(path)) for path in paths}
            if len(settings) > 1:
                faults.append(
                    f"the slices {', '.join(enabled)} of {path} must share one r and lora_alpha, not {sorted(settings)}"
                )
            targets.append(Target(path, module, enabled, *settings.pop()))
    unmatched = {wanted} - hit if isinstance(wanted, str) else set(wanted) - hit
    if unmatched:
        faults.append(
            f"target_modules {sorted(unmatched)} match no linear layer, embedding or convolution; this model has "
            f"{', '.join(_names(model))}"
        )
    if faults:
        raise ValueError("; ".join(faults))
    return targets


def _unfit(path: str, module: nn.Module, model: nn.Module) -> str | None:
    """Why an adapter around this module would be passed over, or would pass over what the module does."""
    if not path:
        return "it is the model itself, and has no place in another module"
    parent = model.get_submodule(path.rpartition(".")[0])
    if type(module).forward is not plain_kind(module).forward or "forward" in vars(module):
        return f"{type(module).__name__} computes in a way of its own"
    if "weight" not in dict(module.named_parameters(recurse=False)):
        return "its weight is computed from other parameters"
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weight without calling it"
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        return (
            "nn.TransformerEncoderLayer reads its weight without calling it, outside training; first call "
            "torch.backends.mha.set_fastpath_enabled(False)"
        )
    return None


def _matches(path: str, wanted: list[str] | str, hit: set[str]) -> bool:
    """Whether a module's path is wanted; adds to hit the entries that say so."""
    if wanted == "all-linear":
        matching = {wanted} if path.rpartition(".")[2] != "lm_head" else set()  # PEFT's rule: every linear but the head
    elif isinstance(wanted, str):
        matching = {wanted} if re.fullmatch(wanted, path) else set()
    else:
        matching = {name for name in wanted if path == name or path.endswith("." + name)}
    hit |= matching
    return bool(matching)


def _names(model: nn.Module) -> list[str]:
    """The last names of all layers that take an adapter, each with the names of the layers fused in it."""
    names = {}
    for path, module in base_modules(model).items():
        if plain_kind(module):
            packed = ", ".join(getattr(module, "packed", ()))
            names[path.rpartition(".")[2] + (f" ({packed})" if packed else "")] = None
    return list(names)
