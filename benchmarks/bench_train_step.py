"""A LoRA and a QLoRA training step of Phi-3-mini on a GPU, ours beside other libraries': time, MFU and peak memory.

Every measurement is a process of its own, which makes a model of true size with random weights on the device, takes steps, and
times each by CUDA events; what fails there, by want of memory say, is told in its row. Rounds take each way in turn. A step is
forward, backward and AdamW on one sequence, every token of which has a loss. MFU is

    N · (4·P + 6·A + 6·L·T·H·D) + 4·N·V·C        FLOPs, over seconds and the tensor cores' peak for 16 bits

for N tokens in sequences of T, P weights of frozen projections (forward, and to their inputs), A of adapters (forward, and both
gradients), causal attention (half of Q Kᵀ and P V, and twice that backward) and the frozen head; nothing computed again counts.
"""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

import minilora as lora
from benchmarks import protocol
from benchmarks.bench_static import PEAKS
from benchmarks.bench_true_size import PHI_3_MINI, TARGETS
from benchmarks.peers.environments import last_line
from benchmarks.timing import Clock, require_cuda
from minilora import phi3
from minilora.kernels import backend
from minilora.kernels.nf4_tensor import NF4Tensor

CONFIG = dataclasses.replace(PHI_3_MINI, sliding_window=None, max_position_embeddings=8192)  # plain causal at every length
BASES, SEQUENCES, R = ("bfloat16", "nf4"), (512, 2048, 8192), 16
WARMUP, STEPS, ROUNDS = 3, 10, 3
Loss = Callable[[Tensor], Tensor]  # of token ids (1, T)


@dataclass(frozen=True)
class Case:
    """What a process measures."""

    way: str
    base: str  # of BASES
    tokens: int


def main() -> None:
    """Writes results/train_step.json and .md, a row for each way, base and number of tokens, beside what was predicted."""
    require_cuda("train_step")
    cases = [Case(way, base, tokens) for tokens in SEQUENCES for base in BASES for way in WAYS if is_installed(way)]
    absent = [{"way": way, "failed": f"{WAYS[way].package} is not installed"} for way in WAYS if not is_installed(way)]
    found = {case: [] for case in cases}
    for _ in range(ROUNDS):
        for case in cases:
            found[case].append(in_process(case))
            print(json.dumps(dataclasses.asdict(case) | found[case][-1]), flush=True)
    rows = [*absent, *(summary(case, rounds) for case, rounds in found.items())]
    protocol.write("train_step", rows)
    protocol.write_table("train_step", table(rows, json.loads((protocol.RESULTS / "predicted.json").read_text())["rows"]))


def is_installed(way: str) -> bool:
    return importlib.util.find_spec(WAYS[way].package) is not None


def in_process(case: Case) -> dict:
    """What a fresh process finds, or why it failed."""
    code = f"from benchmarks import bench_train_step; bench_train_step.run(**{dataclasses.asdict(case)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=protocol.ROOT, capture_output=True, text=True)
    if done.returncode:
        return {"failed": f"exit {done.returncode}: {last_line(done.stderr)}"}
    return json.loads(done.stdout.splitlines()[-1])


def summary(case: Case, rounds: list[dict]) -> dict:
    """A row: medians over all steps of all rounds, or why a round failed."""
    row = dataclasses.asdict(case)
    failed = [found["failed"] for found in rounds if "failed" in found]
    if failed:
        return row | {"failed": failed[0]}
    seconds = median(milliseconds for found in rounds for milliseconds in found["step_ms"]) / 1e3
    last = rounds[-1]
    row |= {"seconds": seconds, "tokens_per_s": case.tokens / seconds, "mfu": None, "peak_bytes": last["peak_bytes"]}
    peak = next((flops for name, (flops, _) in PEAKS.items() if name in last["device"]), None)
    if peak:
        row["mfu"] = last["flops"] / seconds / peak
    of_all = {name: last[name] for name in ("loss", "trained", "device", "backend")}
    return row | of_all | {"step_ms": [found["step_ms"] for found in rounds]}


