"""The settings of an adapter, by the names of PEFT's LoraConfig."""

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from minilora.settings import BrokenSettings, at_least, faults_of, one_of

Bias = Literal["none", "all", "lora_only"]
STARTS = (True, "pissa", "olora", "loftq")  # of lora_A and lora_B
LOFTQ = {"loftq_bits": 4, "loftq_iter": 1}  # PEFT's defaults


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _are_patterns(texts: dict | list | str) -> bool:
    return all(map(_is_pattern, [texts] if isinstance(texts, str) else texts))


RULES = {
    "r": at_least(1),
    "lora_alpha": (math.isfinite, "must be finite"),
    "lora_dropout": (lambda value: 0 <= value < 1, "must lie in [0, 1)"),
    "target_modules": (
        lambda value: value and (isinstance(value, list) or _is_pattern(value)),
        "must name at least one module, or be a pattern for some",
    ),
    "exclude_modules": (
        lambda value: not isinstance(value, str) or _is_pattern(value),
        "must name modules, or be a pattern for some",
    ),
    "layers_pattern": (lambda value: _are_patterns(value or []), "must hold regular expressions"),
    "bias": one_of(Bias),
    "init_lora_weights": (lambda value: value in STARTS, f"must be one of {', '.join(map(repr, STARTS))}"),
    "loftq_config": (
        lambda value: value.keys() <= LOFTQ.keys() and value.get("loftq_bits", 4) == 4 and value.get("loftq_iter", 1) >= 1,
        "must hold loftq_bits = 4 and a loftq_iter of at least 1",
    ),
    "rank_pattern": (
        lambda value: _are_patterns(value) and all(rank >= 1 for rank in value.values()),
        "must map regular expressions to ranks of at least 1",
    ),
    "alpha_pattern": (
        lambda value: _are_patterns(value) and all(map(math.isfinite, value.values())),
        "must map regular expressions to finite numbers",
    ),
}


@dataclass(frozen=True)
class LoraConfig:
    """What PEFT's LoraConfig says about a LoRA adapter.

    Raises:
        ValueError: a field is out of its range; all faults at once.
    """

    r: int = 8  # rank
    lora_alpha: float = 8  # numerator of the scaling
    lora_dropout: float = 0.0  # probability with which the adapter's input loses an element in training
    # Module names (a path, or the end of one), a regular expression over whole paths, or "all-linear": all but lm_head.
    target_modules: list[str] | str = "all-linear"
    exclude_modules: list[str] | str | None = None  # names or an expression as above, for modules to leave alone
    layers_to_transform: list[int] | int | None = None  # numbers of the layers to adapt, of those that a list of targets names
    layers_pattern: list[str] | str | None = None  # names of the module lists that those numbers count; any list when None
    use_rslora: bool = False  # scale by alpha / sqrt(r) instead of alpha / r (Kalajdzievski 2023)
    use_dora: bool = False  # a trained length for each row of the adapted weight (Liu et al. 2024): dora.py
    rank_pattern: dict[str, int] = field(default_factory=dict)  # path or end of path → its own r
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # likewise → its own lora_alpha
    init_lora_weights: bool | str = True  # lora_B starts at zero; or "pissa", "olora": offset.py; "loftq": loftq.py
    loftq_config: dict[str, int] = field(default_factory=dict)  # loftq_bits, which are 4, and loftq_iter: T there
    lora_bias: bool = False  # lora_B has a bias, trained too
    bias: Bias = "none"  # biases of the base model that are trained too
    modules_to_save: list[str] | None = None  # ends of paths: modules that are trained whole, and saved with the adapter
    ensure_weight_tying: bool = True  # what is tied to an embedding is adapted, or trained whole, with it: tying.py

    def __post_init__(self):
        faults = faults_of(self, RULES)
        if not faults:
            faults = [text for wrong, text in self._conflicts() if wrong]
        if faults:
            raise BrokenSettings(faults)

    def _conflicts(self) -> list[tuple[bool, str]]:
        """Pairs of settings that contradict one another: whether they do, and how it is said."""
        by_layer, starts_off = self.layers_to_transform not in (None, []), self.init_lora_weights is not True
        subtracted = self.init_lora_weights in ("pissa", "olora")
        return [
            (by_layer and isinstance(self.target_modules, str), "layers_to_transform needs a list of target_modules, not a text"),
            (bool(self.layers_pattern) and not by_layer, "layers_pattern needs layers_to_transform"),
            (self.lora_bias and self.use_dora, "lora_bias and use_dora exclude one another"),
            (self.lora_bias and starts_off, "lora_bias needs init_lora_weights = True"),
            (self.use_dora and starts_off, "use_dora needs init_lora_weights = True"),
            (bool(self.loftq_config) and self.init_lora_weights != "loftq", 'loftq_config needs init_lora_weights = "loftq"'),
            (subtracted and self.lora_dropout > 0, f"init_lora_weights = {self.init_lora_weights!r} needs lora_dropout = 0"),
        ]

    def rank(self, path: str) -> int:
        """The r of the module at a path."""
        return _first_match(self.rank_pattern, path, self.r)

    def alpha(self, path: str) -> float:
        """The lora_alpha of the module at a path."""
        return _first_match(self.alpha_pattern, path, self.lora_alpha)


def scaling(r: int, lora_alpha: float, use_rslora: bool = False) -> float:
    """The factor on B·A: alpha / r (Hu et al. 2021), or alpha / sqrt(r) (Kalajdzievski 2023, "rsLoRA")."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def _first_match(pattern: dict, path: str, default):
    """PEFT's rule: a key is a regular expression for a path or for the end of one after a dot; the first hit counts."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", path)), default)
