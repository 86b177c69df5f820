from dataclasses import dataclass, field
from typing import Literal

import pytest

from minilora.settings import BrokenSettings, at_least, check, faults_of, one_of

Colour = Literal["red", "green"]
RULES = {"number": at_least(1), "colour": one_of(Colour)}


@dataclass(frozen=True)
class Settings:
    number: int = 1
    share: float = 0.5
    colour: Colour = "red"
    names: list[str] | str | None = None
    ranks: dict[str, int] = field(default_factory=dict)


@pytest.mark.parametrize(
    "values",
    [{}, {"number": 7, "share": 1}, {"colour": "green"}, {"names": ["a"]}, {"names": "a"}, {"ranks": {"a": 1}}, {"ranks": {}}],
)
def test_values_of_their_types_that_keep_their_rules_have_no_faults(values):
    assert faults_of(Settings(**values), RULES) == []


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"number": 0}, "number must be at least 1, not 0"),
        ({"number": 1.0}, "number must be int, not 1.0"),
        ({"number": True}, "number must be int, not True"),
        ({"share": "half"}, "share must be float, not 'half'"),
        ({"share": True}, "share must be float, not True"),
        ({"colour": "blue"}, "colour must be one of red, green, not 'blue'"),
        ({"names": ["a", 1]}, "names must be list[str] or str, not ['a', 1]"),
        ({"ranks": {"a": "1"}}, "ranks must be dict[str, int], not {'a': '1'}"),
        ({"ranks": {1: 1}}, "ranks must be dict[str, int], not {1: 1}"),
    ],
)
def test_a_fault_is_told_with_its_value(values, fault):
    assert faults_of(Settings(**values), RULES) == [fault]


def test_all_faults_are_raised_at_once():
    with pytest.raises(BrokenSettings, match=r"^number must be at least 1, not 0; share must be float, not None$") as refused:
        check(Settings(number=0, share=None), RULES)
    assert len(refused.value.faults) == 2
    check(Settings(), RULES)
