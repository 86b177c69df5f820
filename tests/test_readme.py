"""What the README says is so: its Python runs, its commands parse, its figures are those of the committed result."""

import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest
import torch

import minilora as lora
from benchmarks.bench_qlora import TARGETS
from benchmarks.bench_true_size import PHI_3_MINI
from minilora import phi3, planning
from minilora.cli import build_parser, main
from minilora.config import read_run_config
from minilora.kernels.cross_entropy import chunk_rows

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.toml"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_blocks_run_one_after_the_other(tmp_path, monkeypatch, tiny_checkpoint):
    shutil.copytree(tiny_checkpoint, tmp_path / "microsoft" / "Phi-3-mini-4k-instruct")  # a folder comes before the hub
    (tmp_path / "chat.jsonl").write_text(blocks("json")[0])
    monkeypatch.chdir(tmp_path)
    names = {}
    assert len(blocks("python")) == 3
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()


def commands() -> list[str]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [line[line.index("minilora ") :] for line in lines if re.match(r"(torchrun .* -m )?minilora ", line)]


@pytest.mark.parametrize("line", commands())
def test_the_commands_are_ones_that_the_command_line_takes(line):
    build_parser().parse_args(shlex.split(line)[1:])


def test_ci_runs_the_two_install_lines():
    assert len(re.findall(r"^pip install .* && minilora demo$", README, flags=re.MULTILINE)) == 1
    assert len(re.findall(r"^pip install .* && pytest$", README, flags=re.MULTILINE)) == 1


def test_the_figures_of_the_demo_are_those_of_the_committed_result():
    (row,) = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())["rows"]
    text = " ".join(README.split())
    assert f"That run took {row['seconds_process']:.0f} seconds on two CPU cores" in text
    assert f"and {row['peak_memory_bytes'] / 1e9:.1f} GB of memory" in text
    assert f"On unseen sentences {row['exact_before']:.0%} of the answers were exact before" in text
    assert (
        f"and {row['exact_after']:.0%} after; on phrasings that it was never trained on, {row['exact_after_new_phrasings']:.0%}."
        in text
    )


def test_the_figures_of_the_true_size_are_those_of_the_committed_result():
    rows = json.loads((ROOT / "benchmarks" / "results" / "true_size.json").read_text())["rows"]
    write, load, _, train = rows
    text = " ".join(README.split())
    assert (
        f"{write['parameters']:,} parameters in bfloat16, loads with a peak of {load['peak_memory_bytes'] / 1e9:.1f} GB" in text
    )
    assert f"a LoRA step of {train['tokens']} tokens on a CPU takes {train['peak_memory_bytes'] / 1e9:.1f} GB" in text
    assert load["peak_over_weights"] < 1.1


def test_the_figures_of_the_4_bit_base_are_those_of_the_committed_result():
    write, *memory = json.loads((ROOT / "benchmarks" / "results" / "qlora_true_size.json").read_text())["rows"]
    load, step, their_load, their_step = (f"{row['peak_memory_bytes'] / 1e9:.1f} GB" for row in memory)
    assert [row["measure"] for row in memory] == ["load", "train"] * 2
    text = " ".join(README.split())
    assert f"checkpoint of {write['weight_bytes'] / 1e9:.1f} GB loads so with a peak of {load}, and a LoRA step" in text
    assert f"of {memory[1]['tokens']} tokens on a CPU takes {step}; with" in text
    assert f"it is {their_load} and {their_step}" in text
    assert memory[0]["peak_memory_bytes"] < 3.2e9


def test_what_each_lever_saves_is_as_planned():
    with torch.device("meta"):
        model = phi3.Phi3ForCausalLM(PHI_3_MINI).to(torch.bfloat16)
        lora.inject(model, lora.LoraConfig(r=16, target_modules=TARGETS), torch.float32)
    lora.mark_only_lora_as_trainable(model)
    N = 2048
    plain, checkpointed = (
        planning.memory(model, planning.Batch(1, N, N), lora.TrainConfig(gradient_checkpointing=wanted), "cuda", "nf4")
        for wanted in (False, True)
    )
    weights = planning.memory(model, planning.Batch(1, N, N), lora.TrainConfig(), "cuda").weights
    V = PHI_3_MINI.vocab_size  # logits of a row: in float32 beside their gradient, or in bfloat16 and then overwritten with it
    rows = {
        "4-bit base | weights": (weights, plain.weights),
        "activation checkpointing | activations": (plain.activations, checkpointed.activations),
        "head and loss in chunks, always | logits and their gradient": (N * V * 2 * 4, chunk_rows("cuda") * V * 2),
        "8-bit AdamW, not offered | moments of the adapter": (plain.moments, plain.moments / 4),
    }
    for start, (before, after) in rows.items():
        assert f"| {start} | {before / 1e9:.2f} GB | {after / 1e9:.2f} GB |" in README


def test_every_cell_of_the_table_of_the_family_is_green():
    lines = (ROOT / "benchmarks" / "results" / "family.md").read_text().splitlines()
    cells = [cell.strip() for line in lines if line.startswith("| phi-") for cell in line.strip("|").split("|")[1:]]
    assert len(cells) == 8 * 6
    assert all(cell.startswith("✓") for cell in cells)


def test_the_table_of_bytes_is_that_of_the_committed_result():
    (row,) = json.loads((ROOT / "benchmarks" / "results" / "static.json").read_text())["rows"]
    found = {(line["layer"], line["dropout"]): line for line in row["roofline"]}
    for layer in ("qkv", "o", "gate_up", "down"):
        figures = [found[layer, p][f"{way} bytes / least"] for p in (0.0, 0.05) for way in ("ours", "eager_peft")]
        assert f"| {layer} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |" in README
    assert (row["tokens"], row["r"]) == (4096, 16)
    assert "4,096 tokens, r 16, bfloat16" in " ".join(README.split())


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_the_example_settings_run(file, tiny_checkpoint, tmp_path):
    """Two steps on a tiny model, all settings but their number as they stand."""
    assert read_run_config(file).peft.r == 16
    (tmp_path / "chat.jsonl").write_text(blocks("json")[0] * 60)
    data = ["--data", str(tmp_path / "chat.jsonl"), "--output", str(tmp_path / "out")]
    argv = ["train", "--model", str(tiny_checkpoint), *data, "--config", str(file), "--set", "training.max_steps=2"]
    assert main(argv) == 0
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 2
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()


def test_every_key_of_the_cookbooks_scripts_is_in_the_table_of_settings():
    table = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    keys = [key for file in EXAMPLES for values in tomllib.loads(file.read_text()).values() for key in values]
    elsewhere = ["evaluation_strategy", "fp16", "report_to", "dataset_text_field", "modules_to_save"]  # no TOML has these
    assert not [key for key in keys + elsewhere if f"`{key}`" not in table]
    for file in EXAMPLES:
        assert f"({file.name})" in table


def test_every_folder_of_the_table_is_there():
    for folder in re.findall(r"`(\w+)/`", README):
        assert (ROOT / folder).is_dir()


def test_every_linked_file_is_there():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists()
