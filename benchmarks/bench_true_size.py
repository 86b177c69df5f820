"""Phi-3-mini at its true size, with random weights: loading, generating, and one LoRA training step, each in a fresh process.

Needs 8 GB of disk and 10 GB of memory, and takes minutes on two CPU cores.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import minilora as lora
from benchmarks import protocol
from minilora import phi3
from minilora.adapters.trainable import count_parameters
from minilora.data.encoding import Example
from minilora.phi3.generation import generate_ids
from minilora.phi3.weights import plan_shards, write_index

PHI_3_MINI = phi3.Phi3Config(original_max_position_embeddings=4096, sliding_window=2047)  # 3,821,079,552 parameters
SHARD_BYTES = 5_000_000_000
PROMPT, NEW = 64, 8  # tokens
TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def main(config: phi3.Phi3Config = PHI_3_MINI, shard_bytes: int = SHARD_BYTES, name: str = "true_size") -> None:
    """Writes the checkpoint and takes every measurement; a narrower config or smaller shards, under another name, to try it."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        rows.append({"measure": "write"} | write_checkpoint(config, Path(folder), shard_bytes))
        rows[-1]["seconds"] = round(time.perf_counter() - started, 1)
        for measure in (load, generate, train):
            code = f"from benchmarks import bench_true_size; bench_true_size.run({measure.__name__!r}, {folder!r})"
            output = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout
            rows.append({"measure": measure.__name__} | json.loads(output.splitlines()[-1]))
            print(json.dumps(rows[-1]), flush=True)
    weights = rows[0]["weight_bytes"]
    for row in rows[1:]:
        row["peak_over_weights"] = round(row["peak_memory_bytes"] / weights, 3)
    protocol.write(name, rows)


def write_checkpoint(config: phi3.Phi3Config, folder: Path, shard_bytes: int) -> dict:
    """Random bfloat16 weights in the published layout, written tensor by tensor, so that memory holds one at a time."""
    with torch.device("meta"):
        shapes = {name: list(parameter.shape) for name, parameter in phi3.Phi3ForCausalLM(config).named_parameters()}
    sizes = {name: 2 * torch.Size(shape).numel() for name, shape in shapes.items()}
    shards = plan_shards(sizes, shard_bytes)
    generator = torch.Generator().manual_seed(0)
    for file, names in shards.items():
        with open(folder / file, "wb") as opened:
            opened.write(_safetensors_header(names, shapes, sizes))
            for name in names:
                weight = torch.ones(shapes[name], dtype=torch.bfloat16)
                if not name.endswith("norm.weight"):
                    weight.normal_(0, 0.02, generator=generator)  # initializer_range of the published configs
                weight.view(torch.uint8).numpy().tofile(opened)
    write_index(shards, sum(sizes.values()), folder)
    config.write(folder / "config.json", "bfloat16")
    return {
        "parameters": sum(sizes.values()) // 2,
        "weight_bytes": sum(sizes.values()),
        "shards": {file: (folder / file).stat().st_size for file in shards},
    }


def _safetensors_header(names: list[str], shapes: dict, sizes: dict) -> bytes:
    """The length of a JSON object in eight bytes, and the object: dtype, shape and place of every tensor that follows."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [end, end + sizes[name]]}
        end += sizes[name]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of eight
    return len(text).to_bytes(8, "little") + text


def run(measure: str, folder: str) -> None:
    """Takes one measurement in this process and prints it as the last line, with the peak of memory and the time to load."""
    started = time.perf_counter()
    model = phi3.load(folder)
    seconds_load = round(time.perf_counter() - started, 2)
    found = {"load": load, "generate": generate, "train": train}[measure](model)
    print(json.dumps({"seconds_load": seconds_load} | found | {"peak_memory_bytes": protocol.memory("VmHWM")}))


def load(model: phi3.Phi3ForCausalLM) -> dict:
    """Nothing more than loading."""
    return {"dtype": str(model.lm_head.weight.dtype).removeprefix("torch.")}


def generate(model: phi3.Phi3ForCausalLM) -> dict:
    """The time to the first new token, which reads the prompt, and to each further one."""
    times = [time.perf_counter()]
    for _ in generate_ids(model, [_random_ids(model.config)], frozenset(), phi3.Sampling(max_new_tokens=NEW)):
        times.append(time.perf_counter())
    further = (times[-1] - times[1]) / (NEW - 1)
    return {"prompt_tokens": PROMPT, "seconds_first_token": round(times[1] - times[0], 2), "seconds_a_token": round(further, 3)}


def train(model: phi3.Phi3ForCausalLM) -> dict:
    """One step of AdamW on an adapter of rank 16 in float32 on all four projections."""
    lora.inject(model, lora.LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS))
    lora.mark_only_lora_as_trainable(model)
    example = Example(_random_ids(model.config), [True] * PROMPT)
    result = lora.train(model, [example], lora.TrainConfig(max_steps=1, per_device_train_batch_size=1))
    return {"trainable_parameters": count_parameters(model)[0], "tokens": result.tokens, "seconds_step": round(result.seconds, 2)}


def _random_ids(config: phi3.Phi3Config) -> list[int]:
    return torch.randint(3, config.vocab_size // 2, (PROMPT,), generator=torch.Generator().manual_seed(1)).tolist()
