"""4-bit weights on a GPU: quantising, dequantising, and a layer with its adapter for few tokens and for many.

Ours against the same in eager PyTorch and torch.compile, which dequantise the whole weight first; and beside the layer, one with
a 16-bit weight.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.bench_lora_linear import LAYERS, SCALING
from benchmarks.timing import Problem
from minilora.kernels import nf4, nf4_triton
from minilora.kernels.lora_linear import lora_linear, lora_linear_reference
from minilora.kernels.nf4_tensor import NF4Tensor

TOKENS = (1, 16, 32, 512, 2048, 8192)  # up to 32 are dequantised for inside the product
R = 16


def main() -> None:
    """Writes results/nf4.json."""
    timing.main("nf4", problems)


def problems(device: str) -> Iterator[Problem]:
    for name, (N, K) in LAYERS.items():
        yield quantising(name, N, K, device)
        yield dequantising(name, N, K, device)
        yield from (layer(name, tokens, N, K, device) for tokens in TOKENS)


def quantising(name: str, N: int, K: int, device: str) -> Problem:
    values = torch.randn(N * K, device=device).bfloat16()
    least = values.nbytes + N * K // 2 + 4 * N * K // nf4.BLOCK
    return Problem({"part": "quantise", "layer": name}, nf4_triton.quantize_blocks, nf4.quantize_blocks, (values,), least)


def dequantising(name: str, N: int, K: int, device: str) -> Problem:
    codes, absmax = nf4.quantize_blocks(torch.randn(N * K, device=device))
    ours, reference = (partial(room.dequantize_blocks, n=N * K, dtype=torch.bfloat16) for room in (nf4_triton, nf4))
    row = {"part": "dequantise", "layer": name}
    return Problem(row, ours, reference, (codes, absmax), least=codes.nbytes + absmax.nbytes + 2 * N * K)


def layer(name: str, tokens: int, N: int, K: int, device: str) -> Problem:
    weight = NF4Tensor.quantize((torch.randn(N, K, device=device) / K**0.5).bfloat16())
    x = torch.randn(tokens, K, device=device).bfloat16().requires_grad_()
    lora_A, lora_B = (torch.randn(shape, device=device).div_(shape[1] ** 0.5).requires_grad_() for shape in ((R, K), (N, R)))
    plain = weight.dequantize()

    def ours(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return lora_linear(x, weight, lora_A, lora_B, SCALING)

    def reference(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return lora_linear_reference(x, weight.to(x.dtype).dequantize(), lora_A, lora_B, SCALING)

    def sixteen_bit(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return lora_linear(x, plain, lora_A, lora_B, SCALING)

    parts = sum(part.nbytes for part in weight.parts)
    least = 2 * parts + 3 * x.nbytes + 4 * tokens * N + 3 * (lora_A.nbytes + lora_B.nbytes)
    row = {"part": "layer", "layer": name, "tokens": tokens, "r": R}
    return Problem(row, ours, reference, (x, lora_A, lora_B), least, {"16-bit weight": sixteen_bit})
