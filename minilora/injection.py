"""Adapters into any model: the linear layers that a LoraConfig names are replaced, in this one place.

A layer with an attribute `packed`, a dict of names to rows, is several layers fused into one (Phi-3's qkv_proj is q_proj, k_proj
and v_proj); each of those names is a target too, and gives its own rows an adapter of their own.
"""

import re
from dataclasses import dataclass

import torch
from torch import nn

from minilora.config import LoraConfig
from minilora.kernels.lora_linear import Slices
from minilora.layers import Linear, MergedLinear, enabled_slices
from minilora.switching import Adapter, adapters_of, add_adapter, base_modules


@dataclass(frozen=True)
class Target:
    """A layer to adapt: whole when `enabled` is empty, else those of the layers fused in it."""

    path: str
    module: nn.Linear
    enabled: tuple[str, ...]
    r: int
    lora_alpha: float

    def layer(self, config: LoraConfig, dtype: torch.dtype | None) -> Linear:
        """The same layer with its adapter, around the same weight; dtype None for the weight's own."""
        settings = {
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": config.lora_dropout,
            "use_rslora": config.use_rslora,
        }
        dtype = dtype or self.module.weight.dtype
        if not self.enabled:
            return Linear.around(self.module, dtype, **settings)
        return MergedLinear.around(self.module, dtype, **self._splits(), **settings)

    @property
    def slices(self) -> Slices:
        """(start, stop) of the outputs that each adapter adds to."""
        return enabled_slices(**self._splits()) if self.enabled else ((0, self.module.out_features),)

    def _splits(self) -> dict[str, list]:
        packed = self.module.packed
        return {"enable_lora": [name in self.enabled for name in packed], "out_splits": list(packed.values())}

    @property
    def parameters(self) -> int:
        """How many an adapter of this layer trains."""
        return self.r * sum(self.module.in_features + stop - start for start, stop in self.slices)


def inject(
    model: nn.Module, config: LoraConfig, dtype: torch.dtype | None = torch.float32, adapter_name: str = "default"
) -> nn.Module:
    """Replaces every linear layer that config.target_modules names by one with an adapter, in place; returns the model.

    Names match by PEFT's rules: an entry of a list is a module's path or the end of one after a dot; a string is a regular
    expression for whole paths, or "all-linear". The model's own parameters stay the same objects; what is trained is decided
    by mark_only_lora_as_trainable. A model that has adapters gets one more beside them, the active one then (minilora.switching).

    Args:
        dtype: of the adapters; each weight's own when None. float32 keeps small updates that bfloat16 would round away.

    Raises:
        ValueError: a name matches nothing, a layer is named both whole and by slice, slices of one layer have unlike ranks, the
            model has an adapter of that name, or layers with adapters of its own, or a layer is merged; the model is unchanged.
    """
    if not adapters_of(model).named and any(isinstance(module, Linear) for module in model.modules()):
        raise ValueError("this model is made with adapters already: inject takes one of plain layers")
    layers = {target.path: target.layer(config, dtype) for target in find_targets(model, config)}
    add_adapter(model, adapter_name, Adapter(config, layers))
    return model


def find_targets(model: nn.Module, config: LoraConfig) -> list[Target]:
    """The layers that inject would replace, in the model's order; errors as there."""
    wanted, hit, faults, targets = config.target_modules, set(), [], []
    for path, module in base_modules(model).items():
        if not isinstance(module, nn.Linear):
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
            paths = [prefix + name for name in enabled] or [path]
            settings = {(config.rank(path), config.alpha(path)) for path in paths}
            if len(settings) > 1:
                faults.append(
                    f"the slices {', '.join(enabled)} of {path} must share one r and lora_alpha, not {sorted(settings)}"
                )
            targets.append(Target(path, module, enabled, *settings.pop()))
    unmatched = {wanted} - hit if isinstance(wanted, str) else set(wanted) - hit
    if unmatched:
        faults.append(f"target_modules {sorted(unmatched)} match no linear layer; this model has {', '.join(_names(model))}")
    if faults:
        raise ValueError("; ".join(faults))
    return targets


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
    """The last names of all linear layers, each with the names of the layers fused in it."""
    names = {}
    for path, module in base_modules(model).items():
        if isinstance(module, nn.Linear):
            packed = ", ".join(getattr(module, "packed", ()))
            names[path.rpartition(".")[2] + (f" ({packed})" if packed else "")] = None
    return list(names)
