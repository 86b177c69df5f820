"""What can be known of the kernels without a GPU: machine code, bytes, operations, and the time that a roofline allows.

No measurement of speed: a roofline lets each launch take the longer of its bytes at the memory's peak and its products at the
tensor cores' peak, and counts neither latency nor launches. `python -m benchmarks lora_linear` measures, on a GPU.
"""

import torch
import torch.nn.functional as F

from benchmarks import protocol
from benchmarks.bench_lora_linear import LAYERS
from minilora.kernels import (
    cross_entropy,
    cross_entropy_triton,
    lora_linear_triton,
    rms_norm,
    rms_norm_triton,
    rope,
    rope_triton,
    swiglu,
    swiglu_triton,
)
from minilora.kernels.lora_linear import backward, forward
from minilora.kernels.nf4 import BLOCK, GROUP
from minilora.kernels.nf4_tensor import NF4Tensor
from tests.without_gpu import Compiled, Traffic, compiling, counting

PEAKS = {"A100": (312e12, 2.04e12), "H100": (989e12, 3.35e12), "RTX 4090": (165e12, 1.01e12)}  # FLOP/s in bfloat16, bytes/s
M, R = 4096, 16
FEW = (1, 16, 32, M)  # tokens of the products with a 4-bit weight


def main() -> None:
    """Writes results/static.json, and prints its tables."""
    code = [
        row for arch in (80, 89, 90) for name in LAYERS for dropout in (0.0, 0.05) for row in machine_code(arch, name, dropout)
    ]
    lines = [roofline(name, dropout) for name in LAYERS for dropout in (0.0, 0.05)]
    elementwise_lines = [elementwise(name) for name in ELEMENTWISE]
    code_nf4 = [row for arch in (80, 89, 90) for row in machine_code_nf4(arch, "qkv")]
    lines_nf4 = [roofline_nf4(name, tokens) for name in LAYERS for tokens in FEW]
    results = {
        "machine_code": code, "roofline": lines, "elementwise": elementwise_lines,
        "machine_code_nf4": code_nf4, "roofline_nf4": lines_nf4,
    }  # fmt: skip
    for rows in results.values():
        show(rows)
    protocol.write("static", [{"tokens": M, "r": R, "dtype": "bfloat16, adapters float32"} | results])


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


