"""The floor of a LoRA step: its frozen products alone, at the rate that torch.mm reaches on their shapes.

Every projection's product with its weight, forward and to its input's gradient, and the head's. The first projection's input has
no gradient to find, since the embedding is frozen; the last token of each sequence foretells nothing, and its logits are not
needed. Nothing else of a step is in it: no attention, no norms, no adapters.
"""

import time

import torch
from torch import Tensor

LEAST = 0.02  # seconds: a product that is done sooner is repeated


class Floor:
    """The operands for a model's config and a batch of B sequences of T tokens; `seconds` times them once."""

    def __init__(self, config: dict, B: int, T: int):
        self.products = products(config, B, T)
        sizes = zip(*((M * K, K * N, M * N) for M, K, N in self.products), strict=True)
        self.left, self.right, self.out = (torch.ones(max(each)) for each in sizes)

    def seconds(self) -> tuple[float, float]:
        """Wall and CPU seconds of all products, each shape timed and multiplied by how often a step has it."""
        wall = cpu = 0.0
        for shape, count in self.products.items():
            one = self._time(shape, 1)
            if one[0] < LEAST:
                one = self._time(shape, 1 + int(LEAST / one[0]))
            wall, cpu = wall + count * one[0], cpu + count * one[1]
        return wall, cpu

    def _time(self, shape: tuple[int, int, int], repeats: int) -> tuple[float, float]:
        M, K, N = shape
        left, right = _matrix(self.left, M, K), _matrix(self.right, N, K).T
        out = _matrix(self.out, M, N)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(repeats):
            torch.mm(left, right, out=out)
        return (time.perf_counter() - wall) / repeats, (time.process_time() - cpu) / repeats


def _matrix(buffer: Tensor, rows: int, columns: int) -> Tensor:
    return buffer[: rows * columns].view(rows, columns)


def products(config: dict, B: int, T: int) -> dict[tuple[int, int, int], int]:
    """How often a step has each frozen product (M, K) × (K, N), by its M, K, N."""
    C, I, D = config["hidden_size"], config["intermediate_size"], config["head_dim"]  # noqa: E741 (the width of the MLP)
    q, kv, layers = config["num_attention_heads"] * D, config["num_key_value_heads"] * D, config["num_hidden_layers"]
    counts = {}
    for N, K in ((q + 2 * kv, C), (C, q), (2 * I, C), (C, I)):
        counts[B * T, K, N] = counts.get((B * T, K, N), 0) + layers
        counts[B * T, N, K] = counts.get((B * T, N, K), 0) + layers
    counts[B * T, q + 2 * kv, C] -= 1
    V, rows = config["vocab_size"], B * (T - 1)
    return counts | {(rows, C, V): 1, (rows, V, C): 1}
