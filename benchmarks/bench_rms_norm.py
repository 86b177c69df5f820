"""The sum and RMSNorm of a decoder layer on a GPU, forward and backward: ours against eager PyTorch and torch.compile."""

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.bench_static import C
from benchmarks.timing import Problem
from minilora.kernels.rms_norm import add_rms_norm, rms_norm_reference

TOKENS = (512, 2048, 8192)
EPS = 1e-5


def main() -> None:
    """Writes results/rms_norm.json."""
    timing.main("rms_norm", lambda device: (problem(tokens, C, device) for tokens in TOKENS))


def problem(tokens: int, width: int, device: str) -> Problem:
    x, delta = (torch.randn(tokens, width, device=device).bfloat16() for _ in range(2))
    weight = torch.rand(width, device=device).bfloat16()
    row = {"tokens": tokens, "width": width}
    inputs = x.requires_grad_(), delta, weight  # delta has the gradient of x: to keep it twice would be a copy
    return Problem(row, ours, reference, inputs, least=8 * x.nbytes)  # x, delta, h, y; then h, dh, dy, dx


def ours(x: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return add_rms_norm(x, delta, weight, EPS)


def reference(x: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    h = x + delta
    return h, rms_norm_reference(h, weight, EPS)
