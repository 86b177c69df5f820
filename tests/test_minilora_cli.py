"""What can be typed, and that every fault ends with one clear message and exit code 2, without a stack trace."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from minilora.cli import build_parser, main
from minilora.training import loop
from minilora.training.loop import accumulate_gradients

COMMANDS = ("demo", "train", "eval", "report", "data", "generate", "chat", "merge", "export", "info")
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


@pytest.fixture
def chat(tmp_path):
    """Four good conversations."""
    path = tmp_path / "chat.jsonl"
    path.write_text((json.dumps(CHAT) + "\n") * 4)
    return path


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    """A copy of the tiny checkpoint, to be spoilt."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "model")


@pytest.fixture
def fails(capsys):
    """Runs a command that must fail, and returns its message."""

    def run(*argv) -> str:
        assert main([str(arg) for arg in argv]) == 2
        progress, name, message = capsys.readouterr().err.rpartition(f"minilora {argv[0]}: ")
        assert name
        assert "Traceback" not in progress + message
        return message

    return run


def train(model, data, output, *more) -> list:
    settings = ["--set", "training.max_steps=2", "--set", "peft.r=2", "--set", 'peft.target_modules=["qkv_proj"]']
    return ["train", "--model", model, "--data", data, "--output", output, *settings, *more]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) > 5


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(f"    {command} " in said for command in COMMANDS)


def test_a_mistyped_command_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["trian"])
    assert stopped.value.code == 2
    assert "trian" in capsys.readouterr().err


def test_help_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; from minilora.cli import main; main(['train', '--help'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "[training]" in result.stdout


def test_the_installed_command_ends_a_fault_with_one_line_and_2(tmp_path):
    result = subprocess.run([sys.executable, "-m", "minilora", "info", tmp_path / "nothing"], capture_output=True, text=True)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "nothing" in result.stderr


def test_an_interrupted_command_exits_with_130(monkeypatch, tiny_checkpoint, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert main(["chat", "--model", str(tiny_checkpoint)]) == 130
    assert "stopped" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["stats", "show"])
def test_the_commands_on_data_explain_themselves_and_their_faults(what, capsys, tmp_path, tiny_checkpoint):
    with pytest.raises(SystemExit) as stopped:
        main(["data", what, "--help"])
    assert stopped.value.code == 0
    assert "hf://datasets/OWNER/NAME/PATH" in capsys.readouterr().out
    assert main(["data", what, str(tmp_path / "absent.jsonl"), "--model", str(tiny_checkpoint)]) == 2
    assert f"minilora data {what}: {tmp_path / 'absent.jsonl'} must be" in capsys.readouterr().err


def test_no_batch_to_show_is_refused(tiny_checkpoint, chat, capsys):
    assert main(["data", "show", str(chat), "--model", str(tiny_checkpoint), "-n", "0"]) == 2
    assert "minilora data show: -n must be at least 1, not 0" in capsys.readouterr().err


def test_data_are_evaluated_on_from_files_or_from_a_share_and_not_from_both(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--model", "m", "--data", "a", "--eval-data", "b", "--eval-share", "0.1"])
    assert "--eval-share: not allowed with argument --eval-data" in capsys.readouterr().err


def test_defaults_of_every_command_are_set():
    args = build_parser().parse_args(["demo"])
    assert str(args.output) == "runs/demo"


def test_what_is_no_checkpoint_and_no_adapter_is_told(tmp_path, fails):
    assert "must hold config.json (a checkpoint) or adapter_config.json (an adapter)" in fails("info", tmp_path)


def test_an_output_that_is_a_file_is_refused_before_the_model_is_loaded(tmp_path, chat, fails):
    assert "must be a folder, and is a file" in fails(*train(tmp_path / "no model", chat, chat))


def test_an_adapter_given_as_a_model_is_told_so(adapter, fails):
    assert "this is an adapter, for --adapter" in fails("generate", "--model", adapter, "--prompt", "x")


def test_a_folder_without_a_run_is_told(tmp_path, fails):
    assert f"{tmp_path} must be the output folder of a run, and holds no log.jsonl" in fails("report", tmp_path)


def test_data_that_is_no_file_is_told(tiny_checkpoint, tmp_path, fails):
    assert "must be a JSON Lines or Parquet file" in fails(*train(tiny_checkpoint, tmp_path, tmp_path / "out"))


LITTLE_MEMORY = """
import resource, sys, torch
from minilora.cli import main
import minilora.commands
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 600_000_000, used + 600_000_000))
sys.exit(main(sys.argv[1:]))
"""


def test_too_little_memory_is_told_in_one_line(tiny_checkpoint, chat, tmp_path):
    command = [*train(tiny_checkpoint, chat, tmp_path / "out"), "--set", "peft.r=10000000"]
    result = subprocess.run([sys.executable, "-c", LITTLE_MEMORY, *map(str, command)], capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert "minilora train: out of memory: " in result.stderr
    assert "Traceback" not in result.stderr


def test_help_names_every_default(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = capsys.readouterr().out
    for line in ("training.max_seq_length = 2048", "training.learning_rate = 0.0001", "peft.lora_alpha = 8"):
        assert line in said


# Bad checkpoints -----------------------------------------------------------------------------------------------------


def respoil(checkpoint, change) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors")


def test_missing_extra_and_misshapen_tensors_are_all_named(checkpoint, fails):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.extra"] = torch.zeros(2)
        tensors["lm_head.weight"] = torch.zeros(3, 3)

    respoil(checkpoint, change)
    message = fails("generate", "--model", checkpoint, "--prompt", "x")
    for fault in (
        "model.norm.weight is missing",
        "model.extra in model.safetensors is not part",
        "lm_head.weight must have shape",
    ):
        assert fault in message


def test_truncated_weights_are_told(checkpoint, fails):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors is truncated" in fails("generate", "--model", checkpoint, "--prompt", "x")


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "deep/model.safetensors", "..\\model.safetensors"])
def test_a_shard_that_leaves_its_folder_is_refused(checkpoint, fails, shard):
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))
    assert "is not the plain name of a safetensors file" in fails("generate", "--model", checkpoint, "--prompt", "x")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused_unread(checkpoint, fails, name):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / name).write_bytes(b"cos\nsystem\n(S'echo unpickled'\ntR.")
    message = fails("generate", "--model", checkpoint, "--prompt", "x")
    assert name in message
    assert "unpickling runs code" in message


