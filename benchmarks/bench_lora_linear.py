"""One LoRA layer's training step on a GPU: ours against eager, addmm, torch.compile, PEFT and the frozen product alone.

Correctness first: what is not within rounding of float64 is not timed. All ways of one row are timed in one process, one after
the other, with L2 flushed before each run (triton.testing.do_bench), and again as CUDA graphs, which hide the launches.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import protocol
from benchmarks.timing import require_cuda
from minilora.kernels import backend
from minilora.kernels.lora_linear import lora_linear, lora_linear_reference

LAYERS = {"qkv": (9216, 3072), "o": (3072, 3072), "gate_up": (16384, 3072), "down": (3072, 8192)}  # N, K of Phi-3-mini
TOKENS, RANKS, DROPOUTS = (512, 2048, 4096, 16384), (8, 16, 64), (0.0, 0.05)
SCALING, TOLERANCE = 2.0, 1e-2  # of bfloat16, in RMS(error) / RMS(reference)
QUANTILES = [0.2, 0.5, 0.8]


def main() -> None:
    """Writes results/lora_linear.json, a row for each layer, number of tokens, rank, dropout and way."""
    require_cuda("lora_linear")
    print(f"{torch.cuda.get_device_name()}; ours: {backend.describe(torch.device('cuda'), torch.bfloat16)}")
    rows = []
    for name, (N, K) in LAYERS.items():
        for tokens in TOKENS:
            for R in RANKS:
                for dropout in DROPOUTS:
                    rows += measure(name, Problem(tokens, N, K, R, dropout))
    protocol.write("lora_linear", rows)


class Problem:
    """The tensors of one step, x and W in bfloat16 and adapters in float32, and the ways to take it."""

    def __init__(self, M: int, N: int, K: int, R: int, dropout: float, device: str = "cuda"):
        self.M, self.N, self.K, self.R, self.dropout = M, N, K, R, dropout
        rand = lambda *shape: torch.randn(shape, device=device)  # noqa: E731
        self.x, self.dy = rand(M, K).bfloat16().requires_grad_(), rand(M, N).bfloat16()
        self.weight = (rand(N, K) / K**0.5).bfloat16()
        self.lora_A, self.lora_B = nn.Parameter(rand(R, K) / K**0.5), nn.Parameter(rand(N, R) / R**0.5)
        self.compiled = torch.compile(self.eager)
        self.peft_layer = self._peft()

    def _peft(self) -> nn.Module:
        from peft import LoraConfig
        from peft.tuners.lora import Linear

        base = nn.Linear(self.K, self.N, bias=False, device="meta")
        base.weight = nn.Parameter(self.weight, requires_grad=False)
        config = LoraConfig(r=self.R, lora_alpha=int(SCALING * self.R), lora_dropout=self.dropout)
        layer = Linear(base, "default", config=config, r=self.R, lora_alpha=config.lora_alpha, lora_dropout=self.dropout)
        layer.lora_A.default.weight, layer.lora_B.default.weight = self.lora_A, self.lora_B
        return layer.to(self.x.device).train()

    def ours(self) -> Tensor:
        return lora_linear(self.x, self.weight, self.lora_A, self.lora_B, SCALING, dropout=self.dropout)

    def eager(self) -> Tensor:
        s = F.linear(F.dropout(self.x, self.dropout), self.lora_A.to(self.x.dtype))
        return F.linear(self.x, self.weight) + SCALING * F.linear(s, self.lora_B.to(self.x.dtype))

    def addmm(self) -> Tensor:
        s = F.linear(F.dropout(self.x, self.dropout), self.lora_A.to(self.x.dtype))
        return torch.addmm(F.linear(self.x, self.weight), s, self.lora_B.to(self.x.dtype).T, alpha=SCALING)

    def torch_compile(self) -> Tensor:
        return self.compiled()

    def peft(self) -> Tensor:
        return self.peft_layer(self.x)

    def frozen(self) -> Tensor:
        return F.linear(self.x, self.weight)

    WAYS = ("frozen", "ours", "eager", "addmm", "torch_compile", "peft")

    def step(self, way: str) -> None:
        """Forward, and backward to x and the adapter."""
        getattr(self, way)().backward(self.dy)

    def error(self, way: str) -> float:
        """The largest RMS error of y, dx, dA and dB over the RMS of the float64 reference, without dropout."""
        kept, self.dropout = self.dropout, 0.0
        self.peft_layer.eval()
        inputs = [self.x, self.lora_A, self.lora_B]
        double = [t.detach().double().requires_grad_() for t in inputs]
        expected = lora_linear_reference(double[0], self.weight.double(), double[1], double[2], SCALING)
        expected = [expected.detach(), *torch.autograd.grad(expected, double, self.dy.double())]
        y = getattr(self, way)()
        found = [y.detach(), *torch.autograd.grad(y, inputs, self.dy, materialize_grads=True)]
        self.dropout = kept
        self.peft_layer.train()
        return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


def measure(name: str, problem: Problem) -> list[dict]:
    """A row for each way."""
    from triton.testing import do_bench, do_bench_cudagraph

    flops = 4 * problem.M * problem.N * problem.K + 6 * problem.M * problem.R * (problem.N + problem.K)
    least = 2 * (3 * problem.x.numel() + 2 * problem.weight.numel() + 2 * problem.dy.numel() + problem.M * problem.R)
    least += 12 * (problem.lora_A.numel() + problem.lora_B.numel())
    checked = [problem.error("ours")] if problem.dropout == 0 else []
    if checked and not checked[0] < TOLERANCE:
        sys.exit(f"{name}, {problem.M} tokens, r {problem.R}: ours is off by {checked[0]:.1e}; nothing was timed")
    rows = []
    for way in problem.WAYS:
        step = lambda way=way: problem.step(way)  # noqa: E731
        leaves = [problem.x, problem.lora_A, problem.lora_B, *problem.peft_layer.parameters()]
        step()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        peak = torch.cuda.max_memory_allocated() - before
        for graphs, bench in ((False, do_bench), (True, do_bench_cudagraph)):
            low, middle, high = bench(step, grad_to_none=leaves, quantiles=QUANTILES)  # ms
            rows.append({
                "layer": name, "tokens": problem.M, "r": problem.R, "dropout": problem.dropout, "way": way, "cuda_graph": graphs,
                "ms_p20": low, "ms_p50": middle, "ms_p80": high, "tflops": flops / middle / 1e9,
                "least_gb_per_s": least / middle / 1e6, "peak_bytes": peak,
            })  # fmt: skip
    floor = {row["cuda_graph"]: row["ms_p50"] for row in rows if row["way"] == "frozen"}
    for row in rows:
        row["over_frozen"] = row["ms_p50"] / floor[row["cuda_graph"]]
        if row["cuda_graph"]:
            print(f"{name} {problem.M} r{problem.R} p{problem.dropout} {row['way']}: {row['ms_p50']:.3f} ms, "
                  f"{row['over_frozen']:.2f} × frozen")  # fmt: skip
    return rows
