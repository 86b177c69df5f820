"""Which modules a LoraConfig means, by PEFT's rules: a name is a module's path, or the end of one after a dot."""

import re
from collections.abc import Sequence

from minilora.adapters.config import LoraConfig


def hits(path: str, config: LoraConfig) -> set[str]:
    """The entries of config.target_modules that fit the module at a path, meant or not."""
    wanted = config.target_modules
    if wanted == "all-linear":
        return {wanted} if path.rpartition(".")[2] != "lm_head" else set()  # PEFT's rule: every linear but the head
    return _named(path, wanted)


def meant(path: str, config: LoraConfig) -> bool:
    """Whether the module at a path is to be adapted: it is a target, in a chosen layer, neither excluded nor saved whole."""
    found = hits(path, config)
    if excluded(path, config) or _inside(path, config.modules_to_save or []):
        return False
    # A path that is given whole is meant, whatever its layer.
    return path in found or (bool(found) and _in_chosen_layer(path, config))


def excluded(path: str, config: LoraConfig) -> set[str]:
    """The entries of config.exclude_modules that mean the module at a path."""
    return _named(path, config.exclude_modules or [])


def saved_whole(path: str, config: LoraConfig) -> set[str]:
    """The entries of config.modules_to_save that mean the module at a path: any end of it, "norm" of "input_layernorm" too."""
    return {name for name in config.modules_to_save or [] if path.endswith(name)}


def _named(path: str, names: Sequence[str] | str) -> set[str]:
    """The names that mean a path; a string is a regular expression for the whole of it."""
    if isinstance(names, str):
        return {names} if re.fullmatch(names, path) else set()
    return {name for name in names if path == name or path.endswith(f".{name}")}


def _inside(path: str, names: list[str]) -> bool:
    """Whether a name is somewhere on the path, between dots."""
    return any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in names)


def _in_chosen_layer(path: str, config: LoraConfig) -> bool:
    """Whether the first number on the path, that of its layer, is among layers_to_transform."""
    if config.layers_to_transform in (None, []):
        return True
    patterns = config.layers_pattern or [r"[^.]*"]
    starts = [patterns] if isinstance(patterns, str) else patterns
    # Without layers_pattern PEFT wants a name before that of the list: "model.layers.0", not "layers.0".
    ahead = r"(?:^|.*?\.)" if config.layers_pattern else r".*?\."
    found = next(filter(None, (re.match(rf"{ahead}{start}\.(\d+)\.", path) for start in starts)), None)
    chosen = config.layers_to_transform
    return found is not None and int(found[1]) in ([chosen] if isinstance(chosen, int) else chosen)
