"""minilora: its decoder with its adapters, in the memory that its training loop keeps."""

from side import TARGETS, Adapter, Settings
from torch import Tensor, nn

from minilora import phi3
from minilora.adapters.config import LoraConfig
from minilora.adapters.injection import inject
from minilora.adapters.layers import adapted_layers
from minilora.adapters.trainable import mark_only_lora_as_trainable
from minilora.training.memory import keep_freed_memory


def build(folder: str, config: dict, settings: Settings) -> nn.Module:
    """The model of a checkpoint folder in training mode, its base frozen, with adapters on all projections."""
    keep_freed_memory()  # as lora.train does
    model = phi3.load(folder)
    inject(model, LoraConfig(settings.r, settings.alpha, settings.dropout, target_modules=list(TARGETS)))
    mark_only_lora_as_trainable(model)
    return model.train()


def adapters(model: nn.Module, config: dict) -> dict[str, Adapter]:
    """The adapter of each projection, by its path in the checkpoint."""
    return {path: Adapter([layer.lora_A], [layer.lora_B]) for path, layer in adapted_layers(model).items()}


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    """The mean loss of foretelling each token of ids (B, T) from those before it."""
    return model(ids, labels=ids)
