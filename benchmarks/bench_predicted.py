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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

import minilora as lora
from benchmarks import protocol, unsloth_plan
from benchmarks.bench_static import PEAKS, four_bit
from benchmarks.bench_train_step import model_flops
from benchmarks.bench_true_size import PHI_3_MINI, TARGETS
from minilora import phi3, planning
from minilora.trainable import count_parameters
from tests.without_gpu import Operation, counting

CONFIG = replace(PHI_3_MINI, sliding_window=None)
R, TOKENS = 16, (512, 2048, 8192)

ASSUMPTIONS = """\
- One sequence a step, adapters of rank 16 on all four projections (Unsloth: on the seven that it splits them into), no dropout,
  no activation checkpointing, no clipping of gradients; the base is frozen in bfloat16, or 4-bit where the way says so.
- Phi-3-mini's sizes without its window of 2,047 tokens, so that attention is plain causal at every length, and flash attention
  wherever it is not written out (eager attention). A causal product counts half of its FLOPs; backward takes 2.5 × forward.
- Within a launch every tensor is read or written once; from one to the next, caches remember nothing. At 512 tokens a large L2
  would spare eager PyTorch some of that; there the host is the longer one.
- DRAM gives 0.85 of its peak to every kernel: what copies of large tensors reach.
- torch's products (cuBLAS) reach 0.80 of the tensor cores' peak on an A100, 0.65 on an H100 (whose clock falls under their
  power) and 0.88 on an RTX 4090, at all sizes.
- Triton's products reach 0.95 of cuBLAS's rate on an A100 and an RTX 4090, whose tensor cores both feed in the same way, and
  0.80 on an H100, whose TMA and warp specialisation ours do not use. This is the least certain number of all: the column
  "level with PEFT at" tells which share ours must reach to be as fast as transformers + PEFT with SDPA on that GPU.
- Flash attention (FlashAttention-2, head size 96, forward and backward together) reaches 0.50, 0.35 and 0.60 of the peak.
- No kernel takes less than 2 µs. torch's operations take 8 µs of the host each, their share of Python, autograd and views
  included (9 µs on the CPU of this result, arithmetic of tiny tensors included); a Triton launch takes 15 µs (3 µs of its
  launcher's Python and 7 µs of a torch operation in Python around it were found there; the driver's part is assumed).
- PEFT holds its adapters in bfloat16, its fastest way. AdamW is torch's, by lists of tensors (foreach), the same for all.
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
    rows = [row for tokens in TOKENS for row in predict(tokens)]
    protocol.write("predicted", rows)
    protocol.write_table("predicted", report(rows))


# Counting


def ours(tokens: int, layers: int, quantize: str | None = None) -> list[Operation]:
    """The launches of one step of ours without its optimizer, on a model of so many layers."""
    model = model_of_ours(layers)
    for name, parameter in list(model.named_parameters()) if quantize else []:
        if name.endswith("_proj.weight"):
            path = name.removesuffix(".weight")
            model.get_submodule(path).weight = nn.Parameter(four_bit(*parameter.shape), requires_grad=False)
    ids = token_ids(tokens)
    with counting(90) as traffic:
        model(ids, labels=ids).backward()
    return traffic.operations


def model_of_ours(layers: int) -> phi3.Phi3ForCausalLM:
    with torch.device("meta"):
        model = phi3.Phi3ForCausalLM(replace(CONFIG, num_hidden_layers=layers)).to(torch.bfloat16)
        lora.inject(model, lora.LoraConfig(r=R, lora_alpha=R, target_modules=TARGETS), torch.float32)
    lora.mark_only_lora_as_trainable(model)
    return model.train()


def ours_nf4(tokens: int, layers: int) -> list[Operation]:
    return ours(tokens, layers, "nf4")


def peft_sdpa(tokens: int, layers: int, attention: str = "sdpa") -> list[Operation]:
    """Those of transformers' model with PEFT's adapters."""
    import peft
    import transformers

    sizes = {name: getattr(CONFIG, name) for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
    config = transformers.Phi3Config(**sizes, num_hidden_layers=layers, sliding_window=None, attn_implementation=attention)
    settings = peft.LoraConfig(r=R, lora_alpha=R, target_modules=TARGETS, task_type="CAUSAL_LM")
    with torch.device("meta"):
        model = transformers.Phi3ForCausalLM(config).to(torch.bfloat16)
        model = peft.get_peft_model(model, settings, autocast_adapter_dtype=False).train()
    ids = token_ids(tokens)
    with counting(90) as traffic:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return traffic.operations


def peft_eager(tokens: int, layers: int) -> list[Operation]:
    return peft_sdpa(tokens, layers, "eager")


def unsloth(tokens: int, layers: int) -> list[Operation]:
    """Those of Unsloth's plan."""
    with counting(90) as traffic:
        unsloth_plan.Step(CONFIG, layers, tokens, R, traffic).run()
    return traffic.operations


