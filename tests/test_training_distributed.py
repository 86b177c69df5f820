"""Several processes train as one does: real ones, joined by gloo, on one machine and on two hosts in network namespaces."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers import rms_error, tiny_config, tiny_model
from safetensors.torch import load_file

import minilora as lora
from minilora.cli import main
from minilora.training.checkpoint import FILES, find_checkpoints
from minilora.training.distributed import (
    _take_gpu,
    after_first,
    in_turn,
    joined,
    largest,
    of_this_rank,
    rank,
    summed,
    title,
    world_size,
)

ROOT = Path(__file__).parents[1]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
CHAT = [["Where is the key?", "Under the mat."], ["Hi", "Hello"], ["Is the tea ready?", "In three minutes."]]


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> tuple[Path, dict[str, list[dict]]]:
    """The runs of several_processes.py: their folder, and how each of their processes ended."""
    place = tmp_path_factory.mktemp("runs")
    script = Path(__file__).with_name("several_processes.py")
    ended = subprocess.run(
        [sys.executable, script, place], capture_output=True, text=True, env=os.environ | ONE_THREAD, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    return place, json.loads((place / "told.json").read_text())


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_alike(log: list[dict], expected: list[dict], tolerance: float = 1e-5) -> None:
    """The same lines: figures, but for those of the machine, to float tolerance, and answers word for word."""
    assert len(log) == len(expected)
    for line, other in zip(log, expected, strict=True):
        assert line.keys() == other.keys()
        for name in line.keys() - {"seconds", "tokens_per_second", "memory"}:
            figure = isinstance(line[name], float)
            assert line[name] == (pytest.approx(other[name], rel=tolerance) if figure else other[name]), name


def assert_same_run(first: Path, second: Path) -> None:
    """Loss curve, evaluations and adapter to float tolerance."""
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (first, second)]
    assert_alike(*logs)
    found, expected = adapter(first), adapter(second)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert rms_error(tensor, expected[name]) < 1e-5, name


# The same step, however many take it


@pytest.mark.parametrize("name", ["two", "four", "split"])
def test_several_processes_end_as_one_does(runs, name):
    """Of the last batch of an epoch, one conversation, all but one process get none."""
    place, told = runs
    (one,) = told["one"]
    steps = [line for line in one["returned"]["log"] if "loss" in line]
    assert [line["tokens"] for line in steps][:3] == [48, 93, 102]  # the third step has one conversation of 9 tokens
    assert_same_run(place / name, place / "one")
    assert all(len(line["samples"]) == 3 for line in one["returned"]["log"] if "eval_loss" in line)  # the same answers, too
    for process in told[name]:
        assert process["status"] == 0
        assert process["returned"]["adapter"] == told[name][0]["returned"]["adapter"]  # bit for bit on every rank
        assert_alike(process["returned"]["log"], one["returned"]["log"])


def test_of_a_split_base_each_process_holds_its_part(runs):
    parts = [process["returned"]["parts"] for process in runs[1]["split"]]
    assert sum(mine for mine, _ in parts) == parts[0][1]
    assert all(mine == pytest.approx(whole / 2, rel=0.02) for mine, whole in parts)


def test_gradients_and_values_are_summed_and_the_start_is_that_of_rank_0(runs):
    first, second = (process["returned"] for process in runs[1]["laws"])
    assert first[1:4] == second[1:4] == [[3.0, 20.0], [0.0], [2.0, 1.0]]
    assert (first[4:6], second[4:6]) == ([[[0, 2], True], [[0], True]], [[[1], True], [[0], False]])


def test_the_first_process_of_a_machine_leaves_to_the_others_what_it_made(runs):
    assert [process["returned"][6] for process in runs[1]["laws"]] == [None, True]


def test_the_best_adapter_is_loaded_by_one_and_given_to_all(runs):
    place, told = runs
    first, second = (process["returned"] for process in told["best"])
    assert first["adapter"] == second["adapter"]
    evaluations = [line for line in first["log"] if "eval_loss" in line]
    best = min(evaluations, key=lambda line: line["eval_loss"])
    assert best["step"] < evaluations[-1]["step"]
    for name, tensor in load_file(place / "best" / f"checkpoint-{best['step']}" / "adapter_model.safetensors").items():
        assert torch.equal(tensor, adapter(place / "best")[name])


def test_a_4_bit_base_is_not_split(runs):
    for process in runs[1]["laws"]:
        assert process["returned"][0].startswith("4-bit weights cannot be split over processes: give each the whole 4-bit base")


# On disk


def test_only_rank_0_writes(runs):
    first, second = runs[1]["writes"]
    assert (first["status"], second["status"]) == (0, 0)
    assert second["returned"] == []
    assert {path.name for path in (runs[0] / "writes").iterdir()} == {
        "adapter",
        "checkpoint-2",
        "log.jsonl",
        "training_args.json",
    }


@pytest.mark.parametrize("name", ["four from two", "one from split", "split from one"])
def test_a_run_goes_on_with_another_number_of_processes(runs, name):
    place, told = runs
    assert all(process["status"] == 0 for process in told[name])
    assert_same_run(place / name, place / "one")


def test_as_many_processes_go_on_to_the_same_bits_with_dropout_too(runs):
    place, told = runs
    assert told["dropout again"][0]["returned"]["adapter"] == told["dropout"][0]["returned"]["adapter"]
    again, first, without = (adapter(place / name) for name in ("dropout again", "dropout", "two"))
    assert all(torch.equal(again[name], first[name]) for name in first)
    assert not all(torch.equal(without[name], first[name]) for name in first)


def test_another_batch_over_all_processes_is_another_run(runs):
    for process in runs[1]["other batch"]:
        assert "training.per_device_train_batch_size × processes: 4 → 8" in process["raised"][1]


# Ends


def test_when_one_process_dies_the_others_stop_with_a_message_and_the_checkpoint_is_whole(runs):
    place, told = runs
    left, killed = told["dies"]
    assert killed == {"status": -signal.SIGKILL}
    kind, message, _ = left["raised"]
    assert kind == "ConnectionError"
    assert message.startswith("another process has ended or does not answer, and so this one stops too (")
    assert message.endswith("What is saved is whole: see what that process told, and go on with --resume")
    assert told["dies again"][0]["status"] == 0
    assert_same_run(place / "dies", place / "one")


def test_when_one_process_does_not_answer_the_others_stop_with_a_message_when_the_time_is_over(runs):
    for process in runs[1]["hangs"]:
        kind, message, _ = process["raised"]
        assert kind == "ConnectionError"
        assert message.startswith("another process has ended or does not answer, and so this one stops too (")
    assert "Timed out waiting 5000ms" in runs[1]["hangs"][0]["raised"][1]
    assert find_checkpoints(runs[0] / "hangs") == [runs[0] / "hangs" / "checkpoint-2"]


def test_a_signal_to_any_process_ends_all_after_the_same_step_with_a_whole_checkpoint(runs):
    place, told = runs
    for process in told["ends"]:
        kind, message, _ = process["raised"]
        assert kind == "Interrupted"
        assert message.startswith("stopped by SIGTERM after step 3; ")
    assert {path.name for path in (place / "ends" / "checkpoint-3").iterdir()} == FILES
    assert told["ends again"][0]["status"] == 0
    assert_same_run(place / "ends", place / "one")


def test_a_step_that_is_not_finite_for_one_ends_all(runs):
    for process in runs[1]["infinite"]:
        kind, message, _ = process["raised"]
        assert kind == "FloatingPointError"
        assert message.startswith("step 2: loss")


@pytest.mark.parametrize("name", ["two", "split"])
def test_no_thread_of_the_group_outlives_it(runs, name):
    """One that still held a tensor when Python ends would abort the process."""
    for process in runs[1][name]:
        assert "python" in " ".join(process["threads"])
        assert not [thread for thread in process["threads"] if "gloo" in thread]


# One process alone


def test_outside_a_group_there_is_one_process():
    with joined():
        assert (rank(), world_size(), title()) == (0, 1, "")
        assert (summed(1.0, 2.0), largest(3.0)) == ([1.0, 2.0], 3.0)
        assert of_this_rank([1, 2]) == ([1, 2], True)
        assert in_turn(lambda: 5) == after_first(lambda: 5) == 5


def test_one_process_splits_no_base():
    with pytest.raises(ValueError, match="several processes, and this is one: start them with torchrun"):
        lora.shard_base(tiny_model(tiny_config()))


def test_each_process_needs_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"a GPU of its own, and this machine has 2: start as many with torchrun --nproc-per-no"):
        _take_gpu(2)


# The command line


@pytest.fixture
def chat(tmp_path) -> Path:
    """Three conversations, which two processes share unevenly."""
    conversations = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]} for asked, answer in CHAT
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(conversation) + "\n" for conversation in conversations))
    return tmp_path / "chat.jsonl"


def command(model: Path, chat: Path, output: Path, *settings: str) -> list[str]:
    fixed = ["training.num_train_epochs=3", "training.learning_rate=0.01", "training.save_steps=2", "peft.r=2"]
    typed = [word for setting in (*fixed, *settings) for word in ("--set", setting)]
    data = ["--data", str(chat), "--eval-data", str(chat)]
    return ["train", "--model", str(model), "--output", str(output), "--device", "cpu", *data, *typed]


def torchrun(*options: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m", "minilora"]


def test_torchrun_starts_the_command_line(tiny_checkpoint, chat, tmp_path):
    several, one = tmp_path / "several", tmp_path / "one"
    typed = command(tiny_checkpoint, chat, several, "training.per_device_train_batch_size=1")
    started = torchrun("--standalone", "--nproc-per-node", "2")
    ended = subprocess.run([*started, *typed], capture_output=True, text=True, env=os.environ | ONE_THREAD, cwd=ROOT, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("processes: 2, 2 of them on this machine, joined by gloo") == 1
    assert ended.stdout.count(f"wrote {several / 'adapter'}") == 1  # rank 0 alone prints
    assert main(command(tiny_checkpoint, chat, one, "training.per_device_train_batch_size=2")) == 0
    assert_same_run(several, one)


def test_torchrun_told_to_end_ends_with_a_whole_checkpoint(tiny_checkpoint, chat, tmp_path):
    output, settings = tmp_path / "out", ["training.max_steps=100000", "training.per_device_train_batch_size=1"]
    started = torchrun("--standalone", "--nproc-per-node", "2") + command(tiny_checkpoint, chat, output, *settings)
    with subprocess.Popen(started, stderr=subprocess.PIPE, text=True, env=os.environ | ONE_THREAD, cwd=ROOT) as running:
        while running.poll() is None and not find_checkpoints(output):
            time.sleep(0.1)
        running.terminate()
        _, told = running.communicate(timeout=120)
    (step,) = {int(found) for found in re.findall(r"\): stopped by SIGTERM after step (\d+); ", told)}
    assert [told.count(f"minilora train (rank {rank} of 2): stopped") for rank in (0, 1)] == [1, 1]
    assert find_checkpoints(output)[-1] == output / f"checkpoint-{step}"


@contextmanager
def two_hosts():
    """Two network namespaces, joined by a cable: their names, and the address and the device of each; all in them is ended."""
    names, addresses, devices = [f"minilora{os.getpid()}{end}" for end in "ab"], ["10.77.0.1", "10.77.0.2"], ["mla", "mlb"]
    devices = [f"{device}{os.getpid() % 100000}" for device in devices]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    if not shutil.which("ip"):
        pytest.skip("two hosts need `ip netns`, and there is no `ip` (iproute2)")
    try:
        ip("netns", "add", names[0])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"two hosts need network namespaces, which cannot be made here: {error.stderr.strip()}")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", devices[0], "netns", names[0], "type", "veth", "peer", "name", devices[1], "netns", names[1])
        for name, address, device in zip(names, addresses, devices, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", device)
            ip("-n", name, "link", "set", device, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield list(zip(names, addresses, devices, strict=True))
    finally:
        for name in names:
            left = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
            subprocess.run(["kill", "-KILL", *left], capture_output=True)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def test_two_hosts_with_a_split_base_end_as_one_process_does(tiny_checkpoint, chat, tmp_path):
    outputs, one = [tmp_path / "first", tmp_path / "second"], tmp_path / "one"
    logs, started = [tmp_path / "first.txt", tmp_path / "second.txt"], []
    with two_hosts() as hosts:
        for number, (name, _, device) in enumerate(hosts):
            nodes = ["--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "1"]
            launch = torchrun(*nodes, "--master-addr", hosts[0][1], "--master-port", "29500")
            settings = ["training.per_device_train_batch_size=1", "training.fsdp=true"]
            typed = command(tiny_checkpoint, chat, outputs[number], *settings)
            environment = os.environ | ONE_THREAD | {"GLOO_SOCKET_IFNAME": device}
            host = ["ip", "netns", "exec", name, *launch, *typed]
            with open(logs[number], "w") as log:
                started.append(subprocess.Popen(host, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT))
        end = time.monotonic() + 200
        while None in (statuses := [host.poll() for host in started]) and time.monotonic() < end:
            time.sleep(0.1)
    told = [log.read_text() for log in logs]
    assert statuses == [0, 0], told
    assert "processes: 2, 1 of them on this machine, joined by gloo" in told[0]
    assert "the base is split over 2 processes" in told[0]
    assert not outputs[1].exists()  # the second host wrote nothing
    assert find_checkpoints(outputs[0])
    assert main(command(tiny_checkpoint, chat, one, "training.per_device_train_batch_size=2")) == 0
    assert_same_run(outputs[0], one)
