"""Which weights of a model are 4-bit, and what config.json says of them, in transformers' words.

Source: transformers 5.23, utils/quantization_config.py, BitsAndBytesConfig.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from minilora.kernels.nf4_tensor import NF4Tensor

# What quantization_config must say. Left out, the last one means what it must be; the others mean something else.
CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
STORAGE = {"bnb_4bit_quant_storage": "uint8"}


def quantized_weights(model: nn.Module) -> dict[str, NF4Tensor]:
    """The weights of a model that are 4-bit, by their names."""
    return {name: weight for name, weight in model.named_parameters() if isinstance(weight, NF4Tensor)}


@torch.no_grad()
def dequantize(model: nn.Module) -> None:
    """Makes the weights that are 4-bit plain ones, of the dtype that they stand for, one after another."""
    for name, weight in quantized_weights(model).items():
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(weight.dequantize(), requires_grad=False))


def is_4_bit(folder: Path) -> bool:
    """Whether the config.json of a checkpoint says that its weights are; of one that Phi3Config.read takes."""
    return bool(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config"))


def faults_of_config(raw: object) -> list[str]:
    """What config.json's quantization_config asks for and cannot be had; None asks for nothing."""
    if raw is None:
        return []
    if not isinstance(raw, dict):
        return [f"quantization_config must be an object or null, not {raw!r}"]
    return [
        f"quantization_config.{name} must be {json.dumps(value)}, not {json.dumps(raw.get(name))} (bitsandbytes' NF4 with double "
        "quantisation is read, and nothing else)"
        for name, value in (CONFIG | STORAGE).items()
        if raw.get(name, STORAGE.get(name)) != value
    ]


def make_config(compute_dtype: torch.dtype, plain: Iterable[str]) -> dict:
    """quantization_config for a model that multiplies in a dtype; plain are the paths of linear layers that are not 4-bit."""
    dtype = str(compute_dtype).removeprefix("torch.")
    return CONFIG | STORAGE | {"bnb_4bit_compute_dtype": dtype, "llm_int8_skip_modules": list(plain)}
