"""The comparison with other libraries, of those installed here: who computes the same, and what is told of who fails."""

import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import rms_error, tiny_config
from safetensors.torch import save_file

from benchmarks import bench_peers
from benchmarks.peers import environments, floor
from benchmarks.peers.case import Case
from benchmarks.peers.contender import Contender
from benchmarks.peers.process import Process
from benchmarks.peers.side import Adapter
from benchmarks.peers.tables import tables

CASES = [Case("tiny", 16, threads=1), Case("tiny", 16, dropout=0.05, threads=1)]
HERE = Path(sys.executable)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINILORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def rows(tmp_path_factory, cache) -> list[dict]:
    """Of two cases and the libraries installed here, and of litgpt, which is not."""
    pythons = dict.fromkeys((*bench_peers.QUICK, "litgpt_lora"), HERE)
    return bench_peers.measure(CASES, pythons, 2, tmp_path_factory.mktemp("rows"))


def test_all_libraries_compute_the_same_loss_and_gradients(rows):
    for row in rows[:3]:
        assert row["loss"] == pytest.approx(torch.tensor(260.0).log().item(), rel=0.02)  # of a random model with 260 tokens
        assert row["loss_error"] < 1e-6
        assert len(row["gradient_errors"]) == 8
        assert max(row["gradient_errors"].values()) == row["gradient_error"] < 1e-5


def test_every_library_is_measured_in_every_case(rows):
    for row, module in zip(rows, (*bench_peers.QUICK, None) * 2, strict=True):
        if module:
            assert row["wall_seconds"] > 0 < row["cpu_seconds"]
            assert len(row["wall_rounds"]) == 2
            assert row["wall_over_floor"] > 0 < row["wall_over_ours"]
            assert 0 < row["bytes_of_step"] < 1e9
            assert row["trained"] == 2 * 16 * ((32 + 64) + (32 + 32) + (32 + 96) + (48 + 32))
            assert row["distributions"] > 20
            assert row["bytes_installed"] > 5e8
            assert row["versions"].keys() == set(environments.LIBRARIES[module].distributions)
    assert [row["dropout"] for row in rows] == [0.0] * 4 + [0.05] * 4
    assert rows[2]["seconds_to_first_step"] > rows[2]["seconds_import"]["wall"] > 0.5
    assert rows[0]["wall_over_ours"] == rows[4]["wall_over_ours"] == 1


def test_a_library_that_fails_has_a_row_that_says_why(rows):
    for row in (rows[3], rows[7]):
        assert row["library"] == "litgpt"
        assert row["failed"] == "ModuleNotFoundError: No module named 'litgpt'"


def test_the_tables_have_all_of_it(rows):
    text = tables([{"library": "torchtune", "failed": "pip: no such version"}, *rows])
    assert text.count("| tiny, 2 × 16, r 16, 1 threads | loralib layers |") == 2  # the step, and the gradients
    assert text.count("| tiny, 2 × 16, r 16, dropout 0.05, 1 threads | loralib layers |") == 1
    assert "| transformers + peft | torch " in text
    assert "| torchtune | all | pip: no such version |" in text
    assert "| litgpt | tiny, 2 × 16, r 16, 1 threads | ModuleNotFoundError: No module named 'litgpt' |" in text
    grown = tables([row | {"model": f"{n} layers"} for n in (2, 4) for row in rows[:3]])
    assert "| case | minilora | loralib layers | transformers + peft |" in grown


@pytest.mark.parametrize(("off", "told"), [({}, None), ({"loss": 1.01}, "loss_error"), ({"down_proj.lora_B": 1.01}, "gradient")])
def test_a_library_that_computes_something_else_is_told_apart(tmp_path, off, told):
    names = [f"model.layers.{i}.mlp.down_proj.lora_{side}" for i in range(2) for side in "AB"]
    gradients = {name: torch.randn(4, 4) for name in names}

    contender, reference = (Contender("loralib_layers", HERE, tmp_path / name) for name in ("theirs", "ours"))
    for one in (contender, reference):
        one.folder.mkdir()
        one.begin(CASES[0])
        one.row["loss"] = 5.5
        save_file(gradients, one.gradients)
    contender.row["loss"] *= off.get("loss", 1)
    last = {name: gradient * off.get(name[-16:], 1) for name, gradient in gradients.items() if ".1." in name}
    save_file(gradients | last, contender.gradients)
    contender.process = SimpleNamespace(close=lambda: None)
    contender.attempt(contender.check, reference)
    assert ("failed" in contender.row) == (contender.process is None) == bool(told)
    if told:
        assert contender.row["failed"] == "it computes something else: see loss_error and gradient_errors"
    assert contender.row["loss_error"] == pytest.approx(0.01 if told == "loss_error" else 0)
    assert contender.row["gradient_errors"] == {
        "down_proj.lora_A": 0,
        "down_proj.lora_B": pytest.approx(0.01 if told == "gradient" else 0, rel=1e-3),
    }


