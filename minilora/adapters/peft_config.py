"""adapter_config.json, both ways: PEFT's settings as a LoraConfig, and those of a model's adapter as PEFT writes them."""

import json
import re
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

from torch import nn

from minilora.adapters.config import LoraConfig
from minilora.adapters.dora import DoraLinear
from minilora.adapters.injection import plain_kind, saved_modules
from minilora.adapters.layers import LoRALayer
from minilora.adapters.lora_bias import BiasedLinear
from minilora.adapters.offset import STARTS

CONFIG = "adapter_config.json"
# Keys that say nothing about what a trained adapter computes; for fan_in_fan_out PEFT too goes by the kind of the layer.
WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "init_lora_weights", "megatron_core",
    "minilora", "peft_type", "peft_version", "qalora_group_size", "revision", "task_type",
}  # fmt: skip


@dataclass(frozen=True)
class PeftConfig:
    """What adapter_config.json says.

    `lora.init_lora_weights` is "pissa" or "olora" where the tensors belong to a base that lacks their start: PEFT takes it out
    again when it loads them.
    """

    lora: LoraConfig
    raw: dict  # the whole file

    @property
    def base(self) -> str:
        """Name or path of the base model, "" where none is noted."""
        return self.raw.get("base_model_name_or_path") or ""


def read_peft_config(path: Path | str) -> PeftConfig:
    """Reads the folder's adapter_config.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: not a LoRA adapter, or one that asks for what is not supported, each field by name.
    """
    file = Path(path) / CONFIG
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} must be an adapter: a folder with {CONFIG} and adapter_model.safetensors") from None
    except ValueError as error:
        raise ValueError(f"{file} must be JSON: {error}") from None
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        raise ValueError(f'{file} must be a JSON object with "peft_type": "LORA"')
    known = {field.name for field in fields(LoraConfig)}
    # A key that is empty, false or "none" asks for nothing; any other that is not read here is refused.
    asked = {key: value for key, value in raw.items() if value and value != "none" and key not in known | WITHOUT_EFFECT}
    settings = {key: raw[key] for key in known if raw.get(key) is not None}
    settings.setdefault("ensure_weight_tying", False)  # PEFT's default
    start = settings.pop("init_lora_weights", None)
    if start in STARTS:
        settings |= {"init_lora_weights": start, "lora_dropout": 0.0}  # which acts in training only
    elif start not in (None, True, False, "gaussian", "orthogonal"):
        asked["init_lora_weights"] = start  # changes the base weights too, in a way that cannot be found again
    if asked:
        raise ValueError(f"{file} asks for what is not supported: " + ", ".join(f"{k} = {v!r}" for k, v in asked.items()))
    try:
        return PeftConfig(LoraConfig(**settings), raw)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def make_peft_config(model: nn.Module, layers: dict[str, LoRALayer], base: str | None) -> dict:
    """The content of adapter_config.json for a model's adapted layers, their slices fused.

    Raises:
        ValueError: no one config describes all layers.
    """
    use_rslora = _common(use_rslora={layer.use_rslora for layer in layers.values()})
    config = getattr(model, "lora_config", LoraConfig())
    saved = saved_modules(model, config)
    trained = [layer.lora_A for layer in layers.values()] + [each for copy in {*saved.values()} for each in copy.parameters()]
    ranks = {path: len(layer.slices) * layer.factors()[1].shape[1] for path, layer in layers.items()}
    # Stacked slices have so many times the rank: alpha must grow with it (with its root under rsLoRA) for the same scaling.
    growth = 0.5 if use_rslora else 1
    alphas = {path: layer.lora_alpha * (ranks[path] // layer.r) ** growth for path, layer in layers.items()}
    r, lora_alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if hasattr(model, "lm_head") else None,  # as one PEFT would ask the model to generate
        "base_model_name_or_path": base or "",
        "inference_mode": True,
        "init_lora_weights": True,
        "bias": config.bias,
        "fan_in_fan_out": any(layer.fan_in_fan_out for layer in layers.values()),
        "modules_to_save": sorted(saved) or None,
        "ensure_weight_tying": len({*trained}) < len(trained),
        "layers_to_transform": None,
        "layers_pattern": None,
        "r": r,
        "lora_alpha": lora_alpha,
        "lora_dropout": _common(lora_dropout={layer.lora_dropout for layer in layers.values()}),
        "use_rslora": use_rslora,
        "use_dora": _common(use_dora={isinstance(layer, DoraLinear) for layer in layers.values()}),
        "lora_bias": _common(lora_bias={isinstance(layer, BiasedLinear) for layer in layers.values()}),
        "target_modules": _target_names(model, layers),
        "rank_pattern": {_key(path, layers): rank for path, rank in ranks.items() if rank != r},
        "alpha_pattern": {_key(path, layers): alpha for path, alpha in alphas.items() if alpha != lora_alpha},
    }


def _common(**values: set):
    [(name, found)] = values.items()
    if len(found) > 1:
        raise ValueError(f"the layers of one adapter must share {name}, and have {sorted(found)}")
    return found.pop()


def _key(path: str, layers: dict[str, LoRALayer]) -> str:
    """The pattern for a path alone: PEFT lets a path match the end of another one, which ^ forbids."""
    return f"^{path}" if any(other.endswith(f".{path}") for other in layers) else path


def _target_names(model: nn.Module, layers: dict[str, LoRALayer]) -> list[str] | str:
    """The adapted layers, and no others, by their last names; else by their paths; else by a pattern for whole paths."""
    candidates = [path for path, module in model.named_modules() if plain_kind(module)]
    for names in ({path.rpartition(".")[2] for path in layers}, layers.keys()):
        if {path for path in candidates if any(path == name or path.endswith(f".{name}") for name in names)} == layers.keys():
            return sorted(names)
    return "|".join(map(re.escape, layers))
