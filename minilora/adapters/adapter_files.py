"""Adapters on disk, as PEFT, transformers and vLLM read them: adapter_config.json and adapter_model.safetensors.

A layer adapted by slices is written as one exact pair for the fused layer, which is all that those programs know
(minilora.adapters.peft_tensors), with alpha so that the scaling stays the same.
The metadata of the tensors, which other programs skip, says which slices they were, and load_adapter returns them.
"""

import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minilora.adapters.config import LoraConfig, scaling
from minilora.adapters.injection import find_targets, make_adapter, saved_modules
from minilora.adapters.layers import adapted_layers
from minilora.adapters.offset import STARTS, as_saved
from minilora.adapters.peft_config import CONFIG, PeftConfig, make_peft_config, read_peft_config
from minilora.adapters.peft_tensors import (
    by_slices,
    faults_of_sharing,
    faults_outside_slices,
    from_disk,
    on_disk,
    refuse_convolutions,
)
from minilora.adapters.switching import Adapter, adapters_of, add_adapter, check_unmerged, placed, set_adapter
from minilora.files import replaced_folder
from minilora.kernels.nf4_tensor import NF4Tensor

TENSORS, PREFIX, OURS = "adapter_model.safetensors", "base_model.model.", "minilora"


# Saving


def save_adapter(model: nn.Module, path: Path | str, base: str | None = None) -> None:
    """Writes the model's adapter as a folder that PEFT loads; an earlier one there is replaced, or stays whole on failure.

    An adapter that starts from the weight (PiSSA, OLoRA) is written as an ordinary one of twice the rank (offset.py).

    Args:
        base: name or path of the base model, to be noted in the config.

    Raises:
        ValueError: the model has no adapter, or one that is not finite.
        OSError: the disk is full or not writable, or the folder holds other files.
    """
    layers, config = adapted_layers(model), getattr(model, "lora_config", LoraConfig())
    if not layers:
        raise ValueError("the model has no adapter to save")
    refuse_convolutions(layers)
    tensors = {f"{name}.{key}": tensor for name, layer in layers.items() for key, tensor in on_disk(layer).items()}
    tensors |= _others(model, Adapter(config, layers, saved_modules(model, config)))
    sliced = hasattr(model, "lora_config") and any(map(by_slices, layers.values()))
    # One key only: safetensors writes several in an order of chance, and the same adapter shall be the same file.
    metadata = {OURS: json.dumps(asdict(as_saved(config) if config.init_lora_weights in STARTS else config))}
    ours_alone = sliced or config.init_lora_weights == "loftq"  # which PEFT would start anew, and so must not read
    write_adapter(path, make_peft_config(model, layers, base), tensors, metadata if ours_alone else {"format": "pt"})


