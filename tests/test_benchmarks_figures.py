"""The pictures are those of the committed results, byte for byte, so that none goes stale."""

import subprocess
import sys

import pytest

from benchmarks import figures, protocol


def test_the_committed_pictures_are_those_of_the_committed_results():
    committed = {file.name: file.read_text(encoding="utf-8") for file in figures.FOLDER.iterdir()}
    assert committed == figures.figures(), "run `python -m benchmarks figures`"


def test_a_result_that_is_not_there_has_no_picture(monkeypatch, tmp_path):
    monkeypatch.setattr(protocol, "RESULTS", tmp_path)
    (tmp_path / "demo.json").write_text((figures.FOLDER.parent / "demo.json").read_text())
    assert list(figures.figures()) == ["demo_answers.svg"]


def test_the_command_writes_them(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(figures, "FOLDER", tmp_path / "figures")
    figures.main()
    assert {file.name: file.read_text() for file in (tmp_path / "figures").iterdir()} == figures.figures()
    assert capsys.readouterr().out.count("wrote ") == len(figures.figures())


def test_figures_is_among_the_commands():
    told = subprocess.run([sys.executable, "-m", "benchmarks"], cwd=protocol.ROOT, capture_output=True, text=True).stderr
    assert told.strip().endswith(", figures")


def test_layers_are_drawn_with_what_each_way_moves():
    bars = figures.layer_bytes(protocol.read("static"))
    (row,) = protocol.read("static")
    for line in row["roofline"]:
        dropout = f", dropout {line['dropout']}" if line["dropout"] else ""
        group = bars.groups[line["layer"]]
        assert group[f"minilora{dropout}"] == line["ours bytes / least"] < group[f"eager PEFT{dropout}"]
        assert group[f"eager PEFT{dropout}"] == line["eager_peft bytes / least"]
    assert sum(map(len, bars.groups.values())) == 2 * len(row["roofline"])


def test_the_memory_of_both_sides_is_drawn_with_what_each_computes_in():
    rows = [
        {"part": "checkpoint", "weight_bytes": 8e9},
        {"side": "minilora", "measure": "load", "compute": "bfloat16", "peak_memory_bytes": 3e9},
        {"side": "minilora", "measure": "train", "compute": "bfloat16", "tokens": 64, "peak_memory_bytes": 4e9},
        {"side": "peft", "measure": "load", "compute": "float32", "peak_memory_bytes": 9e9},
        {"side": "peft", "measure": "train", "compute": "float32", "tokens": 64, "peak_memory_bytes": 10e9},
    ]
    bars = figures.qlora_memory(rows)
    assert bars.groups == {
        "loading it in 4 bits": {"minilora, bfloat16": 3, "peft, float32": 9},
        "a LoRA step of 64 tokens beside it": {"minilora, bfloat16": 4, "peft, float32": 10},
    }
    assert bars.mark[0] == 8


def test_answers_are_drawn_in_percent():
    row = {"exact_before": 0.0, "exact_after": 0.5, "exact_before_new_phrasings": 0.25, "exact_after_new_phrasings": 1.0}
    groups = figures.demo_answers([row]).groups
    assert groups == {"unseen sentences": {"before": 0, "after": 50}, "new phrasings": {"before": 25, "after": 100}}


@pytest.fixture
def rows() -> list[dict]:
    """Of two cases, one of them to show growth, and of libraries that fail in one case and in all."""
    case = {"model": "small", "batch": 2, "tokens": 256, "r": 16, "dropout": 0.05, "threads": 2}
    ours = {"library": "minilora", "wall_over_floor": 1.25, "bytes_of_step": 5e8}
    grown = {"model": "4 layers", "dropout": 0.0}
    return [
        {"library": "torchtune", "failed": "pip: no such version"},
        case | ours,
        case | {"library": "litgpt", "failed": "it computes something else"},
        case | grown | ours,
    ]


def test_peers_are_drawn_in_each_case_and_who_failed_is_told(rows):
    case = "small, 2 × 256, r 16, dropout 0.05, 2 threads"
    assert figures.peers_time(rows).groups == {case: {"minilora": 1.25, "litgpt": None}}
    assert figures.peers_memory(rows).groups == {case: {"minilora": 0.5, "litgpt": None}}


def test_whole_steps_of_one_length_are_drawn_by_gpu():
    row = {"gpu": "A100", "part": "step", "way": "ours", "base": "nf4", "tokens": figures.TOKENS, "ms": 180.0}
    theirs = row | {"way": "transformers + PEFT", "base": "bfloat16", "ms": 240.0}
    others = [row | {"part": "layer"}, row | {"tokens": 512}]
    bars = figures.predicted_step([row, theirs, *others, row | {"gpu": "H100", "ms": 90.0}])
    assert bars.groups == {
        "A100": {"minilora, 4-bit base": 180, "transformers + PEFT": 240},
        "H100": {"minilora, 4-bit base": 90},
    }
    assert "predicted, not measured" in bars.title