def test_another_architecture_is_refused_by_name(checkpoint, fails):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    assert "'llama'" in fails("info", checkpoint)


# Bad conversations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"messages": [', "Expecting value"),
        (json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}), "is empty"),
        (json.dumps({"messages": [{"role": "wizard", "content": "a"}]}), "unknown role 'wizard'"),
        (json.dumps({"text": "a"}), 'has "text"'.replace('"', "'")),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_number(tiny_checkpoint, chat, fails, tmp_path, line, fault):
    chat.write_text(chat.read_text() + "\n" + line + "\n")
    message = fails(*train(tiny_checkpoint, chat, tmp_path / "out"))
    assert f"{chat}:6: " in message
    assert fault in message
    assert not (tmp_path / "out").exists()


def test_a_conversation_over_the_limit_is_counted_and_named_and_never_cut(tiny_checkpoint, chat, fails, tmp_path, capsys):
    long = {"messages": [*CHAT["messages"][:1], {"role": "assistant", "content": "Hello " * 50}]}
    chat.write_text(chat.read_text() + json.dumps(long) + "\n")
    limit = ["--set", "training.max_seq_length=100"]
    message = fails(*train(tiny_checkpoint, chat, tmp_path / "out", *limit))
    assert "1 of 5 conversations are longer than 100 tokens" in message
    assert f"{chat}:5: " in message
    assert main([str(arg) for arg in train(tiny_checkpoint, chat, tmp_path / "out", *limit, "--drop-long")]) == 0
    assert "4 conversations" in (said := capsys.readouterr().out)
    assert "1 longer than 100 left out" in said


# Bad adapters, disks and numbers -------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tiny_checkpoint, chat, tmp_path, capsys):
    assert main([str(arg) for arg in train(tiny_checkpoint, chat, tmp_path / "trained")]) == 0
    capsys.readouterr()
    return tmp_path / "trained" / "adapter"


def test_an_adapter_of_another_rank_or_shape_is_refused(tiny_checkpoint, adapter, fails):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    message = fails("generate", "--model", tiny_checkpoint, "--adapter", adapter, "--prompt", "x")
    assert "lora_A.weight must have shape (3, 32), not (2, 32)" in message