def write_adapter(path: Path | str, config: dict, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes both files of an adapter, its tensors named as in the model; errors as in save_adapter."""
    infinite = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if infinite:
        raise ValueError(f"an adapter must be finite to be saved; NaN or infinity stands in {', '.join(infinite)}")
    check_replaceable(path)
    with replaced_folder(Path(path)) as folder:
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        try:
            # Copies, since safetensors refuses tensors that share memory.
            whole = {PREFIX + name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
            save_file(whole, folder / TENSORS, metadata)
        except SafetensorError as error:
            raise OSError(f"{path} could not be written ({error}); what was there before is untouched") from None
        shutil.copymode(folder / CONFIG, folder / TENSORS)  # safetensors writes files that only their owner reads


def check_replaceable(path: Path | str) -> None:
    """Raises FileExistsError where saving an adapter would remove anything but an earlier adapter."""
    others = [file.name for file in Path(path).iterdir() if file.name not in (CONFIG, TENSORS)] if Path(path).exists() else []
    if others:
        raise FileExistsError(f"{path} must be new, empty or an earlier adapter; it holds {', '.join(sorted(others))}")


def _others(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """What is saved besides the layers, by PEFT's names: modules saved whole, and biases of the base."""
    tensors = {f"{path}.{name}": tensor for path, copy in adapter.copies.items() for name, tensor in copy.state_dict().items()}
    for name, parameter in model.named_parameters():
        path, _, last = name.rpartition(".")
        if last != "bias" or any(name.startswith(f"{outer}.") for outer in adapter.copies):
            continue
        if path in adapter.layers and adapter.config.bias != "none":
            tensors[f"{path}.base_layer.bias"] = parameter.detach()
        elif adapter.config.bias == "all":
            tensors[name] = parameter.detach()
    return tensors


# Loading


def read_adapter_config(path: Path | str) -> LoraConfig:
    """The LoraConfig that an adapter was made with, by slices perhaps; of one that starts from the weight, as it was saved.

    Raises:
        FileNotFoundError: there is no adapter_config.json.
        ValueError: not a LoRA adapter, or one that asks for what is not supported, each field by name.
    """
    return _as_made(path, read_peft_config(path))


def _as_made(path: Path | str, stored: PeftConfig) -> LoraConfig:
    """The config by slices, from the tensors' metadata or where earlier versions wrote it; the stored one where there is none."""
    ours = stored.raw.get(OURS)
    try:
        with safe_open(Path(path) / TENSORS, "pt") as file:
            ours = json.loads((file.metadata() or {}).get(OURS, "null")) or ours
    except (SafetensorError, FileNotFoundError):
        pass  # told when the tensors are read
    except ValueError as error:
        raise ValueError(f"{Path(path) / TENSORS}: its metadata {OURS} must be JSON: {error}") from None
    try:
        config = LoraConfig(**ours) if ours is not None else stored.lora
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    # Earlier versions wrote no such field, and tied nothing.
    return config if ours is None or "ensure_weight_tying" in ours else replace(config, ensure_weight_tying=False)


def read_adapter_tensors(path: Path | str) -> dict[str, Tensor]:
    """The tensors of an adapter by the model's own paths and PEFT's names: "….qkv_proj.lora_A.weight", slices fused.

    Raises:
        FileNotFoundError: there is no adapter_model.safetensors.
        ValueError: it is truncated, or no safetensors file.
    """
    file = Path(path) / TENSORS
    try:
        with safe_open(file, "pt") as opened:
            return {name.removeprefix(PREFIX): opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} must hold {TENSORS}; pickled adapters (adapter_model.bin) are never loaded") from None
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or not a safetensors file ({error})") from None


def load_adapter(
    model: nn.Module, path: Path | str, dtype: torch.dtype | None = torch.float32, adapter_name: str = "default"
) -> nn.Module:
    """Loads an adapter that save_adapter or PEFT wrote, and makes it the active one; returns the model.

    An adapter of that name is filled where the model has one, and injected where it has none. Biases of the base that were
    trained along are overwritten; modules saved whole come in copies of the base's.

    Args:
        dtype: of injected adapters, as in inject.

    Raises:
        FileNotFoundError: a file of the adapter is missing.
        ValueError: it does not fit the model; every missing, extra or misshapen tensor is named, and the model is unchanged.
    """
    stored, tensors = read_peft_config(path), read_adapter_tensors(path)
    config, fused = _as_made(path, stored), stored.lora
    check_unmerged(model)
    if fused.init_lora_weights in STARTS:
        _subtract_start(tensors, model, fused)
        config = fused = as_saved(fused)
    present = _adapter_named(model, adapter_name, config)
    adapter = present or make_adapter(model, config, dtype)
    faults = faults_of_loading(model, adapter, fused, tensors)
    if faults:
        raise ValueError(f"the adapter in {path} does not fit the model:\n  " + "\n  ".join(faults))
    if not present:
        add_adapter(model, adapter_name, adapter)
    elif adapters_of(model).named:
        set_adapter(model, adapter_name)
    with torch.no_grad():
        for name, layer in adapter.layers.items():
            from_disk(layer, {key: tensors[f"{name}.{key}"] for key in on_disk(layer)})
        for name, place in _others(model, adapter).items():
            place.copy_(tensors[name])
    return model


def _adapter_named(model: nn.Module, adapter_name: str, config: LoraConfig) -> Adapter | None:
    """The named adapter; of a model that was made with adapters, not by inject, all that it has."""
    layers, named = adapted_layers(model), adapters_of(model).named
    if layers and not named:
        return Adapter(config, layers, saved_modules(model, config))
    return named.get(adapter_name)


def faults_of_loading(model: nn.Module, adapter: Adapter, fused: LoraConfig, tensors: dict[str, Tensor]) -> list[str]:
    """Why a file's tensors cannot be an adapter's: every name, shape and value is held against it.

    Args:
        fused: the config in the file, of slices fused as on disk.
    """
    layers = adapter.layers
    refuse_convolutions(layers)
    expected = {f"{path}.{key}": tensor.shape for path, layer in layers.items() for key, tensor in on_disk(layer).items()}
    expected |= {name: tensor.shape for name, tensor in _others(model, adapter).items()}
    # What PEFT writes besides: a frozen head with its adapter, and with bias = "all" those of modules saved whole thrice.
    frozen = {f"{path}.base_layer.weight": layer.weight for path, layer in layers.items()}
    again = {f"{path}.{where}.bias" for path in adapter.copies for where in ("modules_to_save", "original_module")}
    faults = [f"{name} is missing" for name in expected.keys() - tensors.keys()]
    faults += [f"{name} is not part of the adapted model" for name in tensors.keys() - expected.keys() - frozen.keys() - again]
    faults += _wrong_values(expected, frozen, tensors)
    for path, layer in layers.items():
        stored = scaling(fused.rank(path), fused.alpha(path), fused.use_rslora)
        if not math.isclose(stored, layer.scaling):
            faults.append(f"{path} is scaled by {stored} in the file and by {layer.scaling} in the model")
    if not faults:
        faults = [fault for path, layer in layers.items() for fault in faults_outside_slices(path, layer, tensors)]
        faults += faults_of_sharing(layers, tensors)
    return sorted(faults)


def _wrong_values(expected: dict[str, torch.Size], frozen: dict[str, Tensor], tensors: dict[str, Tensor]) -> list[str]:
    """Tensors that are misshapen or not finite, and frozen weights that are not the model's."""
    faults = []
    for name in expected.keys() & tensors.keys():
        if tensors[name].shape != expected[name]:
            faults.append(f"{name} must have shape {tuple(expected[name])}, not {tuple(tensors[name].shape)}")
        elif not tensors[name].isfinite().all():
            faults.append(f"{name} holds NaN or infinity")
    for name in frozen.keys() & tensors.keys():
        weight = frozen[name]
        rounded = weight.is_meta or isinstance(weight, NF4Tensor)  # to nothing, or to 4 bits
        if not rounded and not torch.equal(tensors[name].to(weight), weight):
            faults.append(f"the adapter was trained with another {name.replace('.base_layer', '')} than the model's")
    return faults


def _subtract_start(tensors: dict[str, Tensor], model: nn.Module, config: LoraConfig) -> None:
    """Makes an adapter of a base without its start one of the whole base, in place, by finding that start again.

    PEFT saves PiSSA and OLoRA so, and finds the start again too.
    """
    with placed(model, {}):
        targets = find_targets(model, config)
    for target in targets:
        factor, weight = scaling(target.r, target.lora_alpha, config.use_rslora), target.module.weight.detach().float()
        matrix = weight.T if getattr(target.module, "fan_in_fan_out", False) else weight
        start = STARTS[config.init_lora_weights](matrix, target.r, factor)
        for key, part, axis in (("lora_A.weight", start[0], 0), ("lora_B.weight", -start[1], 1)):
            name = f"{target.path}.{key}"
            if name in tensors and tensors[name].shape == part.shape:
                tensors[name] = torch.cat([tensors[name], part.to(tensors[name].device)], dim=axis)
