"""What the README says is so: its Python runs, its commands parse, its settings and files are there."""

import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest

from minilora.cli import build_parser, main
from minilora.config import read_run_config

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
    assert len(re.findall(r"^pip install .* && pytest -n auto$", README, flags=re.MULTILINE)) == 1


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
    for folder in re.findall(r"`([\w/]+)/`", README):
        assert (ROOT / folder).is_dir()


def test_every_linked_file_is_there():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists()
