"""A run that is killed and resumed ends as one that was not: the same bytes."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import examples, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from torch import nn

import minilora as lora
from minilora.training.checkpoint import FILES, STATE, STATE_TENSORS, find_checkpoints

VARIANTS = {
    "slices, dropout": {"target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.3},
    "DoRA, dropout": {"target_modules": ["q_proj", "o_proj"], "use_dora": True, "lora_dropout": 0.3},
    "modules trained whole": {"target_modules": ["o_proj"], "modules_to_save": ["lm_head"]},
    "a bias on the adapter": {"target_modules": ["k_proj", "up_proj"], "lora_bias": True},
    "PiSSA": {"target_modules": ["q_proj", "o_proj"], "init_lora_weights": "pissa"},
    "OLoRA": {"target_modules": ["gate_up_proj"], "init_lora_weights": "olora"},
    "embedding, other ranks": {"target_modules": ["embed_tokens", "o_proj"], "rank_pattern": {"o_proj": 3}, "use_rslora": True},
}


def adapted(dtype=torch.float32, **settings):
    torch.manual_seed(0)
    model = lora.inject(tiny_model(tiny_config()), lora.LoraConfig(**{"r": 2, "lora_alpha": 4} | settings), dtype)
    lora.mark_only_lora_as_trainable(model)
    return model


def train(model, output_dir, resume=False, dataset=None, eval_dataset=None, **settings):
    defaults = {
        "learning_rate": 1e-2, "per_device_train_batch_size": 2, "num_train_epochs": 2, "save_steps": 2, "save_total_limit": 9,
        "weight_decay": 0.1, "warmup_ratio": 0.2,
    }  # fmt: skip
    config = lora.TrainConfig(**defaults | settings)
    return lora.train(model, dataset or examples(5), config, eval_dataset, output_dir, progress=False, resume=resume)


def trained(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def without_clock(log: list[dict]) -> list[dict]:
    return [
        {name: value for name, value in line.items() if name not in ("seconds", "tokens_per_second", "memory")} for line in log
    ]


# Killed


def test_runs_killed_at_any_moment_and_resumed_end_bitwise_as_one_that_was_not(tmp_path):
    """Twenty random moments, and fourteen accesses to the disk, most of them inside a save."""
    script = Path(__file__).with_name("killed_runs.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, env=environment, timeout=600)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert len(told) == 34
    for run in told:
        assert run["same"] == [True, True, True], run  # adapter, log, names
    assert sum(run["resumed"] for run in told) >= 10  # the others had saved nothing yet


# Resumed


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_goes_on_from_any_checkpoint_to_the_same_bits(tmp_path, settings):
    whole = adapted(**settings)
    result = train(whole, tmp_path, loraplus_lr_ratio=4.0)
    for step in (2, 4):
        model = adapted(**settings)
        resumed = train(model, tmp_path / "again", resume=tmp_path / f"checkpoint-{step}", loraplus_lr_ratio=4.0)
        assert_same(trained(model), trained(whole))
        assert without_clock(resumed.log) == without_clock(result.log)
        assert (resumed.steps, resumed.tokens) == (result.steps, result.tokens)
        files = [folder / "adapter" / "adapter_model.safetensors" for folder in (tmp_path, tmp_path / "again")]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float64, None)])
def test_several_dtypes_go_on_to_the_same_bits(tmp_path, dtypes):
    weights, of_adapter = dtypes

    def make():
        torch.manual_seed(0)
        settings = lora.LoraConfig(r=2, lora_dropout=0.2, target_modules=["q_proj", "down_proj"])
        model = lora.inject(tiny_model(tiny_config()).to(weights), settings, of_adapter)
        lora.mark_only_lora_as_trainable(model)
        return model

    whole, model = make(), make()
    train(whole, tmp_path)
    train(model, tmp_path, resume=tmp_path / "checkpoint-2")
    assert_same(trained(model), trained(whole))
    assert {parameter.dtype for parameter in trained(model).values()} == {of_adapter or weights}


class Biased(nn.Module):
    """An embedding and two linear layers with biases."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.first, self.head = nn.Embedding(256, 8), nn.Linear(8, 8), nn.Linear(8, 256)

    def forward(self, input_ids, labels):
        logits = self.head(self.first(self.embed(input_ids)).tanh())[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_of_the_base_go_on_to_the_same_bits(tmp_path, bias):
    def make():
        model = lora.inject(Biased(), lora.LoraConfig(r=2, target_modules=["first"], bias=bias))
        lora.mark_only_lora_as_trainable(model)
        return model

    whole, model = make(), make()
    train(whole, tmp_path)
    assert "first.bias" in trained(whole)
    train(model, tmp_path, resume=tmp_path / "checkpoint-4")
    assert_same(trained(model), trained(whole))


def test_a_model_of_hand_made_layers_goes_on_to_the_same_bits(tmp_path):
    def make():
        model = Biased()
        model.first = lora.Linear(8, 8, r=2, lora_dropout=0.5)
        lora.mark_only_lora_as_trainable(model)
        return model

    whole, model = make(), make()
    train(whole, tmp_path)
    train(model, tmp_path, resume=tmp_path / "checkpoint-2")
    assert_same(trained(model), trained(whole))


def test_the_active_one_of_several_adapters_goes_on_to_the_same_bits(tmp_path):
    def make():
        model = adapted(lora_dropout=0.3)
        lora.load_adapter(model, tmp_path / "other", adapter_name="other")
        lora.mark_only_lora_as_trainable(model)
        return model

    lora.save_adapter(adapted(r=3, target_modules=["o_proj"]), tmp_path / "other")
    whole, model = make(), make()
    train(whole, tmp_path / "run")
    train(model, tmp_path / "run", resume=True)
    assert_same(trained(model), trained(whole))
    lora.set_adapter(model, "default")
    assert_same(lora.lora_state_dict(model), lora.lora_state_dict(adapted(lora_dropout=0.3)))


def test_a_resumed_run_goes_on_in_the_middle_of_an_epoch(tmp_path):
    settings = {"num_train_epochs": 3, "gradient_accumulation_steps": 2, "save_steps": 1}  # 3 batches an epoch, 2 a step
    whole = adapted()
    train(whole, tmp_path, **settings)
    places = [json.loads((tmp_path / f"checkpoint-{step}" / STATE).read_text())["progress"]["place"] for step in (1, 2, 3, 4)]
    assert places == [[0, 2], [1, 1], [2, 0], [2, 2]]
    for step in (1, 2, 3, 4):
        model = adapted()
        train(model, tmp_path, resume=tmp_path / f"checkpoint-{step}", **settings)
        assert_same(trained(model), trained(whole))


def test_resume_takes_the_newest_whole_checkpoint(tmp_path):
    whole = adapted()
    train(whole, tmp_path)
    newest = find_checkpoints(tmp_path)[-1]
    assert newest.name == "checkpoint-4"
    broken = shutil.copytree(newest, tmp_path / "checkpoint-5")
    (broken / STATE_TENSORS).unlink()
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-9.abc").mkdir()
    steps = []
    model = adapted()
    model.register_forward_pre_hook(lambda *_: steps.append(None))
    train(model, tmp_path, resume=True)
    assert len(steps) == 2
    assert_same(trained(model), trained(whole))
    assert not (tmp_path / "checkpoint-9.abc").exists()  # what a killed save left


def test_a_resumed_log_is_the_log_of_one_run(tmp_path):
    result = train(adapted(), tmp_path)
    before = (tmp_path / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text(before + '{"step": 7, "lo')  # as a killed run may leave it
    resumed = train(adapted(), tmp_path, resume=tmp_path / "checkpoint-2")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == resumed.log
    assert without_clock(lines) == without_clock(result.log)


# What a checkpoint is


def test_a_checkpoint_is_safetensors_and_json_and_an_adapter_besides(tmp_path):
    model = adapted()
    train(model, tmp_path)
    folder = tmp_path / "checkpoint-4"
    assert {path.name for path in folder.iterdir()} == FILES
    assert all(name.endswith((".safetensors", ".json")) for name in FILES)
    tensors = load_file(folder / STATE_TENSORS)
    names = {f"optimizer.{name}.{key}" for name in trained(model) for key in ("step", "exp_avg", "exp_avg_sq")}
    assert tensors.keys() == names
    lora.load_adapter(tiny_model(tiny_config()), folder)


def test_a_later_checkpoint_outlasts_going_back(tmp_path):
    train(adapted(), tmp_path)
    train(adapted(), tmp_path, resume=tmp_path / "checkpoint-2", save_total_limit=1, save_steps=3)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4"]


def test_a_disk_that_fills_leaves_the_earlier_checkpoint_whole(tmp_path):
    model, steps, unlimited = adapted(), [], resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(*_):
        steps.append(None)
        if len(steps) == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (16384, unlimited[1]))  # longer than the adapter's files, and no other

    model.register_forward_pre_hook(fill)
    try:
        with pytest.raises(OSError, match=r"checkpoint-4 could not be written .*earlier checkpoints are untouched"):
            train(model, tmp_path, save_total_limit=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]  # not removed before there is another
    train(adapted(), tmp_path, resume=True)


# What is refused


def refused(model, folder, match, error=ValueError, **settings):
    start = trained(model)
    with pytest.raises(error, match=match) as told:
        train(model, folder, **{"resume": True} | settings)
    assert_same(trained(model), start)
    return str(told.value)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(adapted(), folder)
    return folder


def test_another_run_is_refused_with_every_difference(checkpoints):
    told = refused(
        adapted(lora_dropout=0.1), checkpoints, "of another run", learning_rate=2e-2, seed=3, dataset=examples(6), logging_steps=5
    )
    assert "training.learning_rate: 0.01 → 0.02" in told
    assert "training.seed: 0 → 3" in told
    assert "peft.lora_dropout: 0.0 → 0.1" in told
    assert "data.conversations: 5 → 6" in told
    assert "logging_steps" not in told


def test_another_base_or_dtype_or_rank_is_refused(checkpoints):
    model = adapted()
    with torch.no_grad():
        model.model.norm.weight.mul_(1.001)
    assert refused(model, checkpoints, "base.model.norm.weight: float32").count("→") == 2  # one in the heading
    assert "trained.model.layers.0.mlp.down_proj.lora_A: float32 [2, 48] → bfloat16 [2, 48]" in refused(
        adapted(torch.bfloat16), checkpoints, "another run"
    )
    assert "peft.r: 2 → 4" in refused(adapted(r=4), checkpoints, "another run")


def test_harmless_differences_are_let_through(checkpoints, tmp_path):
    whole = adapted()
    train(whole, tmp_path / "whole")
    moved, model = shutil.copytree(checkpoints, tmp_path / "moved"), adapted()
    settings = {
        "logging_steps": 3,
        "save_steps": 1,
        "save_total_limit": 1,
        "gradient_checkpointing": True,
        "detect_anomaly": True,
    }
    train(model, moved, resume=True, **settings)
    assert_same(trained(model), trained(whole))


def test_nothing_to_resume_is_told(tmp_path):
    refused(adapted(), tmp_path, "nothing to resume: .* holds no checkpoint", FileNotFoundError)
    refused(adapted(), tmp_path / "nowhere", "nothing to resume", FileNotFoundError)
    refused(adapted(), tmp_path, f"must be a checkpoint.* lacks .*{STATE}", FileNotFoundError, resume=tmp_path)
    refused(adapted(), None, "name output_dir, or the checkpoint itself")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [STATE, STATE_TENSORS, "adapter_model.safetensors"])
def test_a_broken_checkpoint_is_told(checkpoints, tmp_path, name):
    folder = shutil.copytree(checkpoints, tmp_path / "run")
    file = folder / "checkpoint-4" / name
    file.write_bytes(file.read_bytes()[:-50])
    refused(adapted(), folder, "broken|truncated")


@pytest.mark.parametrize("text", ["{}", "[]", "3"])
def test_json_of_another_kind_is_told(checkpoints, tmp_path, text):
    folder = shutil.copytree(checkpoints, tmp_path / "run")
    (folder / "checkpoint-4" / STATE).write_text(text)
    refused(adapted(), folder, "broken")


def test_a_checkpoint_of_other_moments_is_told(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints, tmp_path / "run")
    file = folder / "checkpoint-4" / STATE_TENSORS
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("exp_avg"))
    tensors[name] = torch.zeros(1)
    save_file(tensors, file)
    told = refused(adapted(), folder, "broken")
    assert name in told
