"""minilora: LoRA fine-tuning of the Phi-3 family from scratch in PyTorch and Triton.

The public names, each fetched from its room on first use, so that importing the package costs nothing:
"""

import importlib

_ROOMS = {
    "config": ["LoraConfig", "TrainConfig"],
    "layers": ["LoRALayer", "Linear", "MergedLinear"],
    "embedding": ["Embedding"],
    "convolution": ["Conv1d", "Conv2d", "Conv3d"],
    "injection": ["inject", "remove"],
    "trainable": ["mark_only_lora_as_trainable", "lora_state_dict"],
    "adapter": ["save_adapter", "load_adapter"],
    "switching": ["set_adapter", "disable_adapter"],
    "combination": ["add_weighted_adapter"],
    "batching": ["mixed_batch"],
    "merging": ["merge", "unmerge"],
    "conversations": ["read_conversations"],
    "data": ["encode_conversations"],
    "packing": ["pack"],
    "training": ["train"],
    "evaluation": ["evaluate"],
    "distributed": ["shard_base"],
    "questions": ["Questions"],
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = sorted(_HOME)  # noqa: PLE0605 (made from the table above)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return [*globals(), *__all__]