def table(rows: list[dict], predictions: list[dict]) -> str:
    """The rows in Markdown, with the predicted time of the same step on the same kind of GPU, where there is one."""
    steps = [row for row in predictions if row["part"] == "step"]
    predicted = {(row["gpu"], row["way"], row["base"], row["tokens"]): row["ms"] for row in steps}
    lines = []
    for row in rows:
        if "failed" in row:
            lines.append([row.get("tokens", ""), row["way"], row.get("base", ""), row["failed"], *[""] * 5])
            continue
        gpu = next((name for name in PEAKS if name in row["device"]), None)
        ms, expected = row["seconds"] * 1e3, predicted.get((gpu, row["way"], row["base"], row["tokens"]))
        cells = f"{ms:.1f}", f"{row['tokens_per_s']:,.0f}", f"{row['mfu']:.2f}" if gpu else "", f"{row['peak_bytes'] / 1e9:.1f}"
        compared = (f"{expected:.1f}", f"{ms / expected:.2f}") if expected else ("", "")
        lines.append([row["tokens"], row["way"], row["base"], *cells, *compared])
    header = ["tokens", "way", "base", "ms", "tokens/s", "MFU", "GB at the peak", "predicted ms", "measured / predicted"]
    return protocol.markdown(header, lines)


def run(way: str, base: str, tokens: int) -> None:
    """Takes one measurement in this process and prints it as the last line."""
    print(json.dumps(measure(Case(way, base, tokens), CONFIG, "cuda")))


def measure(case: Case, config: phi3.Phi3Config, device: str, warmup: int = WARMUP, steps: int = STEPS) -> dict:
    """The times of some steps, and the most memory that they took at once."""
    torch.manual_seed(0)
    model, loss = WAYS[case.way].build(config, case.base, case.tokens, device)
    ids = torch.randint(3, config.vocab_size // 2, (1, case.tokens), device=device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, clock, marks = torch.optim.AdamW(trained, lr=1e-4), Clock(device), []
    for step in range(warmup + steps):
        if step == warmup and clock.cuda:
            torch.cuda.reset_peak_memory_stats()
        start = clock.mark()
        value = loss(ids)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        marks.append((start, clock.mark()))
    found = [clock.milliseconds(*pair) for pair in marks[warmup:]]
    return {
        "step_ms": found,
        "loss": value.item(),
        "trained": sum(parameter.numel() for parameter in trained),
        "flops": model_flops(config, sum(parameter.numel() for parameter in trained), case.tokens),
        "peak_bytes": torch.cuda.max_memory_allocated() if clock.cuda else None,
        "device": torch.cuda.get_device_name() if clock.cuda else "cpu",
        "backend": backend.describe(torch.device(device), torch.bfloat16),  # of ours
    }


def model_flops(config: phi3.Phi3Config, adapter: int, tokens: int) -> float:
    """Those of one step on one sequence, by the equation above, for an adapter of so many parameters."""
    C, L, D = config.hidden_size, config.num_hidden_layers, config.head_dim
    weights = L * (
        C * (sum(config.qkv_sizes.values()) + sum(config.gate_up_sizes.values()) + config.intermediate_size)
        + C * config.num_attention_heads * D
    )
    attention = L * tokens * config.num_attention_heads * D
    return tokens * (4.0 * weights + 6.0 * adapter + 6.0 * attention + 4.0 * config.vocab_size * C)


# The ways: each builds its model, with adapters, on the device, and tells how a batch's loss is found


def ours(config: phi3.Phi3Config, base: str, tokens: int, device: str) -> tuple[nn.Module, Loss]:
    with torch.device("meta"):
        model = phi3.Phi3ForCausalLM(config).to(torch.bfloat16)
    model = with_random_weights(model, device, NF4Tensor.quantize if base == "nf4" else None)
    lora.inject(model, lora.LoraConfig(r=R, lora_alpha=R, target_modules=TARGETS), torch.float32)
    lora.mark_only_lora_as_trainable(model)
    model.train()
    return model, lambda ids: model(ids, labels=ids)


def ours_compiled(config: phi3.Phi3Config, base: str, tokens: int, device: str) -> tuple[nn.Module, Loss]:
    model, _ = ours(config, base, tokens, device)
    compiled = torch.compile(model)
    return model, lambda ids: compiled(ids, labels=ids)


def peft_sdpa(config: phi3.Phi3Config, base: str, tokens: int, device: str, attention: str = "sdpa") -> tuple[nn.Module, Loss]:
    """transformers' model, PEFT's adapters in bfloat16, and bitsandbytes' 4-bit layers."""
    import peft
    import transformers

    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    sizes = {name: getattr(config, name) for name in names}
    settings = transformers.Phi3Config(**sizes, sliding_window=None, attn_implementation=attention)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    if base == "nf4":
        quantize_by_bitsandbytes(model, device)
    adapters = peft.LoraConfig(r=R, lora_alpha=R, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, adapters, autocast_adapter_dtype=False).to(device).train()
    return model, lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss


def peft_eager(config: phi3.Phi3Config, base: str, tokens: int, device: str) -> tuple[nn.Module, Loss]:
    return peft_sdpa(config, base, tokens, device, "eager")


def peft_compiled(config: phi3.Phi3Config, base: str, tokens: int, device: str) -> tuple[nn.Module, Loss]:
    model, _ = peft_sdpa(config, base, tokens, device)
    compiled = torch.compile(model)
    return model, lambda ids: compiled(input_ids=ids, labels=ids, use_cache=False).loss


def liger(config: phi3.Phi3Config, base: str, tokens: int, device: str) -> tuple[nn.Module, Loss]:
    """transformers and PEFT with Liger's kernels."""
    from liger_kernel.transformers import apply_liger_kernel_to_phi3

    apply_liger_kernel_to_phi3()
    return peft_sdpa(config, base, tokens, device)


def unsloth(config: phi3.Phi3Config, base: str, tokens: int, device: str) -> tuple[nn.Module, Loss]:
    """Unsloth reads a checkpoint: one of random weights is written for it."""
    from unsloth import FastLanguageModel

    from benchmarks.bench_true_size import SHARD_BYTES, write_checkpoint
    from tests.helpers import write_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(config, Path(folder), SHARD_BYTES)
        write_tokenizer(Path(folder))
        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=tokens, dtype=torch.bfloat16, load_in_4bit=base == "nf4"
        )
    parts = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # of its own layout
    settings = {"lora_dropout": 0, "bias": "none", "use_gradient_checkpointing": False}
    model = FastLanguageModel.get_peft_model(model, r=R, lora_alpha=R, target_modules=parts, **settings)
    return model, lambda ids: model(input_ids=ids, labels=ids).loss


