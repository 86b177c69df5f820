"""minilora: LoRA fine-tuning of the Phi-3 family from scratch in PyTorch and Triton.

The public names, each fetched from its room on first use, so that importing the package costs nothing:
"""

import importlib

_ROOMS = {
    "adapters.config": ["LoraConfig"],
    "training.config": ["TrainConfig"],
    "adapters.layers": ["LoRALayer", "Linear", "MergedLinear"],
    "adapters.embedding": ["Embedding"],
    "adapters.convolution": ["Conv1d", "Conv2d", "Conv3d"],
    "adapters.injection": ["inject", "remove"],
    "adapters.trainable": ["mark_only_lora_as_trainable", "lora_state_dict"],
    "adapters.adapter_files": ["save_adapter", "load_adapter"],
    "adapters.switching": ["set_adapter", "disable_adapter"],
    "adapters.combination": ["add_weighted_adapter"],
    "adapters.batching": ["mixed_batch"],
    "adapters.merging": ["merge", "unmerge"],
    "data.conversations": ["read_conversations"],
    "data.encoding": ["encode_conversations"],
    "data.packing": ["pack"],
    "training.loop": ["train"],
    "training.evaluation": ["evaluate"],
    "training.distributed": ["shard_base"],
    "training.questions": ["Questions"],
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
