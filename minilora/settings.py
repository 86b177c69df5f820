"""What all settings are held to: each field's type and rule, all faults at once."""

import dataclasses
import math
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin


def at_least(least: float):
    """The rule of a number with a least value."""
    return (lambda value: least <= value < math.inf), f"must be at least {least}"


def one_of(kind):
    """The rule of a Literal."""
    return (lambda value: value in get_args(kind)), f"must be one of {', '.join(get_args(kind))}"


class BrokenSettings(ValueError):
    """All faults of a config at once, one by one in `faults`."""

    def __init__(self, faults: list[str]):
        super().__init__("; ".join(faults))
        self.faults = faults


def faults_of(config, rules: dict) -> list[str]:
    """Every field of a dataclass that is of another type than annotated, or breaks its rule.

    Args:
        rules: for each field that has one, the rule that a value of the right type must keep, and how it is said.
    """
    faults = []
    for item in dataclasses.fields(config):
        value, (keeps, rule) = getattr(config, item.name), rules.get(item.name, (lambda _: True, ""))
        if not _fits(value, item.type):
            faults.append(f"{item.name} must be {_spelled(item.type)}, not {value!r}")
        elif not keeps(value):
            faults.append(f"{item.name} {rule}, not {value!r}")
    return faults


def check(config, rules: dict) -> None:
    """Passes a config without faults.

    Raises:
        BrokenSettings: there are some; all at once.
    """
    faults = faults_of(config, rules)
    if faults:
        raise BrokenSettings(faults)


def _fits(value, kind) -> bool:
    """Whether a value is of an annotated type; an integer is a float too."""
    if get_origin(kind) is Literal:
        return isinstance(value, str)  # which of them is a rule of its own
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, option) for option in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(item, *get_args(kind)) for item in value)
    if get_origin(kind) is dict:
        of_key, of_value = get_args(kind)
        return isinstance(value, dict) and all(_fits(k, of_key) and _fits(v, of_value) for k, v in value.items())
    if kind is float:
        return type(value) in (int, float)
    return type(value) is (NoneType if kind is None else kind)


def _spelled(kind) -> str:
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_spelled(option) for option in get_args(kind) if option is not NoneType)
    return kind.__name__ if get_origin(kind) is None else str(kind)
