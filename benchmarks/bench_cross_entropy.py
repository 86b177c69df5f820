"""The head and its loss on a GPU, forward and backward to the hidden states: ours against full logits, eager and compiled."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import timing
from benchmarks.bench_static import C
from benchmarks.timing import Problem
from minilora.kernels.cross_entropy import cross_entropy_reference, head_cross_entropy

CASES = ((512, 32064), (2048, 32064), (8192, 32064), (2048, 200064))  # tokens, and the vocabulary of Phi-3-mini or Phi-4-mini


def main() -> None:
    """Writes results/cross_entropy.json."""
    timing.main("cross_entropy", lambda device: (problem(tokens, C, V, device) for tokens, V in CASES))


def problem(tokens: int, width: int, vocabulary: int, device: str) -> Problem:
    x = torch.randn(tokens, width, device=device).bfloat16().requires_grad_()
    weight = (torch.randn(vocabulary, width, device=device) / width**0.5).bfloat16()
    labels = torch.randint(vocabulary, (tokens,), device=device)
    row = {"tokens": tokens, "width": width, "vocabulary": vocabulary}
    return Problem(row, ours, reference, (x, weight, labels), least=2 * (x.nbytes + weight.nbytes))


def ours(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    head = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    head.weight = nn.Parameter(weight, requires_grad=False)
    return head_cross_entropy(head, x, labels)


def reference(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy_reference(lambda rows: F.linear(rows, weight), x, labels)
