"""What a library's module in this folder tells the worker: build(folder, config, settings), adapters(model), loss(model, ids).

It runs in that library's own environment, with torch and safetensors and nothing of minilora's but in ours.py.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

TARGETS = {"qkv_proj": "self_attn", "o_proj": "self_attn", "gate_up_proj": "mlp", "down_proj": "mlp"}


@dataclass(frozen=True)
class Settings:
    """Of the adapters, on every projection of TARGETS."""

    r: int
    alpha: float
    dropout: float


class Adapter:
    """One projection's adapter, A (r, K) and B (N, r), as a library's layout holds it.

    Args:
        As: parameters of (k · r, K), each k copies of A: a library that splits the projection gives each part an A of its own.
        Bs: parameters whose rows are those of B, in order.
    """

    def __init__(self, As: list[Tensor], Bs: list[Tensor]):
        self.As, self.Bs = As, Bs

    @torch.no_grad()
    def set(self, A: Tensor, B: Tensor) -> None:
        """Starts every copy of A from A, and the parts of B from B."""
        for parameter in self.As:
            parameter.copy_(A.repeat(len(parameter) // len(A), 1))
        for parameter, rows in zip(self.Bs, B.split([len(part) for part in self.Bs]), strict=True):
            parameter.copy_(rows)

    def gradients(self, r: int) -> tuple[Tensor, Tensor]:
        """Those of A and B: as long as the copies of A are equal, A's is the sum of theirs."""
        of_A = torch.cat([parameter.grad.unflatten(0, (-1, r)) for parameter in self.As]).sum(0)
        return of_A, torch.cat([parameter.grad for parameter in self.Bs])


def layer_paths(config: dict) -> list[dict[str, str]]:
    """For each layer, the path of every projection in the checkpoint, by its name."""
    return [
        {name: f"model.layers.{i}.{block}.{name}" for name, block in TARGETS.items()} for i in range(config["num_hidden_layers"])
    ]


def read_config(folder: str) -> dict:
    return json.loads(Path(folder, "config.json").read_text())


def read_weights(folder: str) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its name."""
    return {name: tensor for file in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(file).items()}


def put(model: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """Copies tensors into the parameters of those names, which must be all of the model's but the adapters'; freezes them."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if "lora_" not in name.lower()}
    if parameters.keys() != tensors.keys():
        raise ValueError(f"these names are on one side only: {', '.join(sorted(parameters.keys() ^ tensors.keys()))}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.requires_grad_(False).copy_(tensors[name])
    return model
