from dataclasses import fields, replace

import pytest
import torch
from helpers import examples, tiny_config, tiny_model

import minilora as lora
from minilora.kernels.nf4_tensor import NF4Tensor
from minilora.training.fingerprint import BATCH, ELEMENTS, HARMLESS, differences, fingerprint


def adapted(**settings):
    torch.manual_seed(0)
    model = lora.inject(tiny_model(tiny_config()), lora.LoraConfig(**{"r": 2} | settings))
    lora.mark_only_lora_as_trainable(model)
    return model


def changed(model=None, config=None, dataset=None, eval_dataset=None) -> list[str]:
    """Names that differ from those of a usual run."""
    usual = fingerprint(adapted(), lora.TrainConfig(), examples(4))
    now = fingerprint(model or adapted(), config or lora.TrainConfig(), dataset or examples(4), eval_dataset)
    return [difference.partition(": ")[0] for difference in differences(usual, now)]


def test_the_same_run_has_the_same_fingerprint():
    assert changed() == []


def test_training_changes_no_fingerprint():
    model = adapted(init_lora_weights="pissa")
    before = fingerprint(model, lora.TrainConfig(), examples(4))
    lora.train(model, examples(4), lora.TrainConfig(max_steps=2), progress=False)
    assert fingerprint(model, lora.TrainConfig(), examples(4)) == before


OTHERS = {
    "learning_rate": 1.0, "loraplus_lr_ratio": 2.0, "lr_scheduler_type": "linear", "warmup_ratio": 0.5, "num_train_epochs": 2.0,
    "max_steps": 7, "per_device_train_batch_size": 3, "per_device_eval_batch_size": 3, "gradient_accumulation_steps": 3,
    "gradient_checkpointing": True, "weight_decay": 0.5, "max_grad_norm": 2.0, "on_nonfinite": "skip", "detect_anomaly": True,
    "logging_steps": 3, "eval_steps": 3, "save_steps": 3, "save_total_limit": 3, "load_best_model_at_end": True,
    "early_stopping_patience": 3, "seed": 3, "packing": True, "max_seq_length": 9, "eval_strategy": "epoch",
    "save_strategy": "epoch", "eval_samples": 3, "eval_max_new_tokens": 3, "eval_metrics": ["exact_match"],
    "metric_for_best_model": "perplexity", "greater_is_better": False, "report_to": "wandb",
}  # fmt: skip


def test_every_setting_counts_but_the_harmless_ones():
    assert OTHERS.keys() == {field.name for field in fields(lora.TrainConfig)}
    for name, value in OTHERS.items():
        expected = [] if name in HARMLESS else [f"training.{name}" + (" × processes" if name == BATCH else "")]
        assert changed(config=replace(lora.TrainConfig(), **{name: value})) == expected


def test_the_adapter_counts():
    assert changed(adapted(lora_dropout=0.1)) == ["peft.lora_dropout"]
    assert "trained.model.layers.0.self_attn.o_proj.lora_A" in changed(adapted(r=3))


def test_the_data_count_and_their_sources_do_not():
    dataset = examples(4)
    assert changed(dataset=dataset[::-1]) == ["data.sha256"]
    assert changed(dataset=dataset[:3]) == ["data.conversations", "data.tokens", "data.sha256"]
    assert changed(dataset=[replace(dataset[0], mask=[True] * len(dataset[0].ids)), *dataset[1:]]) == ["data.sha256"]
    assert changed(dataset=[replace(example, source="elsewhere:1") for example in dataset]) == []
    assert changed(eval_dataset=examples(1)) == ["eval_data.conversations", "eval_data.tokens", "eval_data.sha256"]


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_every_frozen_tensor_counts(name):
    model = adapted()
    with torch.no_grad():
        model.get_parameter(name).mul_(1.0001)
    assert changed(model) == [f"base.{name}"]


def test_every_part_of_a_4_bit_weight_counts():
    def four_bit(factor):
        model = adapted()
        layer = model.model.layers[1].mlp.down_proj
        layer.weight = torch.nn.Parameter(NF4Tensor.quantize(layer.weight.detach() * factor), requires_grad=False)
        return model

    usual = fingerprint(four_bit(1.0), lora.TrainConfig(), examples(4))
    assert usual == fingerprint(four_bit(1.0), lora.TrainConfig(), examples(4))
    other = fingerprint(four_bit(1.01), lora.TrainConfig(), examples(4))  # the same codes by other scales
    assert [name for name in usual if usual[name] != other[name]] == ["base.model.layers.1.mlp.down_proj.weight"]


def test_dtypes_count():
    one, other = (fingerprint(model, lora.TrainConfig(), examples(4)) for model in (adapted(), adapted().to(torch.bfloat16)))
    assert one.keys() == other.keys()
    tensors = [name for name in one if name.startswith(("trained.", "base."))]
    assert len(tensors) > 20
    assert all(one[name] != other[name] for name in tensors)


def test_a_fingerprint_reads_a_share_of_large_tensors_from_all_their_columns():
    """A wide matrix is told from one with another column, whichever it is, though few elements are read."""
    model = torch.nn.Linear(64, 64 * ELEMENTS, bias=False).requires_grad_(False)
    usual = fingerprint(model, lora.TrainConfig(), examples(1))
    weight = model.weight.clone()
    for column in range(0, 64, 7):
        with torch.no_grad():
            model.weight.copy_(weight)[:, column] += 1
        assert fingerprint(model, lora.TrainConfig(), examples(1)) != usual


def test_differences_name_what_was_and_what_is_and_count_the_rest():
    assert differences({"a": 1, "b": 2, "c": None}, {"a": 1, "b": 3, "d": [1]}) == [
        "b: 2 → 3",
        "c: None → absent",
        "d: absent → [1]",
    ]
    many = differences({str(i): i for i in range(30)}, {})
    assert len(many) == 21
    assert many[-1] == "… and 10 more"
