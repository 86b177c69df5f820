import json
import math
import random
import re
from dataclasses import replace

import pytest
import torch
from helpers import examples, tiny_config, tiny_model

import minilora as lora
from minilora.training.numerics import LEAST, SHOWN, WINDOW, find_nonfinite, is_spike, named_anomalies, shortened


def adapted():
    torch.manual_seed(0)
    model = lora.inject(tiny_model(tiny_config()), lora.LoraConfig(r=2))
    lora.mark_only_lora_as_trainable(model)
    return model


def named(count: int):
    return [replace(example, source=f"chat.jsonl:{line}") for line, example in enumerate(examples(count), start=1)]


def train(model, dataset, folder=None, resume=False, **settings):
    config = lora.TrainConfig(**{"learning_rate": 1e-2, "per_device_train_batch_size": 2} | settings)
    return lora.train(model, dataset, config, output_dir=folder, progress=False, resume=resume)


def poisoned():
    """A model whose loss is NaN where token 255 occurs, and conversations of which one, line 3, has it."""
    model, dataset = adapted(), named(8)
    dataset = [replace(example, ids=[min(i, 254) for i in example.ids]) for example in dataset]
    dataset[2] = replace(dataset[2], ids=[255, *dataset[2].ids[1:]])
    with torch.no_grad():
        model.model.embed_tokens.weight[255] = math.nan
    return model, dataset


def adapter(model):
    return {name: tensor.clone() for name, tensor in lora.lora_state_dict(model).items()}


def same(first, second) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_loss_that_is_nan_names_step_parameters_and_the_example_at_fault(tmp_path):
    model, dataset = poisoned()
    with pytest.raises(FloatingPointError) as told:
        train(model, dataset, tmp_path)
    assert re.search(r"step \d: loss nan and gradient norm nan must be finite", str(told.value))
    assert "in the gradient of model.layers.0.self_attn.qkv_proj.lora_A, " in str(told.value)
    assert "and 11 more, on chat.jsonl:3; the weights stay" in str(told.value)


@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_names_its_parameter_and_all_examples_of_the_step(factor):
    model = adapted()
    model.model.layers[1].mlp.down_proj.lora_B.register_hook(lambda gradient: gradient * factor)
    with pytest.raises(FloatingPointError) as told:
        train(model, named(2))
    assert "in the gradient of model.layers.1.mlp.down_proj.lora_B, on chat.jsonl:" in str(told.value)
    assert "chat.jsonl:1" in str(told.value)
    assert "chat.jsonl:2" in str(told.value)


def test_skipped_steps_are_counted_and_logged_and_change_nothing(tmp_path):
    model, dataset = poisoned()
    result = train(model, dataset, tmp_path, on_nonfinite="skip", num_train_epochs=2, weight_decay=0.5)
    assert (result.steps, result.skipped) == (8, 2)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == result.log
    skipped = [line for line in lines if "skipped" in line]
    assert [line["skipped"] for line in skipped] == [1, 2]
    assert all(line["examples"] == ["chat.jsonl:3"] for line in skipped)
    assert all(len(line["parameters"]) == 16 for line in skipped)
    assert all(line["not_finite"] == "loss nan, gradient norm nan" for line in skipped)
    assert len([line for line in lines if "loss" in line]) == 6
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()
    assert all(tensor.isfinite().all() for tensor in adapter(model).values())


def test_a_run_of_skipped_steps_only_leaves_the_model_as_it_was():
    model, dataset = poisoned()
    start = adapter(model)
    result = train(model, [dataset[2]] * 4, on_nonfinite="skip", weight_decay=0.5)
    assert result.skipped == result.steps == 2
    assert same(adapter(model), start)


def test_a_skipped_step_resumes_with_its_count(tmp_path):
    runs = [poisoned() for _ in range(2)]
    settings = {"on_nonfinite": "skip", "num_train_epochs": 2.0, "save_steps": 1, "save_total_limit": 9}
    results = [train(*runs[0], tmp_path, **settings)]
    results.append(train(*runs[1], resume=tmp_path / "checkpoint-5", **settings))
    assert same(*(adapter(model) for model, _ in runs))
    assert results[0].skipped == results[1].skipped == 2


def test_finding_what_is_not_finite_draws_no_random_number_and_keeps_the_mode():
    model, dataset = poisoned()
    model.train()
    state = torch.get_rng_state()
    assert find_nonfinite(model, dataset) == ([], ["chat.jsonl:3"])
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_the_operation_of_the_first_nan_is_named(capfd):
    model, dataset = poisoned()
    with (
        pytest.warns(UserWarning, match="Error detected in"),
        pytest.raises(FloatingPointError, match=r"step \d: Function '\w+' returned nan values"),
    ):
        train(model, dataset, detect_anomaly=True)
    assert not torch.is_anomaly_enabled()


def test_other_errors_pass_through_as_they_are():
    with pytest.raises(RuntimeError, match=r"^other$"), named_anomalies(True, 1):
        raise RuntimeError("other")


def test_names_are_shortened():
    assert shortened(["a", "b"]) == "a, b"
    assert shortened(list("abcdefg")) == f"a, b, c, d, e and {7 - SHOWN} more"


# Spikes


def test_noise_is_no_spike_and_a_leap_is():
    chance = random.Random(0)
    losses = [2 + chance.gauss(0, 0.2) for _ in range(1000)]
    assert not any(is_spike(losses[i], losses[max(0, i - WINDOW) : i]) for i in range(1000))
    assert is_spike(4.0, losses[-WINDOW:])


def test_a_falling_loss_is_no_spike_nor_is_one_that_hardly_varies():
    losses = [4 * 0.95**i for i in range(200)]
    assert not any(is_spike(losses[i], losses[max(0, i - WINDOW) : i]) for i in range(200))
    assert not is_spike(1.01, [1.0] * WINDOW)
    assert is_spike(1.5, [1.0] * WINDOW)


def test_nothing_is_a_spike_before_it_is_known_what_is_usual():
    assert not is_spike(100.0, [1.0] * (LEAST - 1))
    assert is_spike(100.0, [1.0] * LEAST)


def leaping(step: int):
    """A model whose loss is ten times itself in the n-th forward pass."""
    model, passes = adapted(), []

    def leap(_, __, loss):
        passes.append(None)
        return loss * 10 if len(passes) == step else loss

    model.register_forward_hook(leap)
    return model


def test_spikes_of_loss_and_gradient_are_logged_with_their_examples(tmp_path):
    settings = {"learning_rate": 1e-9, "num_train_epochs": 20, "save_steps": 1, "save_total_limit": 99}
    result = train(leaping(12), named(1), tmp_path, **settings)
    spikes = [line for line in result.log if "spike" in line]
    assert [(line["step"], line["spike"]) for line in spikes] == [(12, "loss"), (12, "grad_norm")]
    loss = next(line["loss"] for line in result.log if line["step"] == 1)
    assert spikes[0]["value"] == pytest.approx(10 * loss, rel=1e-3)
    assert spikes[0]["usual"] == pytest.approx(loss, rel=1e-3)
    assert spikes[0]["examples"] == ["chat.jsonl:1"]
    resumed = train(leaping(1), named(1), resume=tmp_path / "checkpoint-11", **settings)
    assert [line for line in resumed.log if "spike" in line] == spikes
