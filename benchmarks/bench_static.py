"""What can be known of the LoRA kernels without a GPU: machine code, bytes, operations, and the time that a roofline allows.

No measurement of speed: a roofline lets each launch take the longer of its bytes at the memory's peak and its products at the
tensor cores' peak, and counts neither latency nor launches. `python -m benchmarks lora_linear` measures, on a GPU.
"""

import torch
import torch.nn.functional as F

from benchmarks import protocol
from benchmarks.bench_lora_linear import LAYERS
from minilora.kernels import lora_linear_triton
from minilora.kernels.lora_linear import backward, forward
from tests.without_gpu import compiling, counting

PEAKS = {"A100": (312e12, 2.04e12), "H100": (989e12, 3.35e12), "RTX 4090": (165e12, 1.01e12)}  # FLOP/s in bfloat16, bytes/s
M, R = 4096, 16


def main() -> None:
    """Writes results/static.json, and prints its tables."""
    code = [
        row for arch in (80, 89, 90) for name in LAYERS for dropout in (0.0, 0.05) for row in machine_code(arch, name, dropout)
    ]
    lines = [roofline(name, dropout) for name in LAYERS for dropout in (0.0, 0.05)]
    show(code)
    show(lines)
    protocol.write(
        "static", [{"tokens": M, "r": R, "dtype": "bfloat16, adapters float32", "machine_code": code, "roofline": lines}]
    )


def show(rows: list[dict]) -> None:
    print("\n" + " | ".join(rows[0]))
    for row in rows:
        print(" | ".join(map(str, row.values())))


class Step:
    """One layer's tensors on no device, and its training step: forward, then backward to x, lora_A and lora_B."""

    def __init__(self, name: str, dropout: float):
        N, K = LAYERS[name]
        empty = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
        self.x, self.weight, self.dy = empty(M, K), empty(N, K), empty(M, N)
        self.lora_A, self.lora_B = empty(R, K, dtype=torch.float32), empty(N, R, dtype=torch.float32)
        self.dropout, self.constants = dropout, (empty(dtype=torch.int64), 2.0, dropout, ((0, N),))

    def ours(self) -> None:
        _, s = forward(lora_linear_triton, self.x, self.weight, self.lora_A, self.lora_B, None, *self.constants)
        saved = self.x, s, self.weight, self.lora_A, self.lora_B
        backward(lora_linear_triton, self.dy, *saved, *self.constants, [True, False, True, True, False])

    def eager_peft(self) -> None:
        """The operations of PEFT's Linear.forward, and what autograd makes of them; adapters in bfloat16, its fastest way."""
        x, A, B = (t.to(torch.bfloat16).detach().requires_grad_() for t in (self.x, self.lora_A, self.lora_B))
        y = F.linear(x, self.weight) + F.linear(F.linear(F.dropout(x, self.dropout), A), B) * 2.0
        y.backward(self.dy)

    def frozen(self) -> None:
        """The two products of the frozen layer alone: what no adapter can go below."""
        self.x @ self.weight.T
        self.dy @ self.weight

    def least_bytes(self) -> int:
        """Forward and backward, each tensor moved once."""
        adapter = 4 * (self.lora_A.numel() + self.lora_B.numel())
        return 2 * (3 * self.x.numel() + 2 * self.weight.numel() + 2 * self.dy.numel() + M * R) + 3 * adapter


def machine_code(arch: int, name: str, dropout: float) -> list[dict]:
    """One row a kernel of the step, from what Triton compiles for the architecture."""
    with compiling(arch) as compiled:
        Step(name, dropout).ours()
    return [
        {
            "arch": f"sm_{arch}",
            "layer": name,
            "dropout": dropout,
            "kernel": kernel.kernel.removesuffix("_kernel"),
            "tile": f"{kernel.constants['BM']}×{kernel.constants['BN']}",
            "warps": kernel.constants["num_warps"],
            "registers": kernel.registers,
            "spilled bytes": kernel.stack,
            "shared bytes": kernel.shared,
            "tensor-core instructions": kernel.tensor_instructions,
            "asynchronous loads": kernel.opcodes["LDGSTS"],
            "clocks to issue a step": kernel.issue_clocks,
        }
        for kernel in compiled
    ]


def roofline(name: str, dropout: float) -> dict:
    """Bytes, operations and roofline times of one step, ours and eager PEFT's, over those of the frozen products."""
    row = {"layer": name, "dropout": dropout}
    step, times = Step(name, dropout), {}
    for way in (step.ours, step.eager_peft, step.frozen):
        with counting(90) as traffic:
            way()
        times[way.__name__] = {
            gpu: sum(max(flops / flop_rate, moved / byte_rate) for moved, flops in traffic.operations)
            for gpu, (flop_rate, byte_rate) in PEAKS.items()
        }
        if way != step.frozen:
            row[f"{way.__name__} bytes / least"] = round(traffic.total / step.least_bytes(), 3)
    for gpu in PEAKS:
        for way in ("ours", "eager_peft"):
            row[f"{way} / frozen on {gpu}"] = round(times[way][gpu] / times["frozen"][gpu], 3)
        row[f"frozen µs on {gpu}"] = round(times["frozen"][gpu] * 1e6, 1)
    return row
