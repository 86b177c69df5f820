"""SwiGLU on packed gate and up on a GPU, forward and backward: ours against eager PyTorch and torch.compile."""

import torch

from benchmarks import timing
from benchmarks.bench_static import WIDTH
from benchmarks.timing import Problem
from minilora.kernels.swiglu import swiglu, swiglu_reference

TOKENS = (512, 2048, 8192)


def main() -> None:
    """Writes results/swiglu.json."""
    timing.main("swiglu", lambda device: (problem(tokens, WIDTH, device) for tokens in TOKENS))


def problem(tokens: int, width: int, device: str) -> Problem:
    packed = torch.randn(tokens, 2 * width, device=device).bfloat16().requires_grad_()
    row = {"tokens": tokens, "width": width}
    return Problem(row, swiglu, swiglu_reference, (packed,), least=4 * packed.nbytes)  # packed, half, half; packed, gradient
