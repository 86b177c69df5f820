"""Adapters into any model and out again: the layers that a LoraConfig names are replaced, in this one place.

A layer with an attribute `packed`, a dict of names to rows, is several layers fused into one (Phi-3's qkv_proj is q_proj, k_proj
and v_proj); each of those names is a target too, and gives its own rows an adapter of their own.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minilora.adapters.config import LOFTQ, LoraConfig
from minilora.adapters.convolution import Conv1d, Conv2d, Conv3d
from minilora.adapters.dora import DoraLinear
from minilora.adapters.embedding import Embedding
from minilora.adapters.layers import Linear, LoRALayer, MergedLinear, adapted_layers, enabled_slices
from minilora.adapters.loftq import start_by_loftq
from minilora.adapters.lora_bias import BiasedLinear
from minilora.adapters.matching import hits, meant, saved_whole
from minilora.adapters.offset import STARTS, OffsetLinear
from minilora.adapters.switching import Adapter, adapters_of, add_adapter, place, placed
from minilora.adapters.tying import faults_of_tying, followers, with_shared_adapters
from minilora.kernels.linear import Linear as PlainLinear
from minilora.kernels.lora_linear import Slices
from minilora.kernels.nf4_tensor import NF4Tensor

KINDS = {PlainLinear: Linear, nn.Linear: Linear, nn.Embedding: Embedding, nn.Conv1d: Conv1d, nn.Conv2d: Conv2d, nn.Conv3d: Conv3d}


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
        if config.use_dora:
            return DoraLinear.around(self.module, dtype, device, **self._splits(), **settings)
        if config.lora_bias:
            return BiasedLinear.around(self.module, dtype, device, **self._splits(), **settings)
        if config.init_lora_weights in STARTS:
            settings["start"] = config.init_lora_weights
            return OffsetLinear.around(self.module, dtype, device, **self._splits(), **settings)
        if self.enabled:
            return MergedLinear.around(self.module, dtype, device, **self._splits(), **settings)
        return KINDS[plain_kind(self.module)].around(self.module, dtype, device, **settings)

    @property
    def slices(self) -> Slices:
        """(start, stop) of the rows of the weight that each adapter adds to."""
        return enabled_slices(**self._splits())

    def _splits(self) -> dict[str, list]:
        if not self.enabled:
            return {"enable_lora": [True], "out_splits": [getattr(self.module, "out_features", len(self.module.weight))]}
        packed = self.module.packed
        return {"enable_lora": [name in self.enabled for name in packed], "out_splits": list(packed.values())}


def plain_kind(module: nn.Module) -> type[nn.Module] | None:
    """The kind of layer that a module is, among those that take an adapter."""
    return next((kind for kind in KINDS if isinstance(as_linear(module), kind)), None)


def as_linear(module: nn.Module) -> nn.Module:
    """GPT-2's Conv1D, a linear layer that stores its weight as (in, out), as nn.Linear with the same parameters; others as is."""
    if type(module).__name__ != "Conv1D" or not hasattr(module, "nf"):
        return module
    linear = nn.Linear.__new__(nn.Linear)
    vars(linear).update(vars(module), in_features=module.nx, out_features=module.nf, fan_in_fan_out=True)
    return linear


def inject(
    model: nn.Module,
    config: LoraConfig,
    dtype: torch.dtype | None = torch.float32,
    adapter_name: str = "default",
    original: Callable[[str], Tensor] | None = None,
) -> nn.Module:
    """Replaces every linear layer, embedding and convolution that config.target_modules names by one with an adapter, in place.

    Names match by PEFT's rules: an entry of a list is a module's path or the end of one after a dot; a string is a regular
    expression for whole paths, or "all-linear". The model's own parameters stay the same objects under the same names; what is
    trained is decided by mark_only_lora_as_trainable. Modules to save are replaced by copies. What is tied to an embedding
    shares its adapter, or its copy, unless config.ensure_weight_tying is False (tying.py). A model that has adapters gets one
    more beside them, the active one then (switching.py). remove undoes it all.

    Args:
        dtype: of the adapters; each weight's own when None. float32 keeps small updates that bfloat16 would round away.
        original: for init_lora_weights = "loftq": gives the weight of a name as it was before it became 4-bit.

    Returns:
        The model.

    Raises:
        ValueError: a name matches nothing, a layer is named both whole and by slice or computes in a way of its own, slices of
            one layer or tied modules have unlike ranks, the model has an adapter of that name, one that contradicts this one, or
            layers made with adapters, or a layer is merged; all faults of the targets at once, and the model is unchanged.
    """
    if adapted_layers(model) and not adapters_of(model).named:
        raise ValueError("this model is made with adapters already: inject takes one of plain layers")
    adapter = make_adapter(model, config, dtype)
    if config.init_lora_weights == "loftq":
        iterations = (LOFTQ | config.loftq_config)["loftq_iter"]
        _check_loftq(model, original, iterations)
        start_by_loftq(adapter.layers, original, iterations)
    add_adapter(model, adapter_name, adapter)
    return model


def _check_loftq(model: nn.Module, original: Callable | None, iterations: int) -> None:
    if original is None:
        raise ValueError(
            'init_lora_weights = "loftq" needs the weights as they were before: inject(…, original=…), a function of their names '
            "(phi3.Checkpoint(path).tensor)"
        )
    if iterations > 1 and adapters_of(model).named:
        raise ValueError("a loftq_iter above 1 changes the 4-bit weights, which the model's other adapters were made for")


