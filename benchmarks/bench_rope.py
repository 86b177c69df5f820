"""The rotary embedding of packed q, k and v on a GPU, forward and backward: ours against eager PyTorch and torch.compile."""

from functools import partial

import torch

from benchmarks import timing
from benchmarks.bench_static import HEADS, D
from benchmarks.timing import Problem
from minilora.kernels.rope import rope, rope_reference

TOKENS = (512, 2048, 8192)


def main() -> None:
    """Writes results/rope.json."""
    timing.main("rope", lambda device: (problem(tokens, HEADS, D, device) for tokens in TOKENS))


def problem(tokens: int, heads: int, size: int, device: str) -> Problem:
    qkv = torch.randn(1, tokens, 3 * heads * size, device=device).bfloat16().requires_grad_()
    angles = torch.rand(1, 1, tokens, size // 2, device=device)
    row = {"tokens": tokens, "heads": heads, "head_dim": size}
    inputs = qkv, angles.cos().bfloat16(), angles.sin().bfloat16()
    ours, reference = (partial(function, heads=heads, kv_heads=heads) for function in (rope, rope_reference))
    return Problem(row, ours, reference, inputs, least=10 * qkv.nbytes // 3)  # forward reads and writes q and k