def with_random_weights(model: nn.Module, device: str, quantize: Callable[[Tensor], Tensor] | None) -> nn.Module:
    """Gives a model on no device weights on one, a tensor at a time: those of projections by quantize, where it is given."""
    for name, parameter in list(model.named_parameters()):
        weight = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        weight = weight.fill_(1) if name.endswith("norm.weight") else weight.normal_(0, 0.02)
        path, _, leaf = name.rpartition(".")
        if quantize and name.endswith("_proj.weight"):
            weight = quantize(weight)
        setattr(model.get_submodule(path), leaf, nn.Parameter(weight, requires_grad=False))
    return model


def quantize_by_bitsandbytes(model: nn.Module, device: str) -> None:
    """Puts bitsandbytes' 4-bit layers in the place of the projections, as transformers does when it loads a checkpoint."""
    import bitsandbytes

    for name, layer in list(model.named_modules()):
        if name.endswith("_proj"):
            quantized = bitsandbytes.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
            )
            weight = bitsandbytes.nn.Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4")
            quantized.weight = weight.to(device)
            model.set_submodule(name, quantized)
    model.is_loaded_in_4bit = True  # PEFT asks for it


@dataclass(frozen=True)
class Way:
    """How a step is taken, and the package that must be there for it."""

    build: Callable[[phi3.Phi3Config, str, int, str], tuple[nn.Module, Loss]]
    package: str


WAYS = {
    "ours": Way(ours, "minilora"),
    "ours, torch.compile": Way(ours_compiled, "minilora"),
    "transformers + PEFT, SDPA": Way(peft_sdpa, "peft"),
    "transformers + PEFT, eager attention": Way(peft_eager, "peft"),
    "transformers + PEFT, torch.compile": Way(peft_compiled, "peft"),
    "Liger": Way(liger, "liger_kernel"),
    "Unsloth": Way(unsloth, "unsloth"),
}
