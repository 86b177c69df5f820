"""The levers on memory, each a row: what `minilora train --plan` foretells of a step beside what is then measured.

On the embedded model, on a CPU: `python -m benchmarks plan`. Each row is a fresh process, whose peak is counted from where a
step of a tiny model of the same kind has loaded all that a step needs of torch.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

import minilora as lora
from benchmarks import protocol
from minilora import phi3
from minilora.data.encoding import Example
from minilora.demo import weights as demo_weights
from minilora.kernels import cross_entropy
from minilora.kernels.cross_entropy import CHUNK
from minilora.training import planning
from minilora.training.recorder import TrainResult

TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
STEPS = 2
PLAIN = {
    "rows": 4,
    "length": 128,
    "accumulated": 1,
    "dtype": "float32",
    "quantize": None,
    "checkpointing": False,
    "dropout": 0.0,
    "chunk": CHUNK,
}
# What each changes of these settings.
LEVERS = {
    "none: 4 rows of 128 tokens, float32": {},
    "a quarter of the rows, 4 batches a step (gradient_accumulation_steps)": {"rows": 1, "accumulated": 4},
    "activation checkpointing (gradient_checkpointing)": {"checkpointing": True},
    "no holes in glibc's heap (MALLOC_MMAP_THRESHOLD_=65536)": {"environment": {"MALLOC_MMAP_THRESHOLD_": "65536"}},
    "checkpointing, no holes": {"checkpointing": True, "environment": {"MALLOC_MMAP_THRESHOLD_": "65536"}},
    "bfloat16 (bf16)": {"dtype": "bfloat16"},
    "a 4-bit base (load_in_4bit)": {"quantize": "nf4"},
    "4-bit base, bfloat16, checkpointing": {"quantize": "nf4", "dtype": "bfloat16", "checkpointing": True},
    "dropout of 0.05": {"dropout": 0.05},
    "full logits, which cross-entropy in chunks of 256 rows spares": {"chunk": 1024},
}


def main() -> None:
    """A few minutes on two CPU cores."""
    folder, rows = demo_weights.obtain(), []
    for lever, changes in LEVERS.items():
        rows.append({"lever": lever})
        for part in ("foretell", "run"):  # a process each: the first leaves memory behind that the second would use again
            code = f"from benchmarks import bench_plan; bench_plan.{part}({str(folder)!r}, {PLAIN | changes!r})"
            command, environment = [sys.executable, "-c", code], os.environ | changes.get("environment", {})
            output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows[-1] |= json.loads(output.splitlines()[-1])
        print(json.dumps(rows[-1]), flush=True)
    protocol.write("plan", rows)
    protocol.write_table("plan", table(rows))


def table(rows: list[dict]) -> str:
    """The rows in Markdown."""
    header = ["lever", "MB planned", "MB measured", "off by", "seconds a step, planned", "measured", "off by"]
    return protocol.markdown(header, [cells(row) for row in rows])


def cells(row: dict) -> list[str]:
    memory, time = (row["planned_bytes"], row["measured_bytes"]), (row["planned_seconds"], row["measured_seconds"])
    off = [f"{planned / measured - 1:+.0%}" for planned, measured in (memory, time)]
    return [row["lever"], *(f"{size / 1e6:,.0f}" for size in memory), off[0], *(f"{taken:.2f}" for taken in time), off[1]]


def foretell(folder: str, case: dict) -> None:
    """Plans a few steps in this process, and prints that as the last line."""
    cross_entropy.CHUNK = case["chunk"]
    peak, seconds = plan(folder, case, settings(case))
    print(json.dumps({"planned_bytes": peak, "planned_seconds": round(seconds / STEPS, 3)}))


def run(folder: str, case: dict) -> None:
    """Takes them in this process, and prints what they took as the last line."""
    cross_entropy.CHUNK = case["chunk"]
    config = settings(case)
    train(tiny(case), case | {"length": 32}, config)
    begun = protocol.memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew from here
    model = adapted(phi3.load(folder, getattr(torch, case["dtype"]), quantize=case["quantize"]), case)
    result = train(model, case, config)
    peak, taken = protocol.memory("VmHWM") - begun, [line["seconds"] for line in result.log if "seconds" in line]
    seconds = (taken[-1] - taken[0]) / (STEPS - 1)  # the first step warms up
    print(json.dumps({"measured_bytes": peak, "measured_seconds": round(seconds, 3)}))


def settings(case: dict) -> lora.TrainConfig:
    return lora.TrainConfig(
        max_steps=STEPS,
        per_device_train_batch_size=case["rows"],
        gradient_accumulation_steps=case["accumulated"],
        gradient_checkpointing=case["checkpointing"],
    )


def adapted(model: phi3.Phi3ForCausalLM, case: dict) -> phi3.Phi3ForCausalLM:
    lora.inject(model, lora.LoraConfig(r=16, lora_alpha=16, lora_dropout=case["dropout"], target_modules=TARGETS))
    lora.mark_only_lora_as_trainable(model)
    return model


def data(case: dict) -> list[Example]:
    drawn = torch.Generator().manual_seed(1)
    count = case["rows"] * case["accumulated"] * STEPS
    ids = torch.randint(3, 60, (count, case["length"]), generator=drawn).tolist()
    return [Example(row, [True] * len(row)) for row in ids]


def plan(folder: str, case: dict, config: lora.TrainConfig) -> tuple[int, float]:
    """Bytes and seconds of the run."""
    with torch.device("meta"):
        model = phi3.Phi3ForCausalLM(phi3.Phi3Config.read(Path(folder, "config.json"))).to(getattr(torch, case["dtype"]))
    adapted(model, case)
    batches = planning.batches_of(data(case), config)
    rates = planning.calibrate(model, batches[0], quantize=case["quantize"])
    found = planning.memory(model, batches[0], config, quantize=case["quantize"])
    return found.peak, planning.seconds(model, batches, config, rates)


def tiny(case: dict) -> phi3.Phi3ForCausalLM:
    config = phi3.Phi3Config(64, 32, 64, 1, 2, bos_token_id=None, eos_token_id=2, pad_token_id=2)
    return adapted(phi3.Phi3ForCausalLM(config).to(getattr(torch, case["dtype"])), case)


def train(model: phi3.Phi3ForCausalLM, case: dict, config: lora.TrainConfig) -> TrainResult:
    return lora.train(model, data(case), config, progress=False)