def four_bit(N: int, K: int) -> NF4Tensor:
    """A 4-bit weight on no device."""
    scales = -(-N * K // BLOCK)
    codes, scale_codes = (torch.empty(size, dtype=torch.uint8, device="meta") for size in (N * K // 2, scales))
    nested, offset = torch.empty(-(-scales // GROUP), device="meta"), torch.empty((), device="meta")
    return NF4Tensor(codes, scale_codes, nested, offset, (N, K), torch.bfloat16)


class Product:
    """Y and dX of one layer for a number of tokens, on no device, with a 16-bit or a 4-bit weight."""

    def __init__(self, name: str, tokens: int):
        N, K = LAYERS[name]
        empty = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
        self.four_bit, self.plain = four_bit(N, K), empty(N, K)
        self.x, self.dy, self.s = empty(tokens, K), empty(tokens, N), empty(tokens, R)
        self.lora_A, self.lora_B = empty(R, K, dtype=torch.float32), empty(N, R, dtype=torch.float32)

    def forward(self, weight: torch.Tensor) -> None:
        lora_linear_triton.gemm(self.x, weight, self.s, self.lora_B, ((0, weight.shape[0]),))

    def backward(self, weight: torch.Tensor) -> None:
        lora_linear_triton.gemm(self.dy, weight.t(), self.s, self.lora_A.T, ((0, weight.shape[1]),))


def machine_code(arch: int, name: str, dropout: float) -> list[dict]:
    """One row a kernel of the step, from what Triton compiles for the architecture."""
    with compiling(arch) as compiled:
        Step(name, dropout).ours()
    return [{"arch": f"sm_{arch}", "layer": name, "dropout": dropout} | facts(kernel) for kernel in compiled]


def machine_code_nf4(arch: int, name: str) -> list[dict]:
    """One row a kernel that dequantises: inside Y and dX for few tokens, before them for many."""
    rows = []
    for tokens in FEW[1:]:
        with compiling(arch) as compiled:
            product = Product(name, tokens)
            product.forward(product.four_bit)
            product.backward(product.four_bit)
        rows += [{"arch": f"sm_{arch}", "layer": name, "tokens": tokens} | facts(kernel) for kernel in compiled]
    return rows


def facts(kernel: Compiled) -> dict:
    constants = kernel.constants
    return {
        "kernel": kernel.kernel.removesuffix("_kernel") + (" of dX" if constants.get("TRANSPOSED") else ""),
        "tile": "×".join(
            str(constants[n]) for n in (("BM", "BN") if "BM" in constants else ("BLOCKS", "COUNT")) if n in constants
        ),
        "warps": constants["num_warps"],
        "registers": kernel.registers,
        "spilled bytes": kernel.stack,
        "shared bytes": kernel.shared,
        "tensor-core instructions": kernel.tensor_instructions,
        "asynchronous loads": kernel.opcodes["LDGSTS"],
        "clocks to issue a step": kernel.issue_clocks,
    }


def roofline_nf4(name: str, tokens: int) -> dict:
    """Bytes and roofline times of Y with a 4-bit weight over those with a 16-bit one."""
    product, moved, times = Product(name, tokens), {}, {}
    for weight in (product.four_bit, product.plain):
        with counting(90) as traffic:
            product.forward(weight)
        moved[weight], times[weight] = traffic.total, roofline_times(traffic)
    (bytes_4, bytes_16), (times_4, times_16) = moved.values(), times.values()
    row = {"layer": name, "tokens": tokens, "4-bit bytes / 16-bit": round(bytes_4 / bytes_16, 3)}
    return row | {f"4-bit / 16-bit on {gpu}": round(times_4[gpu] / times_16[gpu], 3) for gpu in PEAKS}


def roofline_times(traffic: Traffic) -> dict[str, float]:
    """Seconds on each GPU: of every launch its bytes or its products, whichever take longer."""
    return {
        gpu: sum(max(flops / flop_rate, moved / byte_rate) for moved, flops, _ in traffic.operations)
        for gpu, (flop_rate, byte_rate) in PEAKS.items()
    }


def roofline(name: str, dropout: float) -> dict:
    """Bytes, operations and roofline times of one step, ours and eager PEFT's, over those of the frozen products."""
    row = {"layer": name, "dropout": dropout}
    step, times = Step(name, dropout), {}
    for way in (step.ours, step.eager_peft, step.frozen):
        with counting(90) as traffic:
            way()
        times[way.__name__] = roofline_times(traffic)
        if way != step.frozen:
            row[f"{way.__name__} bytes / least"] = round(traffic.total / step.least_bytes(), 3)
    for gpu in PEAKS:
        for way in ("ours", "eager_peft"):
            row[f"{way} / frozen on {gpu}"] = round(times[way][gpu] / times["frozen"][gpu], 3)
        row[f"frozen µs on {gpu}"] = round(times["frozen"][gpu] * 1e6, 1)
    return row


C, WIDTH, HEADS, D, V = 3072, 8192, 32, 96, 32064  # of Phi-3-mini


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def norm_ours(x, delta, weight, dh, dy) -> None:
    _, rho, h = rms_norm_triton.forward(x, delta, weight, 1e-5)
    rms_norm_triton.backward(dy, dh, h, rho, weight)


def norm_eager(x, delta, weight, *gradients) -> None:
    x, delta = x.requires_grad_(), delta.requires_grad_()
    h = x + delta
    torch.autograd.backward((h, rms_norm.rms_norm_reference(h, weight, 1e-5)), gradients)


def swiglu_ours(packed, dy) -> None:
    swiglu_triton.forward(packed)
    swiglu_triton.backward(dy, packed)


def swiglu_eager(packed, dy) -> None:
    swiglu.swiglu_reference(packed.requires_grad_()).backward(dy)


def rope_ours(qkv, cos, sin, *gradients) -> None:
    rope.forward(rope_triton.turn, qkv, cos, sin, HEADS, HEADS)
    rope.backward(rope_triton.turn, *gradients, cos, sin)


def rope_eager(qkv, cos, sin, *gradients) -> None:
    torch.autograd.backward(rope.rope_reference(qkv.requires_grad_(), cos, sin, HEADS, HEADS), gradients)


def cross_entropy_ours(logits) -> None:
    cross_entropy_triton.losses_and_dlogits_(logits, torch.empty(len(logits), dtype=torch.int64, device="meta"))


def cross_entropy_eager(logits) -> None:
    labels = torch.empty(len(logits), dtype=torch.int64, device="meta")
    cross_entropy.cross_entropy_reference(lambda logits: logits, logits.requires_grad_(), labels).backward()


ELEMENTWISE = {  # ours, eager PyTorch's, the tensors of both, and how many of the first one's size there and back must move
    "add_rms_norm": (norm_ours, norm_eager, [(M, C), (M, C), (C,), (M, C), (M, C)], 4 + 4),
    "swiglu": (swiglu_ours, swiglu_eager, [(M, 2 * WIDTH), (M, WIDTH)], 1.5 + 2.5),
    "cross_entropy": (cross_entropy_ours, cross_entropy_eager, [(cross_entropy.GPU_CHUNK, V)], 2),
    "rope": (rope_ours, rope_eager, [(1, M, 3 * HEADS * D), *2 * [(1, 1, M, D // 2)], *3 * [(1, HEADS, M, D)]], 4 / 3 + 2),
}


def elementwise(name: str) -> dict:
    """Registers and spills of an operation's kernels, and its bytes, ours and eager PyTorch's, forward and backward."""
    ours, eager, shapes, least = ELEMENTWISE[name]
    row = {"operation": name}
    for arch in (80, 89, 90):
        with compiling(arch) as compiled:
            ours(*(empty(*shape) for shape in shapes))
        row[f"registers on sm_{arch}"] = max(kernel.registers for kernel in compiled)
        row[f"spilled bytes on sm_{arch}"] = sum(kernel.stack for kernel in compiled)
    for way, function in (("ours", ours), ("eager", eager)):
        tensors = [empty(*shape) for shape in shapes]
        with counting(90) as traffic:
            function(*tensors)
        row[f"{way} bytes / least"] = round(traffic.total / (least * tensors[0].nbytes), 3)
    return row
