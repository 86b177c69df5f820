"""Predicted, not measured: a LoRA step of Phi-3-mini on three GPUs, from counted launches, so that a GPU run can prove it wrong.

Every way's launches are counted on no device, each with the bytes that it moves and the FLOPs of its products. Then

    GPU        Σ over launches of max(bytes / (DRAM share · peak), FLOPs / (share of its kind · peak), shortest kernel)
    host       launches of torch · 8 µs + launches of Triton · 15 µs
    step       the longer of the two: the host runs ahead, or the GPU waits for it

`python -m benchmarks train_step` measures the same steps. Unsloth's launches are those of unsloth_plan.py.
"""

import bisect
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

import minilora as lora
from benchmarks import protocol, unsloth_plan
from benchmarks.bench_static import PEAKS
from benchmarks.bench_train_step import CONFIG, SEQUENCES, WAYS, R, model_flops
from minilora.adapters.trainable import count_parameters
from minilora.training import planning
from tests.without_gpu import Operation, counting

ARCH = 90
PEFT, UNSLOTH = ("transformers + PEFT, SDPA", "bfloat16"), ("Unsloth", "bfloat16")
CASES = [("ours", "bfloat16"), ("ours", "nf4"), PEFT, ("transformers + PEFT, eager attention", "bfloat16"), UNSLOTH]

ASSUMPTIONS = """\
A measured step that is off by more than a quarter, or two ways in another order that should be a quarter apart, prove one of
these wrong:

- One sequence a step, adapters of rank 16 on all four projections (Unsloth: on the seven that it splits them into), no dropout,
  no activation checkpointing, no clipping of gradients; the base is frozen in bfloat16, or 4-bit where the way says so.
- Phi-3-mini's sizes without its window of 2,047 tokens, so that attention is plain causal at every length, and flash attention
  wherever it is not written out in products (eager attention). Flash attention counts half of the FLOPs, since it is causal, and
  in backward 2.5 × those of forward, since it makes Q Kᵀ again.
- What ours launches is what it launches on an H100 (sm_90), whose sums are cut as those of the others are, nearly everywhere.
- Within a launch every tensor is read or written once; from one to the next, caches remember nothing. At 512 tokens a large L2
  would spare some of that, of eager PyTorch most: there the GPU's time flatters ours.
- DRAM gives 0.85 of its peak to every kernel: what copies of large tensors reach.
- torch's products (cuBLAS) reach 0.80 of the tensor cores' peak on an A100, 0.65 on an H100 (whose clock falls under their
  power) and 0.88 on an RTX 4090, at all sizes: about what is commonly told of large ones.
- Triton's products reach 0.95 of cuBLAS's rate on an A100 and an RTX 4090, whose tensor cores both feed in the same way, and
  0.80 on an H100, whose TMA and warp specialisation ours do not use. This is the least certain number of all: the column
  "level with PEFT at" tells which share ours must reach to be as fast as transformers + PEFT with SDPA on that GPU, and the next
  one the same for Unsloth (empty where not even 1.00 is enough).
- Flash attention (FlashAttention-2, head size 96, forward and backward together) reaches 0.50, 0.35 and 0.60 of the peak.
- No kernel takes less than 2 µs. torch's operations take 8 µs of the host each, their share of Python, autograd and views
  included (9 µs was found for a step of tiny tensors on a CPU, their arithmetic included); a Triton launch takes 15 µs (3 µs of
  its launcher's Python and 7 µs of a torch operation in Python around it were found on a CPU; the driver's part is assumed).
- PEFT holds its adapters in bfloat16, its fastest way. AdamW is torch's, by lists of tensors (foreach), the same for all.
- "GB at the peak" is what `minilora train --plan` foretells; an RTX 4090 has 24 GB, and cannot take the steps that need more.
- The loss is over all tokens. Ours computes logits in chunks of rows, the others all at once; Unsloth's cross-entropy is fused.
"""


@dataclass(frozen=True)
class GPU:
    """Peaks of a GPU, and what is reached of them."""

    flops: float  # a second, bfloat16 with float32 sums
    bytes: float  # a second
    products: float  # share of flops that torch's products reach
    triton: float  # share of that that Triton's products reach
    attention: float  # share of flops
    dram: float = 0.85  # share of bytes
    shortest: float = 2e-6  # seconds of the shortest kernel
    torch_launch: float = 8e-6  # seconds of the host
    triton_launch: float = 15e-6

    def rate(self, kernel: str) -> float:
        """FLOPs a second of a kernel's products."""
        if "attention" in kernel:
            return self.flops * self.attention
        return self.flops * self.products * (self.triton if is_triton(kernel) else 1)

    def kernels(self, operations: Iterable[Operation]) -> float:
        """Seconds of the GPU."""
        return sum(max(o.bytes / (self.bytes * self.dram), o.flops / self.rate(o.kernel), self.shortest) for o in operations)

    def host(self, operations: Iterable[Operation]) -> float:
        """Seconds of the CPU that launches."""
        return sum(self.triton_launch if is_triton(o.kernel) else self.torch_launch for o in operations)

    def step(self, operations: list[Operation]) -> float:
        """Seconds."""
        return max(self.kernels(operations), self.host(operations))


def is_triton(kernel: str) -> bool:
    return kernel.endswith("_kernel")


REACHED = {"A100": (0.80, 0.95, 0.50), "H100": (0.65, 0.80, 0.35), "RTX 4090": (0.88, 0.95, 0.60)}  # products, triton, attention
GPUS = {name: GPU(*peaks, *REACHED[name]) for name, peaks in PEAKS.items()}