def test_an_output_that_exists_is_replaced_only_when_asked(tiny_checkpoint, chat, adapter, fails, tmp_path):
    command = train(tiny_checkpoint, chat, tmp_path / "trained")
    before = (adapter / "adapter_model.safetensors").read_bytes()
    assert "overwrite_output_dir=true" in fails(*command)
    assert (adapter / "adapter_model.safetensors").read_bytes() == before
    assert main([str(arg) for arg in [*command, "--set", "training.overwrite_output_dir=true"]]) == 0


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_adapter(checkpoint, chat, fails, tmp_path):
    respoil(checkpoint, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    message = fails(*train(checkpoint, chat, tmp_path / "out"))
    assert "step 1: loss nan" in message
    saved = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())


FULL_DISK = """
import resource, sys
from minilora.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
sys.exit(main(sys.argv[1:]))
"""


def test_a_disk_that_fills_while_saving_leaves_the_earlier_adapter_whole(tiny_checkpoint, chat, adapter, tmp_path):
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    command = train(tiny_checkpoint, chat, tmp_path / "trained", "--set", "training.overwrite_output_dir=true")
    command += ["--set", "peft.r=16"]  # an adapter of more than 4096 bytes
    result = subprocess.run([sys.executable, "-c", FULL_DISK, *map(str, command)], capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert "could not be written" in result.stderr
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before
    assert sorted(path.name for path in adapter.parent.iterdir()) == ["adapter", "log.jsonl", "report.html", "training_args.json"]


# A run that was stopped ----------------------------------------------------------------------------------------------


@pytest.fixture
def stops(monkeypatch):
    """Sends a signal to the process in the n-th step of training."""

    def at(step: int, number: int):
        drawn = []

        def accumulate(*args):
            drawn.append(None)
            if len(drawn) == step:
                signal.raise_signal(number)
            return accumulate_gradients(*args)

        monkeypatch.setattr(loop, "accumulate_gradients", accumulate)

    return at


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_how_to_go_on_and_goes_on_to_the_same_bytes(
    tiny_checkpoint, chat, tmp_path, capsys, stops, number, status
):
    settings = ["--set", "training.max_steps=5", "--set", "peft.lora_dropout=0.3"]
    whole, stopped = (train(tiny_checkpoint, chat, tmp_path / name, *settings) for name in ("whole", "stopped"))
    assert main(list(map(str, whole))) == 0
    stops(3, number)
    capsys.readouterr()
    assert main(list(map(str, stopped))) == status
    said = capsys.readouterr().err
    assert (
        f"minilora train: stopped by {signal.Signals(number).name} after step 3; {tmp_path / 'stopped' / 'checkpoint-3'}" in said
    )
    assert "--resume" in said
    assert "Traceback" not in said
    assert main([*map(str, stopped), "--resume"]) == 0
    assert f"going on from {tmp_path / 'stopped' / 'checkpoint-3'}" in capsys.readouterr().out
    adapters = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "stopped")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_a_terminated_process_exits_as_the_shell_expects(tiny_checkpoint, chat, tmp_path):
    command = train(tiny_checkpoint, chat, tmp_path / "out", "--set", "training.max_steps=100000")
    process = subprocess.Popen([sys.executable, "-m", "minilora", *map(str, command)], stderr=subprocess.PIPE, text=True)
    log = tmp_path / "out" / "log.jsonl"
    while not (log.exists() and log.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 143, said
    assert "go on: the same command with --resume" in said


@pytest.fixture
def stopped(tiny_checkpoint, chat, tmp_path, stops, capsys):
    """The folder of a run that was stopped in its second step, of three."""
    stops(2, signal.SIGTERM)
    assert main(list(map(str, train(tiny_checkpoint, chat, tmp_path / "out", "--set", "training.max_steps=3")))) == 143
    capsys.readouterr()
    return tmp_path / "out"


def test_another_run_is_not_resumed_and_every_difference_is_told(tiny_checkpoint, chat, fails, stopped):
    chat.write_text(chat.read_text() + json.dumps(CHAT) + "\n")
    message = fails(*train(tiny_checkpoint, chat, stopped, "--resume", "--set", "peft.r=4", "--set", "training.seed=1"))
    for difference in ("training.max_steps: 3 → 2", "training.seed: 0 → 1", "peft.r: 2 → 4", "data.conversations: 4 → 5"):
        assert difference in message


def test_a_stopped_run_is_resumed_or_replaced_and_never_by_chance(tiny_checkpoint, chat, fails, stopped):
    command = train(tiny_checkpoint, chat, stopped, "--set", "training.max_steps=3")
    assert "checkpoint-2 exists: choose another --output, go on with --resume" in fails(*command)
    assert main([*map(str, command), "--set", "training.overwrite_output_dir=true"]) == 0
    assert sorted(path.name for path in stopped.iterdir()) == ["adapter", "log.jsonl", "report.html", "training_args.json"]


def test_a_named_checkpoint_is_resumed_into_its_own_folder(tiny_checkpoint, chat, stopped, capsys):
    command = ["train", "--model", tiny_checkpoint, "--data", chat, "--resume", stopped / "checkpoint-2"]
    command += ["--set", "peft.r=2", "--set", 'peft.target_modules=["qkv_proj"]', "--set", "training.max_steps=3"]
    assert main(list(map(str, command))) == 0
    assert f"wrote {stopped / 'adapter'}" in capsys.readouterr().out


def test_nothing_to_resume_is_told_before_the_model_is_loaded(chat, fails, tmp_path):
    assert "nothing to resume" in fails(*train(tmp_path / "no model", chat, tmp_path / "out", "--resume"))
    message = fails(*train(tmp_path / "no model", chat, tmp_path / "out", "--resume", tmp_path / "nowhere"))
    assert "nowhere must be a checkpoint to resume from" in message


def test_skipped_steps_and_the_best_evaluation_are_told(checkpoint, chat, tmp_path, capsys):
    respoil(checkpoint, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    assert main(list(map(str, train(checkpoint, chat, tmp_path / "a", "--set", "training.on_nonfinite='skip'")))) == 0
    assert "2 of 2 steps were skipped, since loss or gradient was not finite: see the log" in capsys.readouterr().out


def test_the_evaluation_that_is_told_is_the_best_ones(tiny_checkpoint, chat, tmp_path, capsys):
    settings = ["training.load_best_model_at_end=true", "training.eval_steps=1", "training.learning_rate=5.0"]
    argv = train(tiny_checkpoint, chat, tmp_path / "out", "--eval-data", chat, *(f"--set={setting}" for setting in settings))
    assert main([*map(str, argv), "--set", "training.max_steps=4"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    best = min((line for line in lines if "eval_loss" in line), key=lambda line: line["eval_loss"])
    assert best["step"] < 4
    assert f"evaluation: loss {best['eval_loss']:.4f}" in (said := capsys.readouterr().out)
    assert f"at step {best['step']}" in said


def test_anomalies_are_told_in_one_line(checkpoint, chat, fails, tmp_path):
    respoil(checkpoint, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    with pytest.warns(UserWarning, match="Error detected in"):
        message = fails(*train(checkpoint, chat, tmp_path / "out", "--detect-anomaly"))
    assert "step 1: Function" in message
    assert "returned nan values" in message


# Wrong settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "fault"),
    [
        ("peft.rank=4", "peft.rank is unknown"),
        ("training.learning_rate=-1", "learning_rate must be positive"),
        ("training.on_nonfinite='hope'", "on_nonfinite must be one of stop, skip, not 'hope'"),
        ("training.early_stopping_patience=-1", "early_stopping_patience must be at least 0"),
        (
            "training.metric_for_best_model='f1'",
            "metric_for_best_model must be one of eval_loss, eval_perplexity (others",
        ),
        ("training.eval_metrics=['rougeL']", "eval_metrics need conversations to evaluate on"),
        ("training.eval_metrics=['bleu']", "eval_metrics must hold some of exact_match, rougeL"),
        ("training.load_best_model_at_end=true", "need conversations to evaluate on, and eval_steps"),
        ('training.learning_rate="high"', "training.learning_rate must be float"),
        (
            'peft.target_modules=["query"]',
            "match no linear layer, embedding or convolution; this model has embed_tokens, qkv_proj (q_proj, k_proj, v_proj)",
        ),
        ("training.max_steps", "must be TOML"),
    ],
)
def test_a_wrong_setting_is_named(tiny_checkpoint, chat, fails, tmp_path, setting, fault):
    assert fault in fails(*train(tiny_checkpoint, chat, tmp_path / "out", "--set", setting))


def test_a_device_that_is_not_there_is_told(tiny_checkpoint, fails):
    message = fails("generate", "--model", tiny_checkpoint, "--device", "cuda:99", "--prompt", "x")
    assert "device cuda:99 cannot be used" in message