def test_a_split_layout_has_the_gradients_of_the_fused_one():
    r, x, A, B = 4, torch.randn(5, 8), torch.randn(4, 8), torch.randn(12, 4)
    A.requires_grad_(), B.requires_grad_()
    weights = torch.randn(5, 12)
    ((x @ A.T @ B.T) * weights).sum().backward()
    empty = partial(torch.empty, requires_grad=True)
    apart = Adapter([empty(r, 8) for _ in range(3)], [empty(rows, r) for rows in (6, 4, 2)])
    stacked = Adapter([empty(3 * r, 8)], [empty(12, r)])
    for adapter in (apart, stacked):
        adapter.set(A, B)
        As, Bs = torch.cat(adapter.As).split(r), torch.cat(adapter.Bs).split([6, 4, 2])
        y = torch.cat([x @ A_g.T @ B_g.T for A_g, B_g in zip(As, Bs, strict=True)], dim=-1)
        (y * weights).sum().backward()
        of_A, of_B = adapter.gradients(r)
        assert rms_error(of_A, A.grad) < 1e-6
        assert rms_error(of_B, B.grad) < 1e-6


def test_the_floor_has_every_frozen_product_but_those_that_nobody_needs():
    config, B, T = asdict(tiny_config()), 2, 16
    matrices = {"qkv": 64 * 32, "o": 32 * 32, "gate_up": 96 * 32, "down": 32 * 48}
    counts = floor.products(config, B, T)
    multiplications = sum(M * K * N * count for (M, K, N), count in counts.items())
    projections = (2 * 2 * sum(matrices.values()) - matrices["qkv"]) * B * T
    assert multiplications == projections + 2 * B * (T - 1) * 260 * 32
    timed = floor.Floor(config, B, T)
    timed._time = lambda shape, repeats: (shape[0], shape[1])  # rows for wall, inner size for CPU
    assert timed.seconds() == (sum(s[0] * n for s, n in counts.items()), sum(s[1] * n for s, n in counts.items()))


def test_growth_changes_one_thing_at_a_time():
    plan = list(bench_peers.plan(bench_peers.parser().parse_args([])))
    cases = [(case.model, case.batch, case.tokens, case.dropout) for group in plan for case in group if len(group) == 1]
    assert cases[:4] == [(model, 2, 256, dropout) for model in ("small", "slice") for dropout in (0.0, 0.05)]
    assert cases[4:] == [(model, 1, 1024, 0.0) for model in ("small", "slice")]
    base, *changed = [asdict(case) for case in plan[4]]
    assert len(changed) == 4
    for case in changed:
        assert sum(case[name] != base[name] for name in base) == 1


def test_a_library_whose_process_is_killed_has_a_row_that_says_why(tmp_path):
    contender = Contender("loralib_layers", HERE, tmp_path)
    contender.begin(CASES[0])
    contender.process = Process("loralib_layers", HERE, 1, tmp_path / "log")
    contender.process.process.kill()
    contender.process.process.wait()
    contender.attempt(contender.turn)
    assert contender.row["failed"]
    assert contender.process is None


@pytest.fixture
def pip(monkeypatch, tmp_path):
    """Takes note of commands in place of running them; `returncode` is what pip ends with."""
    commands = SimpleNamespace(run=[], returncode=0)

    def run(command, **_):
        commands.run.append([str(word) for word in command])
        if "venv" in commands.run[-1]:
            Path(command[-1]).mkdir(parents=True)
        return SimpleNamespace(
            returncode=commands.returncode,
            stderr="WARNING: old\nERROR: no such version\nERROR: no matching distribution\nnotice\n",
        )

    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_an_environment_is_made_once_and_again_for_other_requirements(pip, monkeypatch):
    python = environments.environment("litgpt_lora")
    assert python.parts[-4:] == ("environments", "litgpt_lora", "bin", "python")
    assert "litgpt==0.5.13" in pip.run[-1]
    environments.environment("litgpt_lora")
    assert len(pip.run) == 2
    monkeypatch.setitem(environments.LIBRARIES, "litgpt_lora", environments.Library("litgpt", ["litgpt==0.5.12"]))
    environments.environment("litgpt_lora")
    assert pip.run[-1][-1] == "litgpt==0.5.12"
    assert len(pip.run) == 4


def test_an_environment_that_cannot_be_made_is_a_row(pip):
    pip.returncode = 1
    pythons, failed = bench_peers.environments()
    assert pythons == {}
    assert failed[3] == {"library": "litgpt", "failed": "pip: ERROR: no such version; ERROR: no matching distribution"}


def test_ours_is_installed_with_the_versions_of_the_constraints():
    constraints = (environments.ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [requirement for requirement in environments.LIBRARIES["ours"].requirements if "==" in requirement]
    assert not [requirement for requirement in pinned if requirement not in constraints]
    assert any(requirement.startswith("triton==") for requirement in pinned)
