"""Adapters on disk, as PEFT, transformers and vLLM read them: adapter_config.json and adapter_model.safetensors.

A layer adapted by slices is written as one exact pair for the fused layer, which is all that those programs know:
A_g stacked to (G·r, in), B_g as blocks of (out, G·r), zero elsewhere, and alpha so that the scaling stays the same.
The key "minilora" in the config, which other programs ignore, says which slices they were, and load_adapter returns them.
"""

import json
import math
import re
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minilora.config import LoraConfig, scaling
from minilora.files import replaced_folder
from minilora.injection import find_targets, inject, plain_kind
from minilora.kernels.lora_linear import Slices
from minilora.layers import Linear, MergedLinear, adapted_layers
from minilora.switching import adapters_of, check_unmerged, set_adapter

CONFIG, TENSORS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
FIELDS = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
# Keys of adapter_config.json that say nothing about what a trained adapter computes.
WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights", "megatron_core", "minilora", "peft_type",
    "peft_version", "qalora_group_size", "revision", "task_type",
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """One layer's adapter as it lies on disk: A (rank, in_features), B (out_features, rank)."""

    rank: int
    in_features: int
    out_features: int
    slices: Slices  # rows of B for each slice, whose columns of B follow one another
    scaling: float


def _pair(layer: nn.Linear, slices: Slices, r: int, scaling: float) -> Pair:
    return Pair(len(slices) * r, layer.in_features, layer.out_features, slices, scaling)


def _adapted(model: nn.Module) -> dict[str, Linear]:
    return _only_linear(adapted_layers(model))


def _only_linear(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    others = [path for path, module in modules.items() if not isinstance(module, nn.Linear)]
    if others:
        raise ValueError(f"adapter files hold linear layers only; save {', '.join(others)} with lora_state_dict")
    return modules


def save_adapter(model: nn.Module, path: Path | str, base: str | None = None) -> None:
    """Writes the model's adapter as a folder that PEFT loads; an earlier one there is replaced, or stays whole on failure.

    Args:
        base: name or path of the base model, to be noted in the config.

    Raises:
        ValueError: the model has no adapter, or one that is not finite.
        OSError: the disk is full or not writable, or the folder holds other files.
    """
    layers = _adapted(model)
    if not layers:
        raise ValueError("the model has no adapter to save")
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = fuse(layer.lora_B.detach(), layer.slices, layer.out_features)
    infinite = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if infinite:
        raise ValueError(f"an adapter must be finite to be saved; NaN or infinity stands in {', '.join(infinite)}")
    check_replaceable(path)
    with replaced_folder(Path(path)) as folder:
        config = json.dumps(_peft_config(model, layers, base), indent=2, sort_keys=True)
        (folder / CONFIG).write_text(config + "\n", encoding="utf-8")
        try:
            save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{path} could not be written ({error}); what was there before is untouched") from None
        shutil.copymode(folder / CONFIG, folder / TENSORS)  # safetensors writes files that only their owner reads


def check_replaceable(path: Path | str) -> None:
    """Raises FileExistsError where saving an adapter would remove anything but an earlier adapter."""
    others = [file.name for file in Path(path).iterdir() if file.name not in (CONFIG, TENSORS)] if Path(path).exists() else []
    if others:
        raise FileExistsError(f"{path} must be new, empty or an earlier adapter; it holds {', '.join(sorted(others))}")


def fuse(lora_B: Tensor, slices: Slices, out_features: int) -> Tensor:
    """B of the slices (their width, r) as one block matrix (out_features, G·r), zero outside the blocks."""
    fused = lora_B.new_zeros(out_features, len(slices) * lora_B.shape[1])
    blocks = lora_B.split([stop - start for start, stop in slices])
    for (start, stop), columns, block in zip(slices, fused.chunk(len(slices), dim=1), blocks, strict=True):
        columns[start:stop] = block
    return fused


def _split(fused: Tensor, slices: Slices) -> Tensor:
    """The inverse of fuse."""
    columns = fused.chunk(len(slices), dim=1)
    return torch.cat([columns_g[start:stop] for (start, stop), columns_g in zip(slices, columns, strict=True)])


def _peft_config(model: nn.Module, layers: dict[str, Linear], base: str | None) -> dict:
    use_rslora, lora_dropout = (_common(layers, name) for name in ("use_rslora", "lora_dropout"))
    ranks = {path: layer.r * len(layer.slices) for path, layer in layers.items()}
    # G stacked slices have G times the rank: alpha must grow with it (with its root under rsLoRA) for the same scaling.
    growth = 0.5 if use_rslora else 1
    alphas = {path: layer.lora_alpha * len(layer.slices) ** growth for path, layer in layers.items()}
    r, lora_alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    peft = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or "",
        "inference_mode": True,
        "init_lora_weights": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "r": r,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "use_rslora": use_rslora,
        "use_dora": False,
        "target_modules": _target_names(model, layers),
        "rank_pattern": {_key(path, layers): rank for path, rank in ranks.items() if rank != r},
        "alpha_pattern": {_key(path, layers): alpha for path, alpha in alphas.items() if alpha != lora_alpha},
    }
    if any(isinstance(layer, MergedLinear) for layer in layers.values()) and hasattr(model, "lora_config"):
        peft["minilora"] = asdict(model.lora_config)
    return peft


