"""Which parameters are the adapter's, and which of a model's parameters learn. loralib's verbs, with loralib's meaning."""

from typing import Literal

from torch import Tensor, nn

from minilora.layers import adapted_layers

Bias = Literal["none", "all", "lora_only"]


def _chosen(model: nn.Module, bias: Bias) -> set[str]:
    """Names of the adapters' parameters and of the biases that go with them."""
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f'bias must be "none", "all" or "lora_only", not {bias!r}')
    names = {name for name, _ in model.named_parameters() if "lora_" in name}
    if bias == "all":
        names |= {name for name, _ in model.named_parameters() if "bias" in name}
    if bias == "lora_only":
        layers = adapted_layers(model).items()
        names |= {f"{path}.bias".removeprefix(".") for path, layer in layers if getattr(layer, "bias", None) is not None}
    return names


def mark_only_lora_as_trainable(model: nn.Module, bias: Bias = "none") -> None:
    """Freezes every parameter but the adapters' and, with "all", every bias or, with "lora_only", the adapted layers' biases.

    Raises:
        ValueError: bias is none of the three, or the model has no adapter (everything would be frozen).
    """
    chosen = _chosen(model, bias)
    if not any("lora_" in name for name in chosen):
        raise ValueError("the model has no adapter: inject one first, or nothing is left to train")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)


def lora_state_dict(model: nn.Module, bias: Bias = "none") -> dict[str, Tensor]:
    """The part of the model's state dict that mark_only_lora_as_trainable would train with the same bias."""
    chosen = _chosen(model, bias)
    return {name: tensor for name, tensor in model.state_dict().items() if name in chosen}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trainable and all parameters, shared ones counted once."""
    sizes = [(parameter.requires_grad, parameter.numel()) for parameter in model.parameters()]
    return sum(n for trainable, n in sizes if trainable), sum(n for _, n in sizes)
