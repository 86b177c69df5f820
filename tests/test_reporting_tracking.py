"""What TensorBoard's event files and an offline run of Weights & Biases hold is what log.jsonl holds."""

import contextlib
import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import examples, tiny_config, tiny_model

import minilora as lora
from minilora.reporting import tracking
from minilora.reporting.tracking import figures_of


def train(folder, resume=False, **settings):
    torch.manual_seed(0)
    model = lora.inject(tiny_model(tiny_config()), lora.LoraConfig(r=2))
    lora.mark_only_lora_as_trainable(model)
    config = lora.TrainConfig(**{"per_device_train_batch_size": 2, "max_steps": 3, "eval_steps": 2} | settings)
    return lora.train(model, examples(6), config, examples(3), folder, progress=False, resume=resume)


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars of all event files under a folder, as TensorBoard shows them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def expected(log: list[dict]) -> dict[str, list[tuple[int, float]]]:
    found = {}
    for line in log:
        for name, value in figures_of(line).items():
            found.setdefault(name, []).append((line["step"], pytest.approx(value, rel=1e-6)))
    return found


def test_figures_are_named_as_by_transformers_and_finite():
    line = {"step": 3, "eval_loss": 1.5, "eval_rougeL": 0.5, "samples": [], "eval_perplexity": math.inf, "memory": None}
    assert figures_of(line) == {"eval/loss": 1.5, "eval/rougeL": 0.5}
    assert figures_of({"step": 3, "loss": 2, "grad_norm": 0.1}) == {"train/loss": 2, "train/grad_norm": 0.1}
    assert figures_of({"step": 3, "spike": "loss", "value": 9.0, "usual": 1.0}) == {}


def test_tensorboard_shows_what_the_log_holds(tmp_path):
    pytest.importorskip("tensorboard")
    result = train(tmp_path, report_to=["tensorboard"])
    found = read_events(tmp_path / "tensorboard")
    assert found == expected(result.log)
    assert {"train/loss", "train/learning_rate", "train/grad_norm", "train/memory", "train/tokens_per_second"} <= found.keys()
    assert [step for step, _ in found["eval/loss"]] == [2, 3]


def test_tensorboard_shows_the_steps_of_a_resumed_run_once(tmp_path):
    pytest.importorskip("tensorboard")
    train(tmp_path, report_to="tensorboard", save_steps=2)
    result = train(tmp_path, report_to="tensorboard", save_steps=2, resume=tmp_path / "checkpoint-2")
    assert read_events(tmp_path / "tensorboard") == expected(result.log)


def test_a_run_that_fails_has_written_what_it_told(tmp_path):
    pytest.importorskip("tensorboard")
    with pytest.raises(FloatingPointError):
        train(tmp_path, report_to="tensorboard", learning_rate=1e30)
    assert [step for step, _ in read_events(tmp_path / "tensorboard")["train/loss"]] == [1]


@pytest.mark.parametrize("learning_rate", [1e-3, 1e30])
def test_a_tracker_is_closed_however_the_run_ends(tmp_path, monkeypatch, learning_rate):
    closed = []

    class Counting(tracking.TensorBoard):
        def close(self):
            super().close()
            closed.append(self)

    monkeypatch.setitem(tracking.TRACKERS, "tensorboard", Counting)
    with contextlib.suppress(FloatingPointError):
        train(tmp_path, report_to="tensorboard", learning_rate=learning_rate)
    assert len(closed) == 1


def test_watching_changes_no_bit_and_may_be_chosen_anew_for_the_rest_of_a_run(tmp_path):
    pytest.importorskip("tensorboard")
    plain, watched = (train(tmp_path / name, save_steps=2, report_to=name) for name in ("none", "tensorboard"))
    assert [line.get("loss") for line in plain.log] == [line.get("loss") for line in watched.log]
    resumed = train(tmp_path / "none", save_steps=2, report_to="tensorboard", resume=tmp_path / "none" / "checkpoint-2")
    assert resumed.log[-1]["eval_loss"] == plain.log[-1]["eval_loss"]


def test_watching_needs_a_folder():
    with pytest.raises(ValueError, match="report_to needs an output_dir"):
        train(None, report_to="tensorboard")


def test_an_offline_run_of_wandb_holds_what_the_log_holds(tmp_path):
    """In a process of its own, since wandb starts threads and a server."""
    pytest.importorskip("wandb")
    code = f"import test_reporting_tracking as t, pathlib; t.train(pathlib.Path({str(tmp_path / 'run')!r}), report_to=['wandb'])"
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {line["step"] for line in log} == {1, 2, 3}
    assert read_offline(next((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))) == {
        name: [(step, pytest.approx(value.expected)) for step, value in points] for name, points in expected(log).items()
    }


def records(data: bytes) -> Iterator[bytes]:
    """Those of a LevelDB log after wandb's 7 bytes: blocks of 32 KiB that hold checksum, length, kind and a piece each."""
    place, whole = 7, b""
    while place + 7 <= len(data):
        left = 2**15 - place % 2**15
        if left < 7:  # too little for a piece: the rest of the block is zeros
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield whole
            whole = b""


def read_offline(file: Path) -> dict[str, list[tuple[int, float]]]:
    """The history in a file that wandb writes offline."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = {}
    for data in records(file.read_bytes()):
        history = Record.FromString(data).history
        items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in history.item}
        for name, value in items.items():
            if not name.startswith("_"):
                found.setdefault(name, []).append((items["_step"], value))
    return found


def test_a_wandb_that_takes_no_run_is_told_in_one_line(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def init(**_):
        raise wandb.errors.UsageError("api_key not configured")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(ValueError, match=r"took no run \(api_key not configured\): wandb login, or WANDB_MODE=offline"):
        train(tmp_path, report_to="wandb")
