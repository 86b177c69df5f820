"""Adapters into any model: the linear layers that a LoraConfig names are replaced, in this one place.

A layer with an attribute `packed`, a dict of names to rows, is several layers fused into one (Phi-3's qkv_proj is q_proj, k_proj
and v_proj); each of those names is a target too, and gives its own rows an adapter of their own.
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn

from minilora.config import LoraConfig
from minilora.dora import DoraLinear
from minilora.kernels.lora_linear import Slices
from minilora.layers import Linear, MergedLinear, enabled_slices
from minilora.lora_bias import BiasedLinear
from minilora.matching import hits, meant, saved_whole
from minilora.offset import OffsetLinear


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
        if config.use_dora:
            return DoraLinear.around(self.module, dtype, **self._splits(), **settings)
        if config.lora_bias:
            return BiasedLinear.around(self.module, dtype, **self._splits(), **settings)
        if config.init_lora_weights is not True:
            return OffsetLinear.around(self.module, dtype, start=config.init_lora_weights, **self._splits(), **settings)
        if self.enabled:
            return MergedLinear.around(self.module, dtype, **self._splits(), **settings)
        return Linear.around(self.module, dtype, **settings)

    @property
    def slices(self) -> Slices:
        """(start, stop) of the outputs that each adapter adds to."""
        return enabled_slices(**self._splits())

    def _splits(self) -> dict[str, list]:
        if not self.enabled:
            return {"enable_lora": [True], "out_splits": [self.module.out_features]}
        packed = self.module.packed
        return {"enable_lora": [name in self.enabled for name in packed], "out_splits": list(packed.values())}


def inject(model: nn.Module, config: LoraConfig, dtype: torch.dtype | None = torch.float32) -> nn.Module:
    """Replaces every linear layer that config.target_modules names by one with an adapter, in place; returns the model.

    Names match by PEFT's rules: an entry of a list is a module's path or the end of one after a dot; a string is a regular
    expression for whole paths, or "all-linear". The model's own parameters stay the same objects; what is trained is decided
    by mark_only_lora_as_trainable. Modules to save are replaced by copies, so that the originals stay as they are; a copied
    head that was tied to the embedding is no longer.

    Args:
        dtype: of the adapters; each weight's own when None. float32 keeps small updates that bfloat16 would round away.

    Raises:
        ValueError: a name matches nothing, a layer is named both whole and by slice or has an adapter already, or slices of
            one layer have unlike ranks; all faults at once, and the model is unchanged.
    """
    if any(isinstance(module, Linear) for module in model.modules()):
        raise ValueError("this model has adapters already: load it anew to inject others")
    return install(model, config, replacements(model, config, dtype))


def replacements(model: nn.Module, config: LoraConfig, dtype: torch.dtype | None) -> dict[str, nn.Module]:
    """What inject would put into the model, by path: layers with adapters, and copies of the modules to save."""
    modules = {target.path: target.layer(config, dtype) for target in find_targets(model, config)}
    return modules | {path: copy.deepcopy(module) for path, module in saved_modules(model, config).items()}


def install(model: nn.Module, config: LoraConfig, modules: dict[str, nn.Module]) -> nn.Module:
    """Puts replacements in their places."""
    for path, module in modules.items():
        model.set_submodule(path, module)
    model.lora_config = config
    return model


def saved_modules(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """The modules that config.modules_to_save names, the outermost of nested ones."""
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if path and saved_whole(path, config) and not any(path.startswith(f"{outer}.") for outer in found):
            found[path] = module
    return found


def find_targets(model: nn.Module, config: LoraConfig) -> list[Target]:
    """The layers that inject would replace, in the model's order; errors as there."""
    wanted, hit, faults, targets = config.target_modules, set(), [], []
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        whole, prefix = meant(path, config), path[: path.rfind(".") + 1]
        # A pattern that fits the layer means the layer, though it may fit the slices too.
        packed = () if whole and isinstance(wanted, str) else getattr(module, "packed", ())
        enabled = tuple(name for name in packed if meant(prefix + name, config))
        hit |= hits(path, config).union(*(hits(prefix + name, config) for name in packed))
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
    names = {wanted} if isinstance(wanted, str) else set(wanted)
    if names - hit or not (targets or faults):
        nowhere = sorted(names - hit or names)
        faults.append(f"target_modules {nowhere} match no linear layer; this model has {', '.join(_names(model))}")
    faults += _faults_of_others(model, config, targets)
    if faults:
        raise ValueError("; ".join(faults))
    return targets


def _faults_of_others(model: nn.Module, config: LoraConfig, targets: list[Target]) -> list[str]:
    """What is wrong with modules_to_save, and with ranks that a start from the weight cannot have."""
    named = set().union(*(saved_whole(path, config) for path, _ in model.named_modules(remove_duplicate=False)))
    unmatched = sorted(set(config.modules_to_save or []) - named)
    faults = [f"modules_to_save {unmatched} match no module"] if unmatched else []
    start = config.init_lora_weights
    if start is not True:
        for target in targets:
            most = min(target.module.in_features, *(stop - start for start, stop in target.slices))
            if target.r > most:
                faults.append(f"{target.path} starts by {start} and must have r of at most {most}, not {target.r}")
    return faults


def _names(model: nn.Module) -> list[str]:
    """The last names of all linear layers, each with the names of the layers fused in it."""
    names = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            packed = ", ".join(getattr(module, "packed", ()))
            names[path.rpartition(".")[2] + (f" ({packed})" if packed else "")] = None
    return list(names)
