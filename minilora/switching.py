"""Several adapters on one base: each has layers of its own around the base's own weights, and the model holds one's layers.

Switching puts modules in their places and copies nothing. The layers of an adapter that is not active are no part of the model:
parameters() and state_dict() give the active adapter, under the same names as if it were the only one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from minilora.config import LoraConfig

BASE = "__base__"  # PEFT's name for the base without an adapter


@dataclass(frozen=True)
class Adapter:
    """One adapter: how it was made, and its layer for each module that it adapts, by the module's (first) path."""

    config: LoraConfig
    layers: dict[str, nn.Module]


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


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by its path, its first where it has several; those that are adapted as the base has them."""
    base, paths = adapters_of(model).base, {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(base.get(path, module), path)
    return {path: module for module, path in paths.items()}


def add_adapter(model: nn.Module, adapter_name: str, adapter: Adapter) -> None:
    """Takes one more adapter in, and makes it the active one.

    Raises:
        ValueError: the name is taken, or a layer is merged; the model is unchanged.
    """
    adapters = adapters_of(model)
    if adapter_name == BASE or adapter_name in adapters.named:
        raise ValueError(f"this model has an adapter {adapter_name!r} already: choose another adapter_name")
    check_unmerged(model)
    adapted = {module for path, module in base_modules(model).items() if path in adapter.layers}
    adapters.base |= {path: module for path, module in model.named_modules(remove_duplicate=False) if module in adapted}
    adapters.named[adapter_name] = adapter
    model.lora_adapters = adapters
    set_adapter(model, adapter_name)


def set_adapter(model: nn.Module, adapter_name: str) -> None:
    """Makes the named adapter the active one, which forward, training, merge and save_adapter mean.

    Raises:
        ValueError: there is no such adapter, or a layer is merged (its weight is not the base's then).
    """
    adapters = adapters_of(model)
    adapter = adapters[adapter_name]
    place(model, adapter.layers)
    adapters.active, model.lora_config = adapter_name, adapter.config


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """The base without an adapter, inside a with statement; bit for bit what it computed before any was injected.

    Raises:
        ValueError: no adapter was injected into this model, or a layer is merged.
    """
    if not adapters_of(model).named:
        raise ValueError("no adapter was injected into this model, so that there is none to disable")
    with placed(model, {}):
        yield model


@contextmanager
def placed(model: nn.Module, layers: dict[str, nn.Module]) -> Iterator[None]:
    """The given layers at their paths inside a with statement, as place puts them; those from before after it."""
    adapters = adapters_of(model)
    active, before = adapters.active, {path: model.get_submodule(path) for path in adapters.base}
    place(model, layers)
    try:
        yield
    finally:
        if adapters.active == active:  # else an adapter was chosen inside, and stays
            place(model, before)


def place(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Puts each layer everywhere that the model holds the module it is for, and the base's own modules everywhere else.

    A layer takes over the mode, the device and the parameters of the base from the one whose place it takes: to_empty, sharding
    and load_state_dict(assign=True) give the layers that are in the model new parameters.
    """
    check_unmerged(model)
    base = adapters_of(model).base
    replacements = {base[path]: layer for path, layer in layers.items()}
    for path, module in base.items():
        present, layer = model.get_submodule(path), replacements.get(module, module)
        if layer is not present:
            for name, _ in list(module.named_parameters()):
                setattr(layer, name, getattr(present, name))
            model.set_submodule(path, layer.train(present.training).to(present.weight.device))


def check_unmerged(model: nn.Module) -> None:
    """Raises ValueError where an adapter is merged: no other can take its place, since the weight is not the base's then."""
    merged = [path for path, module in model.named_modules() if getattr(module, "merged", False)]
    if merged:
        raise ValueError(f"the weights hold the active adapter; unmerge it first: {', '.join(merged)}")
