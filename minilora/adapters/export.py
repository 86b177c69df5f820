"""Adapter files made over for other readers, without the base model.

PEFT reads every adapter here as it is. vLLM knows one scale for all layers, alpha / r, and reserves room for one of RANKS; it
skips rank_pattern and alpha_pattern without a word. For it every layer is padded with zeros to a common rank, and a scale other
than the most common one is folded into B.
"""

from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.adapters.adapter_files import read_adapter_tensors, write_adapter
from minilora.adapters.config import LoraConfig, scaling
from minilora.adapters.peft_config import read_peft_config

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's choices for max_lora_rank
READERS = ("peft", "vllm")


def export_adapter(path: Path | str, output: Path | str, reader: str) -> list[str]:
    """Writes the adapter in `path` as a new folder for a reader, one of READERS; the same ΔW for every layer.

    Returns:
        The layers whose B was multiplied by a factor, and so rounded to its dtype anew.

    Raises:
        ValueError: the reader is unknown, or the adapter has what the reader cannot apply; all faults at once.
    """
    if reader not in READERS:
        raise ValueError(f"an adapter can be exported for {' or '.join(READERS)}, not {reader!r}")
    stored, tensors = read_peft_config(path), read_adapter_tensors(path)
    config, rescaled = {key: value for key, value in stored.raw.items() if key != "minilora"}, []
    if reader == "vllm":
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".base_layer.weight")}  # the base's own
        _refuse_for_vllm(path, stored.lora, tensors)
        settings, tensors, rescaled = _with_one_scale(stored.lora, tensors)
        config |= settings
    write_adapter(output, config, tensors, {"format": "pt"})
    return rescaled


def _refuse_for_vllm(path: Path | str, config: LoraConfig, tensors: dict[str, Tensor]) -> None:
    asked = {
        "use_dora": config.use_dora,
        "lora_bias": config.lora_bias,
        "modules_to_save": config.modules_to_save or False,
        "bias": config.bias != "none" and config.bias,
        "init_lora_weights": config.init_lora_weights is not True and config.init_lora_weights,
    }
    faults = [f"{name} = {value!r}" for name, value in asked.items() if value]
    pairs = (".lora_A.weight", ".lora_B.weight")
    faults += [name for name, tensor in tensors.items() if not name.endswith(pairs) or tensor.ndim != 2]
    largest = max((tensor.shape[0] for name, tensor in tensors.items() if name.endswith(pairs[0])), default=0)
    if largest > RANKS[-1]:
        faults.append(f"a rank of {largest}, where {RANKS[-1]} is the most")
    if faults:
        raise ValueError(f"vLLM cannot apply what the adapter in {path} has: {', '.join(faults)}")


def _with_one_scale(config: LoraConfig, tensors: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor], list[str]]:
    """The settings and tensors of the same adapter with one rank and one scale, and the layers whose B had to change."""
    layers = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    scales = {layer: scaling(config.rank(layer), config.alpha(layer), config.use_rslora) for layer in layers}
    scale = Counter(scales.values()).most_common(1)[0][0]
    largest = max(tensors[f"{layer}.lora_A.weight"].shape[0] for layer in layers)
    rank = next(rank for rank in RANKS if rank >= largest)
    padded = {}
    for layer in layers:
        A, B = tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]
        if scales[layer] != scale:
            B = (B.to(torch.promote_types(B.dtype, torch.float32)) * (scales[layer] / scale)).to(B.dtype)
        padded[f"{layer}.lora_A.weight"] = F.pad(A, (0, 0, 0, rank - len(A)))
        padded[f"{layer}.lora_B.weight"] = F.pad(B, (0, rank - B.shape[1]))
    alpha = scale * rank
    settings = {"r": rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "use_rslora": False}
    settings |= {"rank_pattern": {}, "alpha_pattern": {}}
    return settings, padded, [layer for layer in layers if scales[layer] != scale]