def _common(layers: dict[str, Linear], name: str):
    values = {getattr(layer, name) for layer in layers.values()}
    if len(values) > 1:
        raise ValueError(f"the layers of one adapter must share {name}, and have {sorted(values)}")
    return values.pop()


def _key(path: str, layers: dict[str, Linear]) -> str:
    """The pattern for a path alone: PEFT lets a path match the end of another one, which ^ forbids."""
    return f"^{path}" if any(other.endswith(f".{path}") for other in layers) else path


def _target_names(model: nn.Module, layers: dict[str, Linear]) -> list[str] | str:
    """The adapted layers, and no others, by their last names; else by their paths; else by a pattern for whole paths."""
    candidates = [path for path, module in model.named_modules() if plain_kind(module)]
    for names in ({path.rpartition(".")[2] for path in layers}, layers.keys()):
        if {path for path in candidates if any(path == name or path.endswith(f".{name}") for name in names)} == layers.keys():
            return sorted(names)
    return "|".join(map(re.escape, layers))


def read_adapter_config(path: Path | str) -> LoraConfig:
    """The LoraConfig that an adapter was made with, from its adapter_config.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: not a LoRA adapter, or one that asks for what is not supported, each field by name.
    """
    return _read_configs(path)[0]


def _read_configs(path: Path | str) -> tuple[LoraConfig, LoraConfig]:
    """The config as the adapter was made, by slices perhaps, and the same with slices fused, as the tensors on disk are."""
    file = Path(path) / CONFIG
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} must be an adapter: a folder with {CONFIG} and {TENSORS}") from None
    except ValueError as error:
        raise ValueError(f"{file} must be JSON: {error}") from None
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        raise ValueError(f'{file} must be a JSON object with "peft_type": "LORA"')
    # A key that is empty, false or "none" asks for nothing; any other that is not read here is refused.
    asked = {key: value for key, value in raw.items() if value and value != "none" and key not in {*FIELDS, *WITHOUT_EFFECT}}
    if raw.get("init_lora_weights") not in (None, True, False, "gaussian"):
        asked["init_lora_weights"] = raw["init_lora_weights"]  # PiSSA and its like change the base weights too
    if asked:
        raise ValueError(f"{file} asks for what is not supported: " + ", ".join(f"{k} = {v!r}" for k, v in asked.items()))
    fields = {key: raw[key] for key in FIELDS if raw.get(key) is not None}
    try:
        return LoraConfig(**raw.get("minilora", fields)), LoraConfig(**fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None


def load_adapter(
    model: nn.Module, path: Path | str, dtype: torch.dtype | None = torch.float32, adapter_name: str = "default"
) -> nn.Module:
    """Loads an adapter that save_adapter or PEFT wrote, and makes it the active one; returns the model.

    The layers of an adapter of that name are filled where the model has one, and injected where it has none.

    Args:
        dtype: of injected adapters, as in inject.

    Raises:
        FileNotFoundError: a file of the adapter is missing.
        ValueError: it does not fit the model; every missing, extra or misshapen tensor is named, and the model is unchanged.
    """
    config, fused = _read_configs(path)
    tensors = read_adapter_tensors(path)
    check_unmerged(model)
    layers = _layers_named(model, adapter_name)
    if layers:
        pairs = {name: _pair(layer, layer.slices, layer.r, layer.scaling) for name, layer in layers.items()}
    else:
        targets = find_targets(model, config)
        _only_linear({target.path: target.module for target in targets})
        pairs = {
            target.path: _pair(target.module, target.slices, target.r, scaling(target.r, target.lora_alpha, config.use_rslora))
            for target in targets
        }
    for name in pairs:
        if f"{name}.base_layer" in tensors:  # PEFT writes the frozen head along with its adapter
            base = tensors.pop(f"{name}.base_layer")
            if not torch.equal(base.to(model.get_submodule(name).weight), model.get_submodule(name).weight):
                raise ValueError(f"{path} was trained with another {name}.weight than the model's")
    _check(pairs, tensors, fused, Path(path))
    if not layers:
        layers = _layers_named(inject(model, config, dtype, adapter_name), adapter_name)
    with torch.no_grad():
        for name, layer in layers.items():
            layer.lora_A.copy_(tensors[f"{name}.lora_A"])
            layer.lora_B.copy_(_split(tensors[f"{name}.lora_B"], pairs[name].slices))
    if adapters_of(model).named:
        set_adapter(model, adapter_name)
    return model


def _layers_named(model: nn.Module, adapter_name: str) -> dict[str, Linear]:
    """The layers of the named adapter, none if there is none; of a model made with adapters, not by inject, all that it has."""
    named = adapters_of(model).named
    if not named:
        return _adapted(model)
    return _only_linear(named[adapter_name].layers) if adapter_name in named else {}


def read_adapter_tensors(path: Path | str) -> dict[str, Tensor]:
    """The tensors of an adapter by the model's own names: "….qkv_proj.lora_A" and "….lora_B", slices fused.

    Raises:
        FileNotFoundError: there is no adapter_model.safetensors.
        ValueError: it is truncated, or no safetensors file.
    """
    file = Path(path) / TENSORS
    try:
        tensors = load_file(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} must hold {TENSORS}; pickled adapters (adapter_model.bin) are never loaded") from None
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or not a safetensors file ({error})") from None
    return {name.removeprefix(PREFIX).removesuffix(".weight"): tensor for name, tensor in tensors.items()}


def _check(pairs: dict[str, Pair], tensors: dict[str, Tensor], fused: LoraConfig, path: Path) -> None:
    expected = {}
    for name, pair in pairs.items():
        expected[f"{name}.lora_A"] = (pair.rank, pair.in_features)
        expected[f"{name}.lora_B"] = (pair.out_features, pair.rank)
    faults = [f"{name} is missing" for name in expected.keys() - tensors.keys()]
    faults += [f"{name} is not part of the adapted model" for name in tensors.keys() - expected.keys()]
    for name in expected.keys() & tensors.keys():
        if tuple(tensors[name].shape) != expected[name]:
            faults.append(f"{name} must have shape {expected[name]}, not {tuple(tensors[name].shape)}")
        elif not tensors[name].isfinite().all():
            faults.append(f"{name} holds NaN or infinity")
    for name, pair in pairs.items():
        stored = scaling(fused.rank(name), fused.alpha(name), fused.use_rslora)
        if not math.isclose(stored, pair.scaling):
            faults.append(f"{name} is scaled by {stored} in the file and by {pair.scaling} in the model")
    if not faults:
        for name, pair in pairs.items():
            B = tensors[f"{name}.lora_B"]
            if not torch.equal(fuse(_split(B, pair.slices), pair.slices, pair.out_features), B):
                faults.append(f"{name}.lora_B reaches outputs that the model's adapter, by slices, does not adapt")
    if faults:
        raise ValueError(f"the adapter in {path} does not fit the model:\n  " + "\n  ".join(sorted(faults)))
