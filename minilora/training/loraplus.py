"""LoRA+: B learns faster than A. In wide layers one rate for both is too small for B, or too large for A.

Source: Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models".
"""

from torch import nn


def parameter_groups(model: nn.Module, learning_rate: float, ratio: float) -> list[dict]:
    """What the model trains, for an optimizer: every lora_B at ratio · learning_rate, and all else at learning_rate."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    of_B = [parameter for name, parameter in trained.items() if name.endswith("lora_B")]
    others = [parameter for name, parameter in trained.items() if not name.endswith("lora_B")]
    return [{"params": others, "lr": learning_rate}, {"params": of_B, "lr": ratio * learning_rate}]
