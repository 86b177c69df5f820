"""Several adapters on one base: each has layers of its own around the base's own weights, and the model holds one's layers.

Switching puts modules in their places and copies nothing; modules that an adapter trains whole are copied when it is made. What
belongs to an adapter that is not active is no part of the model: parameters() and state_dict() give the active adapter, under the
same names as if it were the only one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from minilora.adapters.config import LoraConfig

BASE = "__base__"  # PEFT's name for the base without an adapter


@dataclass(frozen=True)
class Adapter:
    """One adapter: how it was made, and what it puts in place of the base's modules, by their paths."""

    config: LoraConfig
    layers: dict[str, nn.Module]  # around the base's own parameters
    copies: dict[str, nn.Module] = field(default_factory=dict)  # of modules that are trained whole, with parameters of their own

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Layers and copies."""
        return self.layers | self.copies


@dataclass
class Adapters:
    """What a model keeps as lora_adapters beside its modules; `active` may be read, and is set by set_adapter."""

    base: dict[str, nn.Module] = field(default_factory=dict)  # path → the base's own module, for all that were ever adapted
    named: dict[str, Adapter] = field(default_factory=dict)
    active: str = BASE

    def __getitem__(self, adapter_name: str) -> Adapter:
        if adapter_name not in self.named:
            raise ValueError(f"there is no adapter {adapter_name!r}; the model has {', '.join(map(repr, self.named)) or 'none'}")
        return self.named[adapter_name]


def adapters_of(model: nn.Module) -> Adapters:
    """The model's adapters; none for a model into which none was injected."""
    return getattr(model, "lora_adapters", Adapters())


def add_adapter(model: nn.Module, adapter_name: str, adapter: Adapter) -> None:
    """Takes one more adapter in, and makes it the active one.

    Raises:
        ValueError: the name is taken, a layer is merged, or adapters contradict one another; the model is unchanged.
    """
    adapters = adapters_of(model)
    if adapter_name == BASE or adapter_name in adapters.named:
        raise ValueError(f"this model has an adapter {adapter_name!r} already: choose another adapter_name")
    check_unmerged(model)
    present = {model.get_submodule(path) for path in adapter.modules}
    places = {path: module for path, module in model.named_modules(remove_duplicate=False) if module in present}
    base, named = places | adapters.base, adapters.named | {adapter_name: adapter}
    _check_together(base, named)
    adapters.base, adapters.named, model.lora_adapters = base, named, adapters
    set_adapter(model, adapter_name)


def _check_together(base: dict[str, nn.Module], named: dict[str, Adapter]) -> None:
    """Raises ValueError where adapters cannot share one base."""
    within = [path for path in base if any(path.startswith(f"{outer}.") for outer in base)]
    if within:
        raise ValueError(
            f"a module that one adapter trains whole holds modules that another adapts: {', '.join(within)}; let both name the "
            "same modules, or give each adapter a model of its own"
        )
    biased = [name for name, adapter in named.items() if adapter.config.bias != "none"]
    if biased and len(named) > 1:
        raise ValueError(
            f"an adapter that trains biases of the base ({', '.join(biased)}) must be the model's only one, since the others "
            "would get them too: give it a model of its own"
        )


def set_adapter(model: nn.Module, adapter_name: str) -> None:
    """Makes the named adapter the active one, which forward, training, merge and save_adapter mean.

    Raises:
        ValueError: there is no such adapter, or a layer is merged (its weight is not the base's then).
    """
    adapters = adapters_of(model)
    adapter = adapters[adapter_name]
    place(model, adapter.modules)
    adapters.active, model.lora_config = adapter_name, adapter.config


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """The base without an adapter, inside a with statement; bit for bit what it computed before any was injected, but for biases
    that were trained in place.

    Raises:
        ValueError: no adapter was injected into this model, or a layer is merged.
    """
    if not adapters_of(model).named:
        raise ValueError("no adapter was injected into this model, so that there is none to disable")
    with placed(model, {}):
        yield model


@contextmanager
def placed(model: nn.Module, modules: dict[str, nn.Module]) -> Iterator[None]:
    """The given modules at their paths inside a with statement, as place puts them; those from before after it."""
    adapters = adapters_of(model)
    active, before = adapters.active, {path: model.get_submodule(path) for path in adapters.base}
    place(model, modules)
    try:
        yield
    finally:
        if adapters.active == active:  # else an adapter was chosen inside, and stays
            place(model, before)


def place(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Puts each module everywhere that the model holds the one it is for, and the base's own modules everywhere else.

    A module takes over the mode and the device from the one whose place it takes. Parameters of the base go from a layer to the
    base's own module, and from there to the next layer: to_empty, sharding and load_state_dict(assign=True) give the layers that
    are in the model new ones.
    """
    check_unmerged(model)
    adapters = adapters_of(model)
    copies = {copy for adapter in adapters.named.values() for copy in adapter.copies.values()}
    replacements = {adapters.base[path]: module for path, module in modules.items()}
    for path, original in adapters.base.items():
        present, module = model.get_submodule(path), replacements.get(original, original)
        if module is not present:
            for source, target in ((present, original), (original, module)):
                if not copies & {source, target}:
                    for name, _ in list(original.named_parameters(recurse=False)):
                        setattr(target, name, getattr(source, name))
            device = next((parameter.device for parameter in present.parameters()), None)
            model.set_submodule(path, moved(module.train(present.training), device))


def moved(module: nn.Module, device: torch.device | None) -> nn.Module:
    """The module with all its parameters on a device; one that is there already is not touched, since torch cannot move 4-bit
    weights that a graph of autograd holds, not even to where they are."""
    there = all(parameter.device == device for parameter in module.parameters())
    return module if there else module.to(device)


def check_unmerged(model: nn.Module) -> None:
    """Raises ValueError where an adapter is merged: no other can take its place, since the weight is not the base's then."""
    merged = [path for path, module in model.named_modules() if getattr(module, "merged", False)]
    if merged:
        raise ValueError(f"the weights hold the active adapter; unmerge it first: {', '.join(merged)}")
