"""What a run is made of: whatever decides its outcome, so that a run goes on only as the one that it was.

Left out, since no bit of the adapter depends on it: HARMLESS, the names and places of model, data and output, and the versions
of the libraries, which may change the rounding.
"""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain

import torch
from torch import Tensor, nn

from minilora.data.encoding import Example
from minilora.kernels.nf4_tensor import NF4Tensor
from minilora.training.config import TrainConfig
from minilora.training.distributed import train_batch_size

HARMLESS = {  # of TrainConfig
    "logging_steps", "report_to", "save_strategy", "save_steps", "save_total_limit", "gradient_checkpointing", "detect_anomaly",
    "greater_is_better",
}  # fmt: skip
BATCH = "per_device_train_batch_size"  # which counts together with the number of processes
ELEMENTS = 1024  # of each frozen tensor that are read
SHOWN = 20  # differences spelled out before the rest is only counted


def fingerprint(
    model: nn.Module, config: TrainConfig, dataset: Sequence[Example], eval_dataset: Sequence[Example] | None = None
) -> dict[str, object]:
    """A run's settings, adapter, frozen tensors and data, by flat names; what JSON can hold.

    Every process of a group must ask for it where the base is split over them.
    """
    tensors = dict(chain(model.named_parameters(), model.named_buffers()))
    trained = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    parts = {
        "training": {name: value for name, value in asdict(config).items() if name not in {*HARMLESS, BATCH}}
        | {f"{BATCH} × processes": train_batch_size(config)},
        "peft": asdict(model.lora_config) if hasattr(model, "lora_config") else {},
        "device": {"types": sorted(device.type for device in {tensor.device for tensor in tensors.values()})},
        "data": _of_examples(dataset),
        "eval_data": _of_examples(eval_dataset or ()),
        "trained": {name: _kind(tensor) for name, tensor in trained.items()},
        # What an adapter starts from, lora_A_start, was made from the weights, and comes back with it.
        "base": {name: _of_frozen(tensor) for name, tensor in tensors.items() if name not in trained and "lora_" not in name},
    }
    return {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}


def _of_examples(examples: Sequence[Example]) -> dict[str, object]:
    """Of all ids and masks in their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(array("q", [len(example.ids), *example.ids, *example.mask]).tobytes())
    tokens = sum(len(example.ids) for example in examples)
    return {"conversations": len(examples), "tokens": tokens, "sha256": digest.hexdigest()}


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _of_frozen(tensor: Tensor) -> str:
    """Dtype, shape and a hash of elements spread evenly over the tensor: gigabytes are told apart by megabytes."""
    if isinstance(tensor, NF4Tensor):
        return " ".join(map(_of_frozen, tensor.parts))
    if hasattr(tensor, "full_tensor"):  # a DTensor, of a base that is split: minilora.training.distributed.shard_base
        tensor = tensor.full_tensor()
    flat = tensor.detach().flatten()
    step = max(1, len(flat) // ELEMENTS) | 1  # odd, so that it does not stay in one column of a matrix as wide as a power of two
    return f"{_kind(tensor)} {hashlib.sha256(_bytes(flat[::step])).hexdigest()[:16]}"


def _bytes(values: Tensor) -> bytes:
    copied = values.clone(memory_format=torch.contiguous_format)  # numpy() pins memory, and FSDP must free what it gathered
    return copied.view(torch.uint8).cpu().numpy().tobytes()


def differences(was: dict[str, object], now: dict[str, object]) -> list[str]:
    """Every name whose value is another, as "name: was → is"."""
    pairs = {name: (was.get(name, "absent"), now.get(name, "absent")) for name in {**was, **now}}
    changed = [f"{name}: {before} → {after}" for name, (before, after) in pairs.items() if before != after]
    return changed[:SHOWN] + ([f"… and {len(changed) - SHOWN} more"] if len(changed) > SHOWN else [])