def token_ids(tokens: int) -> torch.Tensor:
    return torch.empty(1, tokens, dtype=torch.int64, device="meta")


def optimizer() -> list[Operation]:
    """The launches of AdamW on the adapter."""
    parameters = [parameter for parameter in model_of_ours(CONFIG.num_hidden_layers).parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    adamw = torch.optim.AdamW(parameters, foreach=True)
    adamw.step()  # which makes its moments
    with counting(90) as traffic:
        adamw.step()
    return traffic.operations


WAYS: dict[str, Callable[[int, int], list[Operation]]] = {
    "ours": ours,
    "ours, NF4": ours_nf4,
    "transformers + PEFT, SDPA": peft_sdpa,
    "transformers + PEFT, eager attention": peft_eager,
    "Unsloth's plan": unsloth,
}
PEER, QUANTIZE = "transformers + PEFT, SDPA", {"ours": None, "ours, NF4": "nf4"}


def parts(way: str, tokens: int) -> dict[str, list[Operation]]:
    """The launches of one layer, which are what a second adds to a first, and of a whole step, where all but the first are so."""
    one, two = Counter(WAYS[way](tokens, 1)), Counter(WAYS[way](tokens, 2))
    layer, layers = list((two - one).elements()), CONFIG.num_hidden_layers
    return {"layer": layer, "step": [*one.elements(), *(layers - 1) * layer, *optimizer()]}


# Predicting


def predict(tokens: int) -> Iterator[dict]:
    """A row for each way, part and GPU."""
    counted = {way: parts(way, tokens) for way in WAYS}
    adapter, _ = count_parameters(model_of_ours(CONFIG.num_hidden_layers))
    for way, part in itertools.product(WAYS, ("layer", "step")):
        launches = counted[way][part]
        sums = {
            "launches": len(launches),
            "gigabytes": round(sum(launch.bytes for launch in launches) / 1e9, 2),
            "teraflops": round(sum(launch.flops for launch in launches) / 1e12, 2),
        }
        for name, gpu in GPUS.items():
            seconds, peer = gpu.step(launches), gpu.step(counted[PEER][part])
            row = {"gpu": name, "tokens": tokens, "part": part, "way": way} | sums
            row |= {"gpu_ms": round(gpu.kernels(launches) * 1e3, 3), "host_ms": round(gpu.host(launches) * 1e3, 3)}
            row |= {"ms": round(seconds * 1e3, 3), "over_peft": round(seconds / peer, 3)}
            if part == "step":
                row |= {"mfu": round(model_flops(CONFIG, adapter, tokens) / seconds / gpu.flops, 3)}
            if part == "step" and way in QUANTIZE:
                row |= {"level_with_peft_at": level(launches, peer, gpu), "planned_gb": round(planned(tokens, way) / 1e9, 2)}
            yield row


def level(launches: list[Operation], seconds: float, gpu: GPU) -> float | None:
    """The least share, in hundredths, of cuBLAS's rate at which Triton's products bring a step to these seconds."""
    at = bisect.bisect_left(range(1, 101), -seconds, key=lambda share: -replace(gpu, triton=share / 100).step(launches))
    return (at + 1) / 100 if at < 100 else None


def planned(tokens: int, way: str) -> int:
    """Bytes at the peak of a step of ours, as `minilora train --plan` tells them."""
    model = model_of_ours(CONFIG.num_hidden_layers)
    return planning.memory(model, planning.Batch(1, tokens, tokens), lora.TrainConfig(), "cuda", QUANTIZE[way]).peak


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
        "tokens": "tokens", "way": "way", "launches": "launches", "gigabytes": "GB moved", "gpu_ms": "GPU ms",
        "host_ms": "host ms", "ms": "predicted ms", "over_peft": "over PEFT's", "mfu": "MFU", "level_with_peft_at": "level with PEFT at",
        "planned_gb": "GB at the peak",
    }  # fmt: skip
    wanted = [name for name in columns if any(name in row for row in rows)]
    return protocol.markdown([columns[name] for name in wanted], [[row.get(name, "") for name in wanted] for row in rows])