def make_adapter(model: nn.Module, config: LoraConfig, dtype: torch.dtype | None) -> Adapter:
    """What inject puts into the model, which does not change."""
    with placed(model, {}):
        layers = {target.path: target.layer(config, dtype) for target in find_targets(model, config)}
        if config.ensure_weight_tying:
            layers = with_shared_adapters(layers)
        saved = saved_modules(model, config)
        memo = {} if config.ensure_weight_tying else None  # with one memo, what modules share their copies share too
        copies = {module: copy.deepcopy(module, memo) for module in saved.values()}
    return Adapter(config, layers, {path: copies[module] for path, module in saved.items()})


def saved_modules(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """The modules that config.modules_to_save names and what is tied to them, the outermost of nested ones."""
    modules = dict(model.named_modules(remove_duplicate=False))
    chosen = {path for path in modules if path and saved_whole(path, config)}
    chosen |= followers(model, chosen, config)
    nested = {path for path in chosen if any(path.startswith(f"{outer}.") for outer in chosen)}
    return {path: module for path, module in modules.items() if path in chosen - nested}


def remove(model: nn.Module) -> nn.Module:
    """Puts the modules that inject replaced back in their places, the same objects with the same parameters; returns the model.

    All adapters go, those that are not active too. Parameters that were frozen stay so; biases that were trained in place stay
    trained.

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
    named = _meant_whole(model, config)
    following = followers(model, named, config)
    for path, module in model.named_modules():
        if not _fits_kind(module, config) and path not in following:
            continue
        whole, prefix = path in named | following, path[: path.rfind(".") + 1]
        # A pattern that fits the layer means the layer, though it may fit the slices too.
        packed = () if whole and isinstance(wanted, str) else getattr(module, "packed", ())
        enabled = tuple(name for name in packed if meant(prefix + name, config))
        hit |= hits(path, config).union(*(hits(prefix + name, config) for name in packed))
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
            targets.append(Target(path, as_linear(module), enabled, *settings.pop()))
    names = {wanted} if isinstance(wanted, str) else set(wanted)
    if names - hit or not (targets or faults):
        faults.append(
            f"target_modules {sorted(names - hit or names)} match no linear layer, embedding or convolution; this model has "
            f"{', '.join(_names(model))}"
        )
    faults += _faults_of_others(model, config, targets)
    faults += faults_of_tying(model, named, config)
    if faults and following:
        faults.append(f"{', '.join(sorted(following))} would follow, being tied: ensure_weight_tying = False leaves it alone")
    if faults:
        raise ValueError("; ".join(faults))
    return targets


def _fits_kind(module: nn.Module, config: LoraConfig) -> bool:
    """Whether a module is a layer of a kind that the targets may be of."""
    kind = plain_kind(module)
    return KINDS.get(kind) is Linear or (kind is not None and config.target_modules != "all-linear")


def _meant_whole(model: nn.Module, config: LoraConfig) -> set[str]:
    """The paths of the layers that config names itself, and not by slices alone."""
    fit = {path for path, module in model.named_modules() if _fits_kind(module, config) and meant(path, config)}
    return fit - saved_modules(model, config).keys()


def _faults_of_others(model: nn.Module, config: LoraConfig, targets: list[Target]) -> list[str]:
    """What is wrong with modules_to_save, and with ranks that a start from the weight cannot have."""
    named = set().union(*(saved_whole(path, config) for path, _ in model.named_modules(remove_duplicate=False)))
    unmatched = sorted(set(config.modules_to_save or []) - named)
    faults = [f"modules_to_save {unmatched} match no module"] if unmatched else []
    faults += [
        f"modules_to_save: {path} has 4-bit weights, which cannot be trained"
        for path, module in saved_modules(model, config).items()
        if any(isinstance(parameter, NF4Tensor) for parameter in module.parameters())
    ]
    start = config.init_lora_weights
    if config.use_dora or config.lora_bias or start is not True:
        others = [target.path for target in targets if not isinstance(target.module, nn.Linear)]
        if others:
            faults.append(f"use_dora, lora_bias and init_lora_weights are for linear layers, and not for {', '.join(others)}")
    if start is not True and not faults:
        for target in targets:
            most = min(target.module.in_features, *(stop - start for start, stop in target.slices))
            if target.r > most:
                faults.append(f"{target.path} starts by {start} and must have r of at most {most}, not {target.r}")
        faults += _unfit_for_start(start, targets)
    return faults


def _unfit_for_start(start: str, targets: list[Target]) -> list[str]:
    """LoftQ starts at what a 4-bit weight lost; PiSSA and OLoRA at the weight itself, which a 4-bit one is no more."""
    rounded = {target.path for target in targets if isinstance(target.module.weight, NF4Tensor)}
    others = [target.path for target in targets if target.path not in rounded]
    if start == "loftq" and others:
        return [
            f'init_lora_weights = "loftq" is for 4-bit weights, which {", ".join(others)} have not: load the model with '
            'quantize="nf4"'
        ]
    if start in STARTS and rounded:
        return [
            f'init_lora_weights = "{start}" starts from the weight itself, and {", ".join(sorted(rounded))} hold what is left '
            'of it in 4 bits: load the model in 16 bits, or start by "loftq"'
        ]
    return []


def _unfit(path: str, module: nn.Module, model: nn.Module) -> str | None:
    """Why an adapter around this module would be passed over, or would pass over what the module does."""
    if not path:
        return "it is the model itself, and has no place in another module"
    parent = model.get_submodule(path.rpartition(".")[0])
    if type(as_linear(module)).forward is not plain_kind(module).forward or "forward" in vars(module):
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


def _names(model: nn.Module) -> list[str]:
    """The last names of all layers that take an adapter, each with the names of the layers fused in it."""
    names = {}
    for path, module in model.named_modules():
        if plain_kind(module):
            packed = ", ".join(getattr(module, "packed", ()))
            names[path.rpartition(".")[2] + (f" ({packed})" if packed else "")] = None
    return list(names)
