"""The GPU benchmark of whole steps, run on a CPU with a tiny model: what it builds, times, tells and survives."""

import math
from dataclasses import asdict

import pytest
import torch
from helpers import tiny_config

from benchmarks import bench_train_step, protocol
from benchmarks.bench_train_step import BASES, PEAKS, WAYS, Case, measure, summary
from minilora.kernels.nf4_tensor import NF4Tensor

CONFIG = tiny_config(hidden_size=64, intermediate_size=128)
HERE = [way for way in WAYS if bench_train_step.is_installed(way)]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("way", HERE)
def test_every_way_takes_timed_steps_of_the_same_model(way, base, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: model)
    found = measure(Case(way, base, 12), CONFIG, "cpu", warmup=1, steps=2)
    assert len(found["step_ms"]) == 2
    assert min(found["step_ms"]) > 0
    assert found["loss"] == pytest.approx(math.log(CONFIG.vocab_size), rel=0.1)
    C, r = CONFIG.hidden_size, bench_train_step.R
    widths = C + sum(CONFIG.qkv_sizes.values()), 2 * C, C + 2 * CONFIG.intermediate_size, C + CONFIG.intermediate_size
    assert found["trained"] == CONFIG.num_hidden_layers * r * sum(widths)
    assert found["flops"] == bench_train_step.model_flops(CONFIG, found["trained"], 12)


@pytest.mark.parametrize("way", ["ours", "transformers + PEFT, SDPA"])
def test_a_4_bit_base_is_4_bit_in_the_projections_alone(way):
    model, _ = WAYS[way].build(CONFIG, "nf4", 12, "cpu")
    four_bit = {name for name, weight in model.named_parameters() if isinstance(weight, NF4Tensor) or weight.dtype == torch.uint8}
    assert len(four_bit) == 4 * CONFIG.num_hidden_layers
    assert all("_proj." in name for name in four_bit)
    assert all("lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


def test_what_fails_in_its_process_is_a_row_that_says_why():
    found = bench_train_step.in_process(Case("no such way", "bfloat16", 12))
    assert found == {"failed": "exit 1: KeyError: 'no such way'"}
    row = summary(Case("ours", "nf4", 12), [ROUND, {"failed": "exit 1: torch.OutOfMemoryError: CUDA out of memory"}])
    assert row == {"way": "ours", "base": "nf4", "tokens": 12, "failed": "exit 1: torch.OutOfMemoryError: CUDA out of memory"}


ROUND = {
    "step_ms": [4.0, 2.0, 3.0], "loss": 5.0, "trained": 10, "flops": 1e12, "peak_bytes": 7, "device": "NVIDIA A100-SXM4-80GB",
    "backend": "Triton (cuda tensors)",
}  # fmt: skip


def test_a_row_is_the_median_over_the_steps_of_all_rounds():
    row = summary(Case("ours", "bfloat16", 12), [ROUND, ROUND | {"step_ms": [9.0, 9.0, 1.0]}])
    assert row["seconds"] == pytest.approx(3.5e-3)
    assert row["tokens_per_s"] == pytest.approx(12 / 3.5e-3)
    assert row["mfu"] == pytest.approx(1e12 / 3.5e-3 / PEAKS["A100"][0])
    assert summary(Case("ours", "bfloat16", 12), [ROUND | {"device": "a GPU of tomorrow"}])["mfu"] is None


def test_rounds_take_every_case_in_turn_and_absent_packages_are_told(monkeypatch):
    taken, written = [], {}
    monkeypatch.setattr(bench_train_step, "require_cuda", lambda name: None)
    monkeypatch.setattr(bench_train_step, "is_installed", lambda way: way in ("ours", "Liger"))
    monkeypatch.setattr(bench_train_step, "in_process", lambda case: taken.append(case) or ROUND)
    monkeypatch.setattr(protocol, "write", lambda name, rows: written.update({name: rows}))
    monkeypatch.setattr(protocol, "write_table", lambda name, table: written.update({f"{name}.md": table}))
    bench_train_step.main()
    cases = len(taken) // bench_train_step.ROUNDS
    assert taken[:cases] == taken[cases : 2 * cases]
    assert len(set(taken)) == cases == 2 * 2 * 3
    rows = written["train_step"]
    assert {"way": "Unsloth", "failed": "unsloth is not installed"} in rows
    assert next(row for row in rows if "seconds" in row).items() >= asdict(taken[0]).items()
    assert written["train_step.md"].count("\n") == 2 + len(rows)


def test_the_table_sets_a_measurement_beside_its_prediction():
    rows = [
        summary(Case("ours", "nf4", 512), [ROUND]),
        summary(Case("Liger", "nf4", 512), [ROUND | {"device": "a GPU of tomorrow"}]),
        summary(Case("Unsloth", "nf4", 512), [{"failed": "exit 1: no memory"}]),
    ]
    step = {"gpu": "A100", "way": "ours", "base": "nf4", "tokens": 512, "part": "step", "ms": 2.0}
    lines = bench_train_step.table(
        rows, [step, step | {"part": "layer", "ms": 0.1}, step | {"gpu": "H100", "ms": 1.0}]
    ).splitlines()
    assert lines[2:] == [
        "| 512 | ours | nf4 | 3.0 | 170,667 | 1.07 | 0.0 | 2.0 | 1.50 |",
        "| 512 | Liger | nf4 | 3.0 | 170,667 |  | 0.0 |  |  |",
        "| 512 | Unsloth | nf4 | exit 1: no memory |  |  |  |  |  |",
    ]
