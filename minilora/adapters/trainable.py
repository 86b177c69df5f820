"""Which parameters are the adapter's, and which of a model's parameters learn. loralib's verbs, with loralib's meaning."""

from typing import get_args

from torch import Tensor, nn

from minilora.adapters.config import Bias, LoraConfig
from minilora.adapters.injection import saved_modules
from minilora.adapters.layers import adapted_layers


def _chosen(model: nn.Module, bias: Bias | None) -> set[str]:
    """Names, in the state dict, of the adapters' tensors, of the biases that go with them, and of the modules saved whole."""
    config = getattr(model, "lora_config", LoraConfig())
    bias = config.bias if bias is None else bias
    if bias not in get_args(Bias):
        raise ValueError(f'bias must be "none", "all" or "lora_only", not {bias!r}')
    state = model.state_dict()
    names = {name for name in state if "lora_" in name}
    if bias == "all":
        names |= {name for name in state if "bias" in name}
    if bias == "lora_only":
        layers = adapted_layers(model).items()
        names |= {f"{path}.bias".removeprefix(".") for path, layer in layers if getattr(layer, "bias", None) is not None}
    return names | {f"{path}.{name}" for path, module in saved_modules(model, config).items() for name in module.state_dict()}


def mark_only_lora_as_trainable(model: nn.Module, bias: Bias | None = None) -> None:
    """Freezes every parameter but the adapters', the modules to save, and the biases: with "all" every one, with "lora_only"
    those of adapted layers, with "none" no one.

    Args:
        bias: as the model's LoraConfig says when None, or "none" where there is no config.

    Raises:
        ValueError: bias is none of the three, or the model has no adapter (everything would be frozen).
    """
    chosen = _chosen(model, bias)
    if not any("lora_" in name for name in chosen):
        raise ValueError("the model has no adapter: inject one first, or nothing is left to train")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)


def lora_state_dict(model: nn.Module, bias: Bias | None = None) -> dict[str, Tensor]:
    """The part of the model's state dict that mark_only_lora_as_trainable would train with the same bias, and with an adapter
    that starts from the weight that start."""
    chosen = _chosen(model, bias)
    return {name: tensor for name, tensor in model.state_dict().items() if name in chosen}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trainable and all parameters, shared ones counted once."""
    sizes = [(parameter.requires_grad, parameter.numel()) for parameter in model.parameters()]
    return sum(n for trainable, n in sizes if trainable), sum(n for _, n in sizes)
