"""What adapter_config.json says; tests/test_adapters_adapter_files.py holds both files to PEFT."""

import json
from dataclasses import fields

import peft
import pytest
from torch import nn

import minilora as lora
from minilora.adapters.peft_config import CONFIG, WITHOUT_EFFECT, make_peft_config, read_peft_config


def written(folder, **settings):
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "target_modules": ["o_proj"]} | settings))
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {"exclude_modules": ["0.o_proj"], "layers_to_transform": [1, 2], "layers_pattern": ["layers"]},
        {"bias": "all", "modules_to_save": ["lm_head"], "lora_bias": True},
        {"use_dora": True, "use_rslora": True, "rank_pattern": {"o_proj": 3}, "alpha_pattern": {"o_proj": 2.5}},
        {"init_lora_weights": "pissa"},
    ],
)
def test_what_peft_saves_is_read_field_by_field(tmp_path, settings):
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["o_proj", "down_proj"], base_model_name_or_path="a/b", **settings)
    config.save_pretrained(tmp_path)
    found = read_peft_config(tmp_path)
    assert found.base == "a/b"
    assert sorted(found.lora.target_modules) == ["down_proj", "o_proj"]
    for name, value in ({"r": 4, "lora_alpha": 6} | settings).items():
        read = getattr(found.lora, name)
        assert (sorted(read) if name == "exclude_modules" else read) == value, name


def test_every_default_of_peft_asks_for_nothing(tmp_path):
    peft.LoraConfig(target_modules=["o_proj"]).save_pretrained(tmp_path)
    assert read_peft_config(tmp_path).lora == lora.LoraConfig(target_modules=["o_proj"], ensure_weight_tying=False)


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "orthogonal"])
def test_how_factors_began_says_nothing_of_a_trained_adapter(tmp_path, start):
    assert read_peft_config(written(tmp_path, init_lora_weights=start)).lora.init_lora_weights is True


def test_a_start_in_the_base_is_told(tmp_path):
    found = read_peft_config(written(tmp_path, init_lora_weights="olora", lora_dropout=0.1)).lora
    assert (found.init_lora_weights, found.lora_dropout) == ("olora", 0.0)


def test_peft_reads_what_is_made(tmp_path):
    model = lora.inject(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), lora.LoraConfig(r=2, rank_pattern={"1": 3}, lora_bias=True)
    )
    raw = make_peft_config(model, {path: module for path, module in model.named_modules() if path}, "some/base")
    (tmp_path / CONFIG).write_text(json.dumps(raw))
    found = peft.PeftConfig.from_pretrained(tmp_path)
    assert (found.r, found.rank_pattern, found.lora_bias, found.target_modules) == (2, {"1": 3}, True, {"0", "1"})
    assert found.base_model_name_or_path == "some/base"


@pytest.mark.parametrize("model", [nn.Sequential(nn.Linear(4, 4)), nn.ModuleDict({"lm_head": nn.Linear(4, 4)})])
def test_only_a_model_with_a_vocabulary_head_is_called_a_language_model(model):
    """PEFT asks one for prepare_inputs_for_generation."""
    lora.inject(model, lora.LoraConfig(target_modules=".*"))
    (path,) = (path for path, module in model.named_modules() if isinstance(module, lora.Linear))
    task = make_peft_config(model, {path: model.get_submodule(path)}, None)["task_type"]
    assert task == ("CAUSAL_LM" if path == "lm_head" else None)


READ = {field.name for field in fields(lora.LoraConfig)} | WITHOUT_EFFECT


@pytest.mark.parametrize("name", sorted({field.name for field in fields(peft.LoraConfig)} - READ))
def test_every_other_field_of_peft_is_refused_by_name(tmp_path, name):
    with pytest.raises(ValueError, match=f"asks for what is not supported: {name} = "):
        read_peft_config(written(tmp_path, **{name: {"a": 1}}))


@pytest.mark.parametrize("start", ["loftq", "pissa_niter_4", "corda", "eva", "lora_ga", "mica"])
def test_a_start_that_changes_the_base_and_cannot_be_found_again_is_refused_by_name(tmp_path, start):
    with pytest.raises(ValueError, match=f"asks for what is not supported: init_lora_weights = '{start}'"):
        read_peft_config(written(tmp_path, init_lora_weights=start))