def main() -> None:
    """Writes results/predicted.json and predicted.md: a row for each way, number of tokens, part and GPU."""
    rows = [row for tokens in SEQUENCES for row in predict(tokens)]
    protocol.write("predicted", rows)
    protocol.write_table("predicted", report(rows))


# Counting


def launches(way: str, base: str, tokens: int, layers: int) -> list[Operation]:
    """Those of forward and backward on a model of so many layers."""
    config = replace(CONFIG, num_hidden_layers=layers)
    if way == "Unsloth":
        with counting(ARCH) as traffic:
            unsloth_plan.Step(config, tokens, R, traffic).run()
        return traffic.operations
    with counting(ARCH):  # so that on no device it builds what it would on a GPU
        _, loss = WAYS[way].build(config, base, tokens, "meta")
    ids = torch.empty(1, tokens, dtype=torch.int64, device="meta")
    with counting(ARCH) as traffic:
        loss(ids).backward()
    return traffic.operations


def model_of_ours() -> nn.Module:
    return WAYS["ours"].build(CONFIG, "bfloat16", 1, "meta")[0]


def optimizer() -> list[Operation]:
    """The launches of AdamW on the adapter."""
    parameters = [parameter for parameter in model_of_ours().parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    adamw = torch.optim.AdamW(parameters, foreach=True)
    adamw.step()  # which makes its moments
    with counting(ARCH) as traffic:
        adamw.step()
    return traffic.operations


def parts(way: str, base: str, tokens: int) -> dict[str, list[Operation]]:
    """The launches of one layer, which are what a second adds to a first, and of a whole step, where all but the first are so."""
    one, two = (Counter(launches(way, base, tokens, layers)) for layers in (1, 2))
    layer = list((two - one).elements())
    return {"layer": layer, "step": [*one.elements(), *(CONFIG.num_hidden_layers - 1) * layer, *optimizer()]}


# Predicting


def predict(tokens: int) -> Iterator[dict]:
    """A row for each part, way, base and GPU."""
    counted = {case: parts(*case, tokens) for case in CASES}
    adapter, _ = count_parameters(model_of_ours())
    for part, (way, base), (name, gpu) in itertools.product(("step", "layer"), CASES, GPUS.items()):
        found = counted[way, base][part]
        seconds, peft, unsloth = (gpu.step(counted[case][part]) for case in ((way, base), PEFT, UNSLOTH))
        row = {
            "gpu": name, "part": part, "way": way, "base": base, "tokens": tokens, "launches": len(found),
            "gigabytes": sum(launch.bytes for launch in found) / 1e9, "teraflops": sum(launch.flops for launch in found) / 1e12,
            "gpu_ms": gpu.kernels(found) * 1e3, "host_ms": gpu.host(found) * 1e3, "ms": seconds * 1e3,
            "over_peft": seconds / peft,
        }  # fmt: skip
        if part == "step":
            row["mfu"] = model_flops(CONFIG, adapter, tokens) / seconds / gpu.flops
        if part == "step" and way == "ours":
            row |= {"level_with_peft_at": level(found, peft, gpu), "level_with_unsloth_at": level(found, unsloth, gpu)}
            row |= {"planned_gb": planned(tokens, base) / 1e9}
        yield {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}


def level(launches: list[Operation], seconds: float, gpu: GPU) -> float | None:
    """The least share, in hundredths, of cuBLAS's rate at which Triton's products bring a step to these seconds."""
    at = bisect.bisect_left(range(1, 101), -seconds, key=lambda share: -replace(gpu, triton=share / 100).step(launches))
    return (at + 1) / 100 if at < 100 else None


def planned(tokens: int, base: str) -> int:
    """Bytes at the peak of a step of ours, as `minilora train --plan` tells them."""
    quantize = "nf4" if base == "nf4" else None
    return planning.memory(model_of_ours(), planning.Batch(1, tokens, tokens), lora.TrainConfig(), "cuda", quantize).peak


# As text


def report(rows: list[dict]) -> str:
    """The rows as Markdown, with all that they assume."""
    head = "# Predicted, not measured: a LoRA step of Phi-3-mini\n\n" + __doc__.partition("\n\n")[2].strip()
    texts = [head, "## Assumptions\n\n" + ASSUMPTIONS + "\n" + unsloth_plan.__doc__.partition("\n\n")[2].strip()]
    for part, title in {"step": "A whole step", "layer": "One layer, forward and backward"}.items():
        for gpu in GPUS:
            found = [row for row in rows if (row["gpu"], row["part"]) == (gpu, part)]
            texts.append(f"## {title}, {gpu}: predicted, not measured\n\n" + table(found))
    return "\n\n".join(text.strip() for text in texts) + "\n"


def table(rows: list[dict]) -> str:
    columns = {
        "tokens": "tokens", "way": "way", "base": "base", "launches": "launches", "gigabytes": "GB moved", "gpu_ms": "GPU ms",
        "host_ms": "host ms", "ms": "predicted ms", "over_peft": "over PEFT's", "mfu": "MFU",
        "level_with_peft_at": "level with PEFT at", "level_with_unsloth_at": "level with Unsloth at",
        "planned_gb": "GB at the peak",
    }  # fmt: skip
    wanted = [name for name in columns if any(name in row for row in rows)]
    return protocol.markdown([columns[name] for name in wanted], [[cell(row.get(name)) for name in wanted] for row in rows])


def cell(value: str | float | None) -> str:
    return f"{value:,.2f}" if isinstance(value, float) else str("" if value is None else value)
