import copy
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import peft
import pytest
import torch
import transformers
from helpers import rms_error, tiny_config, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import minilora as lora
from minilora import phi3
from minilora.adapters.adapter_files import CONFIG, TENSORS, read_adapter_config

IDS = torch.arange(22).view(2, 11)
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]

# LoraConfigs of whole layers, which PEFT knows too, and of slices, which it does not.
WHOLE = {
    "list": {"target_modules": FUSED},
    "all-linear": {"target_modules": "all-linear"},
    "head": {"target_modules": ["lm_head", "model.layers.1.mlp.down_proj"]},
    "pattern": {"target_modules": r".*\.0\..*(o|down)_proj"},
    "rslora": {"target_modules": FUSED, "use_rslora": True},
    "patterns": {
        "target_modules": FUSED,
        "rank_pattern": {r"layers\.0\..*o_proj": 5, "down_proj": 2},
        "alpha_pattern": {"model.layers.1.mlp.down_proj": 3.5, "qkv_proj": 1},
    },
    "rslora and patterns": {"target_modules": FUSED, "use_rslora": True, "rank_pattern": {"1.mlp.down_proj": 7}},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["o_proj", "0.mlp.down_proj"]},
    "excluded by pattern": {"target_modules": r".*_proj", "exclude_modules": r".*\.1\..*"},
    "layers": {"target_modules": FUSED, "layers_to_transform": 1},
    "layers of a list": {"target_modules": FUSED, "layers_to_transform": [0], "layers_pattern": ["blocks", "layers"]},
    "modules to save": {"target_modules": ["o_proj"], "modules_to_save": ["lm_head", "norm"]},
    "lora_bias": {"target_modules": FUSED, "lora_bias": True},
    "lora_bias and rslora": {"target_modules": ["o_proj", "lm_head"], "lora_bias": True, "use_rslora": True},
    "embedding": {"target_modules": ["embed_tokens", "o_proj"], "rank_pattern": {"embed_tokens": 3}},
    "dora": {"target_modules": FUSED, "use_dora": True},
    "dora and patterns": {"target_modules": FUSED, "use_dora": True, "use_rslora": True, "rank_pattern": {"1.mlp.down_proj": 7}},
}
SLICED = {
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "gate": {"target_modules": ["gate_proj"]},
    "k and up with whole ones": {"target_modules": ["k_proj", "o_proj", "up_proj", "lm_head"]},
    "one slice of one layer": {"target_modules": ["model.layers.1.self_attn.v_proj"]},
    "every projection by name": {"target_modules": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "o_proj", "down_proj"]},
    "slices under rslora": {"target_modules": ["q_proj", "v_proj", "up_proj"], "use_rslora": True},
    "slices with patterns": {
        "target_modules": ["q_proj", "v_proj", "gate_proj", "o_proj"],
        "rank_pattern": {"0.self_attn.(q|v)_proj": 3, "o_proj": 4},
        "alpha_pattern": {"gate_proj": 5},
    },
    "slices with lora_bias": {"target_modules": ["k_proj", "up_proj", "o_proj"], "lora_bias": True},
    "slices with dora": {"target_modules": ["q_proj", "v_proj", "up_proj", "o_proj"], "use_dora": True},
}
# Layers that start from the weight come back as ordinary ones of twice the rank.
STARTED = {
    "pissa": {"target_modules": FUSED, "init_lora_weights": "pissa"},
    "olora": {"target_modules": FUSED, "init_lora_weights": "olora", "rank_pattern": {"o_proj": 2}, "alpha_pattern": {"down": 3}},
    "pissa and rslora": {"target_modules": ["o_proj", "lm_head"], "init_lora_weights": "pissa", "use_rslora": True},
}
SLICED_START = {"target_modules": ["q_proj", "v_proj", "up_proj"], "init_lora_weights": "pissa"}
named = pytest.mark.parametrize


def fresh(seed: int = 0, **fields):
    return tiny_model(tiny_config(**fields), seed)


def fill(parameters, seed: int = 1) -> None:
    """Values as after training: no factor is zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        nn.init.normal_(parameter, 0.0, 0.3, generator)


def adapted(seed: int = 1, dtype=torch.float32, **settings):
    """A tiny Phi-3 with an adapter that is not zero."""
    model = lora.inject(fresh(), lora.LoraConfig(**{"r": 4, "lora_alpha": 6} | settings), dtype)
    lora.mark_only_lora_as_trainable(model)
    fill([parameter for parameter in model.parameters() if parameter.requires_grad], seed)
    return model


def layers(model) -> dict[str, lora.Linear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, lora.Linear)}


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_adapter(actual, expected) -> None:
    """The same layers with bitwise the same factors and the same settings."""
    actual, expected = layers(actual), layers(expected)
    assert actual.keys() == expected.keys()
    for path, layer in actual.items():
        assert type(layer) is type(expected[path])
        for name in ("r", "lora_alpha", "lora_dropout", "scaling", "slices"):
            assert getattr(layer, name) == getattr(expected[path], name), (path, name)
        factors = {name: parameter for name, parameter in expected[path].named_parameters() if "lora_" in name}
        for name, wanted in factors.items():
            found = getattr(layer, name)
            assert found.dtype == wanted.dtype
            assert torch.equal(found, wanted), (path, name)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The base of every model here, as phi3.save writes it."""
    folder = tmp_path_factory.mktemp("base") / "model"
    phi3.save(fresh(), folder)
    return folder


@pytest.fixture
def hugging_face(checkpoint):
    return transformers.Phi3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


# There and back


@named("settings", (WHOLE | SLICED).values(), ids=WHOLE | SLICED)
def test_save_then_load_is_bitwise(tmp_path, settings):
    model = adapted(lora_dropout=0.25, **settings)
    lora.save_adapter(model, tmp_path / "adapter")
    loaded = fresh()
    assert lora.load_adapter(loaded, tmp_path / "adapter") is loaded
    assert_same_adapter(loaded, model)
    assert torch.equal(loaded(IDS), model(IDS))
    lora.save_adapter(loaded, tmp_path / "again")
    for name in (CONFIG, TENSORS):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


@named("settings", SLICED.values(), ids=SLICED)
def test_the_config_of_slices_comes_back_as_it_was(tmp_path, settings):
    model = adapted(**settings)
    lora.save_adapter(model, tmp_path / "adapter")
    assert read_adapter_config(tmp_path / "adapter") == model.lora_config


@named("settings", [WHOLE["patterns"], SLICED["q and v"]], ids=["whole", "sliced"])
def test_an_adapter_loads_into_a_model_that_has_its_layers(tmp_path, settings):
    source, target = adapted(seed=1, **settings), adapted(seed=2, **settings)
    lora.save_adapter(source, tmp_path / "adapter")
    assert not torch.equal(target(IDS), source(IDS))
    lora.load_adapter(target, tmp_path / "adapter")
    assert_same_adapter(target, source)


@named(("saved", "dtype", "loaded"), [
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float32, None, torch.float32),
])  # fmt: skip
def test_adapters_load_in_the_dtype_that_is_asked_for(tmp_path, saved, dtype, loaded):
    model = adapted(dtype=saved, target_modules=["o_proj", "q_proj"])
    lora.save_adapter(model, tmp_path / "adapter")
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter" / TENSORS).values()} == {saved}
    found = layers(lora.load_adapter(fresh(), tmp_path / "adapter", dtype))
    for path, layer in layers(model).items():
        assert found[path].lora_A.dtype == found[path].lora_B.dtype == loaded
        assert torch.equal(found[path].lora_A, layer.lora_A.to(loaded))
        assert torch.equal(found[path].lora_B, layer.lora_B.to(loaded))


@named("use_rslora", [False, True])
def test_layers_made_by_hand_are_saved_and_loaded_as_injected_ones(tmp_path, use_rslora):
    def network():
        settings = {"r": 2, "lora_alpha": 3, "use_rslora": use_rslora}
        return nn.Sequential(lora.Linear(6, 8, **settings), nn.ReLU(), lora.Linear(8, 4, **settings))

    source, target = network(), network()
    fill([source[0].lora_B, source[2].lora_B])
    lora.save_adapter(source, tmp_path / "adapter")
    lora.load_adapter(target, tmp_path / "adapter")
    assert_same_adapter(target, source)
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    assert [layer.scaling for layer in layers(lora.load_adapter(plain, tmp_path / "adapter")).values()] == [source[0].scaling] * 2


def test_fused_layers_made_by_hand_are_saved_and_loaded_too(tmp_path):
    def network():
        torch.manual_seed(0)
        return nn.Sequential(lora.MergedLinear(6, 9, r=2, lora_alpha=3, enable_lora=[True, False, True]))

    source, target = network(), network()
    fill([source[0].lora_B])
    lora.save_adapter(source, tmp_path / "adapter")
    lora.load_adapter(target, tmp_path / "adapter")
    assert_same_adapter(target, source)
    plain = nn.Sequential(nn.Linear(6, 9))
    plain.load_state_dict({name: tensor for name, tensor in source.state_dict().items() if "lora_" not in name})
    x = torch.randn(5, 6)
    assert rms_error(lora.load_adapter(plain, tmp_path / "adapter")(x), source(x)) < 1e-6


@named(("name", "values"), [("use_rslora", [False, True]), ("lora_dropout", [0.0, 0.1])])
def test_layers_that_no_one_config_describes_are_refused(tmp_path, name, values):
    model = nn.Sequential(*(lora.Linear(6, 6, r=2, **{name: value}) for value in values))
    with pytest.raises(ValueError, match=rf"must share {name}, and have \[{values[0]}, {values[1]}\]"):
        lora.save_adapter(model, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


class Nested(nn.Module):
    """A layer `fc` at the top, and others of the same name below."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.left = nn.ModuleDict({"fc": nn.Linear(4, 4)})
        self.right = nn.ModuleDict({"fc": nn.Linear(4, 4)})


@named("settings", [{"target_modules": "fc"}, {"rank_pattern": {"^fc": 2}}, {"alpha_pattern": {"^fc": 2}}])
def test_a_path_that_ends_another_is_not_mistaken_for_it(tmp_path, settings):
    model = lora.inject(Nested(), lora.LoraConfig(r=3, **settings))
    fill([parameter for name, parameter in model.named_parameters() if "lora_" in name])
    lora.save_adapter(model, tmp_path / "adapter")
    assert_same_adapter(lora.load_adapter(Nested(), tmp_path / "adapter"), model)


# PEFT


@named("settings", (WHOLE | SLICED).values(), ids=WHOLE | SLICED)
def test_peft_reads_our_adapter_as_the_same_function(tmp_path, hugging_face, settings):
    model = adapted(**settings)
    lora.save_adapter(model, tmp_path / "adapter")
    base = hugging_face(IDS).logits
    theirs = peft.PeftModel.from_pretrained(hugging_face, tmp_path / "adapter").eval()
    assert (theirs(IDS).logits - model(IDS)).abs().max() < 1e-5
    assert rms_error(model(IDS), base) > 0.05  # else an adapter that is ignored would pass


@named("settings", WHOLE.values(), ids=WHOLE)
def test_we_read_pefts_adapter_as_the_same_function(tmp_path, hugging_face, settings):
    base = hugging_face(IDS).logits
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, lora_dropout=0.1, **settings)
    theirs = peft.get_peft_model(hugging_face, config).eval()
    fill([parameter for parameter in theirs.parameters() if parameter.requires_grad])
    theirs.save_pretrained(tmp_path / "adapter")
    model = lora.load_adapter(fresh(), tmp_path / "adapter")
    assert (theirs(IDS).logits - model(IDS)).abs().max() < 1e-5
    assert rms_error(model(IDS), base) > 0.05
    assert {layer.lora_dropout for layer in layers(model).values()} == {0.1}
    lora.save_adapter(model, tmp_path / "again")
    assert_same_tensors(tmp_path / "again", tmp_path / "adapter")


def assert_same_tensors(folder: Path, expected: Path) -> None:
    """Bitwise, but for the frozen weights that PEFT writes along."""
    found, wanted = load_file(folder / TENSORS), load_file(expected / TENSORS)
    wanted = {name: tensor for name, tensor in wanted.items() if not name.endswith("base_layer.weight")}
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@named("settings", (WHOLE | SLICED).values(), ids=WHOLE | SLICED)
def test_what_peft_reads_of_ours_it_writes_again_as_it_was(tmp_path, hugging_face, settings):
    lora.save_adapter(adapted(**settings), tmp_path / "adapter")
    peft.PeftModel.from_pretrained(hugging_face, tmp_path / "adapter").save_pretrained(tmp_path / "again")
    found, wanted = load_file(tmp_path / "again" / TENSORS), load_file(tmp_path / "adapter" / TENSORS)
    assert wanted.keys() <= found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


# PiSSA and OLoRA


@named("settings", [*STARTED.values(), SLICED_START], ids=[*STARTED, "slices"])
def test_a_start_from_the_weight_is_saved_as_an_ordinary_adapter_of_the_unchanged_base(tmp_path, hugging_face, settings):
    model = adapted(**settings)
    lora.save_adapter(model, tmp_path / "adapter")
    base = hugging_face(IDS).logits
    theirs = peft.PeftModel.from_pretrained(hugging_face, tmp_path / "adapter").eval()
    assert theirs.peft_config["default"].init_lora_weights is True
    assert rms_error(theirs(IDS).logits, model(IDS)) < 1e-5
    assert rms_error(model(IDS), base) > 0.05
    loaded = lora.load_adapter(fresh(), tmp_path / "adapter")
    assert rms_error(loaded(IDS), model(IDS)) < 1e-5
    lora.save_adapter(loaded, tmp_path / "again")
    assert (tmp_path / "again" / TENSORS).read_bytes() == (tmp_path / "adapter" / TENSORS).read_bytes()


@named("settings", STARTED.values(), ids=STARTED)
def test_pefts_adapter_of_a_base_without_its_start_becomes_one_of_the_whole_base(tmp_path, hugging_face, settings):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, lora_dropout=0.1, **settings)
    theirs = peft.get_peft_model(hugging_face, config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:  # near its start, as after training
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    loaded = lora.load_adapter(fresh(), tmp_path / "adapter")
    assert rms_error(loaded(IDS), theirs(IDS).logits) < 1e-5
    assert rms_error(loaded(IDS), fresh()(IDS)) > 0.05


# Tied heads


@named(
    "settings",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["o_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ],
)
def test_tied_heads_travel_both_ways_as_the_same_function(tmp_path, settings):
    phi3.save(fresh(tie_word_embeddings=True), tmp_path / "base")

    def base():
        return transformers.Phi3ForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()

    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **settings)
    theirs = peft.get_peft_model(base(), config).eval()
    fill([parameter for parameter in theirs.parameters() if parameter.requires_grad])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lora.load_adapter(fresh(tie_word_embeddings=True), tmp_path / "theirs")
    assert rms_error(ours(IDS), theirs(IDS).logits) < 1e-5
    lora.save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    assert rms_error(again(IDS).logits, ours(IDS)) < 1e-5
    assert rms_error(ours(IDS), fresh(tie_word_embeddings=True)(IDS)) > 0.05
    lora.remove(ours)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


# Convolutions


class Convolutions(nn.Module):
    """A net of every kind of convolution, with stride and padding. (PEFT forgets dilation and fails on it.)"""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.flat = nn.Conv1d(4, 6, 3, padding=1)
        self.image = nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=1)
        self.volume = nn.Conv3d(2, 4, 2, bias=False)

    def forward(self, flat, image, volume):
        return torch.cat([self.flat(flat).flatten(), self.image(image).flatten(), self.volume(volume).flatten()])


@named("settings", [{}, {"use_rslora": True, "rank_pattern": {"image": 4}, "alpha_pattern": {"volume": 2}}])
def test_convolutions_travel_both_ways_as_the_same_function(tmp_path, settings):
    settings = {"r": 2, "lora_alpha": 3, "target_modules": ["flat", "image", "volume"]} | settings
    x = torch.randn(1, 4, 7), torch.randn(1, 3, 9, 8), torch.randn(1, 2, 4, 5, 3)
    theirs = peft.get_peft_model(Convolutions(), peft.LoraConfig(**settings))
    fill([parameter for parameter in theirs.parameters() if parameter.requires_grad])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lora.load_adapter(Convolutions(), tmp_path / "theirs")
    assert rms_error(ours(*x), theirs(*x)) < 1e-6
    assert rms_error(ours(*x), Convolutions()(*x)) > 0.05
    lora.save_adapter(ours, tmp_path / "ours")
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")
    again = peft.PeftModel.from_pretrained(Convolutions(), tmp_path / "ours")
    assert rms_error(again(*x), ours(*x)) < 1e-6


# Weights stored as (in, out)


@named("settings", [{}, {"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}])
def test_gpt2s_transposed_layers_travel_both_ways_as_the_same_function(tmp_path, settings):
    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    base, ids = transformers.GPT2LMHeadModel(config).eval(), torch.arange(14).view(2, 7)
    before = base(ids).logits
    settings = {"r": 2, "lora_alpha": 3, "target_modules": ["c_attn", "c_fc"]} | settings
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings))
    fill([parameter for parameter in theirs.parameters() if parameter.requires_grad])
    theirs.save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / CONFIG).read_text())["fan_in_fan_out"] is True
    ours = lora.load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    assert rms_error(ours(ids).logits, theirs(ids).logits) < 1e-5
    assert rms_error(ours(ids).logits, before) > 0.05
    lora.save_adapter(ours, tmp_path / "ours")
    if "init_lora_weights" not in settings:
        assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    assert rms_error(again(ids).logits, ours(ids).logits) < 1e-5
    if not settings.get("lora_bias"):
        expected = ours(ids).logits
        lora.merge(ours)
        assert rms_error(ours(ids).logits, expected) < 1e-5
        lora.unmerge(ours)
    assert torch.equal(lora.remove(ours)(ids).logits, before)


# Biases


class Biased(nn.Module):
    """Two layers with biases, and a norm with one between them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


@named("lora_bias", [False, True])
@named("modules_to_save", [None, ["last"]])
@named("bias", ["all", "lora_only"])
def test_trained_biases_travel_to_peft_and_back(tmp_path, bias, modules_to_save, lora_bias):
    settings = {"target_modules": ["first"], "bias": bias, "modules_to_save": modules_to_save, "lora_bias": lora_bias}
    ours, x = lora.inject(Biased(), lora.LoraConfig(r=2, **settings)), torch.randn(5, 6)
    lora.mark_only_lora_as_trainable(ours)
    fill([parameter for parameter in ours.parameters() if parameter.requires_grad])
    lora.save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(Biased(), tmp_path / "ours")
    assert rms_error(theirs(x), ours(x)) < 1e-6
    assert rms_error(ours(x), Biased()(x)) > 0.05
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = lora.load_adapter(Biased(), tmp_path / "theirs")
    assert rms_error(loaded(x), ours(x)) < 1e-6
    lora.save_adapter(loaded, tmp_path / "again")
    assert_same_tensors(tmp_path / "again", tmp_path / "ours")


def test_biases_that_are_not_trained_are_not_saved(tmp_path):
    lora.save_adapter(lora.inject(Biased(), lora.LoraConfig(r=2)), tmp_path / "adapter")
    assert not any("bias" in name for name in load_file(tmp_path / "adapter" / TENSORS))


def test_an_adapter_of_another_head_is_refused(tmp_path, hugging_face):
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"])
    peft.get_peft_model(hugging_face, config).save_pretrained(tmp_path / "adapter")  # PEFT saves the frozen head along
    lora.load_adapter(fresh(), tmp_path / "adapter")
    other = fresh()
    with torch.no_grad():
        other.lm_head.weight[7, 7] += 1
    assert_refused(other, tmp_path / "adapter", "was trained with another lm_head.weight")


# What lies on disk


def test_the_config_is_sorted_json_with_pefts_keys(tmp_path):
    lora.save_adapter(adapted(target_modules=FUSED, lora_dropout=0.05, use_rslora=True), tmp_path / "adapter", base="some/base")
    text = (tmp_path / "adapter" / CONFIG).read_text(encoding="utf-8")
    raw = json.loads(text)
    assert text == json.dumps(raw, indent=2, sort_keys=True) + "\n"
    assert raw == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/base",
        "inference_mode": True,
        "init_lora_weights": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "r": 4,
        "lora_alpha": 6,
        "lora_dropout": 0.05,
        "use_rslora": True,
        "use_dora": False,
        "lora_bias": False,
        "ensure_weight_tying": False,
        "target_modules": sorted(FUSED),
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def test_the_config_of_slices_names_the_fused_layers_and_the_tensors_keep_ours(tmp_path, recwarn):
    model = adapted(target_modules=["q_proj", "v_proj", "gate_proj"])
    lora.save_adapter(model, tmp_path / "adapter")
    raw = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert raw["target_modules"] == ["gate_up_proj", "qkv_proj"]
    peft.PeftConfig.from_pretrained(tmp_path / "adapter")  # warns of every key that it does not know
    assert not [warning for warning in recwarn if "keyword" in str(warning.message)]
    with safe_open(tmp_path / "adapter" / TENSORS, framework="pt") as file:
        assert {key: json.loads(text) for key, text in file.metadata().items()} == {"minilora": asdict(model.lora_config)}


def test_an_adapter_whose_config_holds_the_slices_is_read_as_before(tmp_path):
    model = adapted(target_modules=["q_proj", "v_proj"])
    folder = tmp_path / "adapter"
    lora.save_adapter(model, folder)
    raw = json.loads((folder / CONFIG).read_text()) | {"minilora": asdict(model.lora_config)}
    (folder / CONFIG).write_text(json.dumps(raw))
    save_file(load_file(folder / TENSORS), folder / TENSORS, metadata={"format": "pt"})
    assert read_adapter_config(folder) == model.lora_config
    assert_same_adapter(lora.load_adapter(fresh(), folder), model)


def test_layers_are_named_by_path_where_their_name_would_mean_others(tmp_path):
    lora.save_adapter(adapted(target_modules=["model.layers.1.self_attn.o_proj"]), tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["target_modules"] == ["model.layers.1.self_attn.o_proj"]


def test_tensors_have_pefts_names_and_fused_slices_zeros_elsewhere(tmp_path):
    model = adapted(target_modules=["q_proj", "v_proj", "o_proj"])
    lora.save_adapter(model, tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [CONFIG, TENSORS]
    tensors = load_file(tmp_path / "adapter" / TENSORS)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {}
    for i in range(2):
        prefix = f"base_model.model.model.layers.{i}.self_attn"
        expected |= {f"{prefix}.qkv_proj.lora_A.weight": (8, 32), f"{prefix}.qkv_proj.lora_B.weight": (64, 8)}
        expected |= {f"{prefix}.o_proj.lora_A.weight": (4, 32), f"{prefix}.o_proj.lora_B.weight": (32, 4)}
    assert shapes == expected
    B = tensors["base_model.model.model.layers.0.self_attn.qkv_proj.lora_B.weight"]
    q, v = model.model.layers[0].self_attn.qkv_proj.lora_B.split([32, 16])
    zero = torch.zeros(64, 8)
    zero[:32, :4], zero[48:, 4:] = q.detach(), v.detach()
    assert torch.equal(B, zero)


def test_others_may_read_what_is_saved(tmp_path):
    earlier = os.umask(0o022)
    try:
        lora.save_adapter(adapted(target_modules=["o_proj"]), tmp_path / "adapter")
    finally:
        os.umask(earlier)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in [tmp_path / "adapter", *(tmp_path / "adapter").iterdir()]}
    assert modes == {"adapter": "0o755", CONFIG: "0o644", TENSORS: "0o644"}


# Saving


def test_a_later_adapter_replaces_the_earlier_one(tmp_path):
    lora.save_adapter(adapted(target_modules=["o_proj"]), tmp_path / "adapter")
    later = adapted(target_modules=["down_proj"], seed=2)
    lora.save_adapter(later, tmp_path / "adapter")
    assert_same_adapter(lora.load_adapter(fresh(), tmp_path / "adapter"), later)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_folder_that_holds_other_files_is_never_replaced(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("years")
    with pytest.raises(FileExistsError, match=r"thesis\.txt"):
        lora.save_adapter(adapted(target_modules=["o_proj"]), tmp_path / "work")
    assert (tmp_path / "work" / "thesis.txt").read_text() == "years"


def test_a_model_without_adapter_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="the model has no adapter to save"):
        lora.save_adapter(fresh(), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


@named("poison", [torch.nan, -torch.inf])
def test_an_adapter_that_is_not_finite_is_refused_and_the_earlier_one_stays(tmp_path, poison):
    model = adapted(target_modules=["o_proj", "q_proj"])
    lora.save_adapter(model, tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.lora_A[0, 0] = poison
        model.model.layers[1].self_attn.qkv_proj.lora_B[-1, -1] = poison
    with pytest.raises(ValueError, match=r"layers\.0\.\w+\.o_proj\.lora_A\.weight, .*layers\.1\.\w+\.qkv_proj\.lora_B\.weight$"):
        lora.save_adapter(model, tmp_path / "adapter")
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before


FULL_DISK = """
import resource, sys
from pathlib import Path
import minilora as lora
from torch import nn

def model(width):
    return lora.inject(nn.Sequential(nn.Linear(width, width)), lora.LoraConfig(r=1))

folder, width, base = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
lora.save_adapter(model(4), folder)
resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))  # no file may grow longer
try:
    lora.save_adapter(model(width), folder, base)
except OSError as error:
    print("OSError", error)
"""


@named(("width", "base"), [(1000, ""), (4, "x" * 5000)], ids=["tensors", "config"])
def test_a_disk_that_fills_leaves_the_earlier_adapter_whole(tmp_path, width, base):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "adapter"), str(width), base]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stdout.startswith("OSError")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [CONFIG, TENSORS]
    model = lora.load_adapter(nn.Sequential(nn.Linear(4, 4)), tmp_path / "adapter")
    assert model[0].lora_A.shape == (1, 4)


# Adapters that are refused


def write(folder: Path, settings: dict | None = None, tensors: dict | None = None) -> Path:
    """An adapter of o_proj with keys of its config or its tensors replaced; a tensor None is left out."""
    lora.save_adapter(adapted(target_modules=["o_proj"]), folder)
    if settings is not None:
        (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | settings))
    if tensors is not None:
        found = load_file(folder / TENSORS) | tensors
        save_file({name: tensor for name, tensor in found.items() if tensor is not None}, folder / TENSORS)
    return folder


def assert_refused(model, folder, *messages, error=ValueError):
    """Loading fails with all messages, and the model is what it was."""
    before, modules = state(model), list(model.modules())
    with pytest.raises(error) as refused:
        lora.load_adapter(model, folder)
    for message in messages:
        assert message in str(refused.value)
    assert list(model.modules()) == modules
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@named(
    ("key", "value"),
    [
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "eva"),
        ("layer_replication", [[0, 1]]),
        ("target_parameters", ["weight"]),
        ("trainable_token_indices", [3]),
        ("use_qalora", True),
        ("a_key_of_the_future", 3),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, key, value):
    folder = write(tmp_path / "adapter", {key: value})
    assert_refused(fresh(), folder, f"asks for what is not supported: {key} = {value!r}")


def test_everything_not_supported_is_named_at_once(tmp_path):
    folder = write(tmp_path / "adapter", {"use_qalora": True, "init_lora_weights": "loftq", "target_parameters": ["w"]})
    assert_refused(fresh(), folder, "use_qalora = True", "init_lora_weights = 'loftq'", "target_parameters = ['w']")


@named("kind", ["IA3", "lora", None])
def test_another_kind_of_adapter_is_refused(tmp_path, kind):
    assert_refused(fresh(), write(tmp_path / "adapter", {"peft_type": kind}), CONFIG, '"peft_type": "LORA"')


@named("content", [b"{", b"", b"\xff\xfe", b'{"peft_type": "LORA",}'])
def test_a_broken_config_is_refused_by_name(tmp_path, content):
    folder = write(tmp_path / "adapter")
    (folder / CONFIG).write_bytes(content)
    assert_refused(fresh(), folder, f"{folder / CONFIG} must be JSON")


@named("content", ["[]", "3", "null", '"LORA"'])
def test_a_config_that_is_no_object_is_refused(tmp_path, content):
    folder = write(tmp_path / "adapter")
    (folder / CONFIG).write_text(content)
    assert_refused(fresh(), folder, f"{folder / CONFIG} must be a JSON object")


@named(
    ("key", "value"),
    [
        ("r", "8"),
        ("r", 4.0),
        ("r", 0),
        ("lora_alpha", "6"),
        ("lora_alpha", float("inf")),
        ("lora_dropout", 1.5),
        ("lora_dropout", "no"),
        ("target_modules", 5),
        ("target_modules", [5]),
        ("target_modules", "("),
        ("rank_pattern", [4]),
        ("rank_pattern", {"o_proj": "4"}),
        ("alpha_pattern", {"o_proj": None}),
        ("minilora", 5),
        ("minilora", {"rank": 4}),
    ],
)
def test_a_config_with_a_senseless_value_is_refused_by_name(tmp_path, key, value):
    folder = write(tmp_path / "adapter", {key: value})
    named_key = "rank" if value == {"rank": 4} else key
    with pytest.raises(ValueError, match=rf"{re.escape(str(folder))}.*\b{named_key}\b"):
        lora.load_adapter(fresh(), folder)
    with pytest.raises(ValueError, match=rf"\b{named_key}\b"):
        read_adapter_config(folder)


def test_missing_files_are_named(tmp_path):
    assert_refused(fresh(), tmp_path / "absent", "absent", CONFIG, error=FileNotFoundError)
    folder = write(tmp_path / "adapter")
    (folder / TENSORS).rename(folder / "adapter_model.bin")
    assert_refused(fresh(), folder, f"must hold {TENSORS}", "never loaded", error=FileNotFoundError)


@named("kept", [0, 4, 8, 100, -4, -1])
def test_truncated_tensors_are_refused(tmp_path, kept):
    folder = write(tmp_path / "adapter")
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:kept])
    assert_refused(fresh(), folder, f"{folder / TENSORS} is truncated or not a safetensors file")


O_PROJ = "model.layers.{}.self_attn.o_proj"


def test_missing_extra_misshapen_and_poisoned_tensors_are_all_named_at_once(tmp_path):
    first, second = (f"base_model.model.{O_PROJ.format(i)}" for i in range(2))
    folder = write(
        tmp_path / "adapter",
        tensors={
            f"{first}.lora_A.weight": None,
            f"{first}.lora_B.weight": torch.full((32, 4), torch.nan),
            f"{second}.lora_A.weight": torch.zeros(4, 31),
            "base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32),
            "base_model.model.lm_head.weight": torch.zeros(260, 32),
        },
    )
    faults = [
        f"the adapter in {folder} does not fit the model",
        f"{O_PROJ.format(0)}.lora_A.weight is missing",
        f"{O_PROJ.format(0)}.lora_B.weight holds NaN or infinity",
        f"{O_PROJ.format(1)}.lora_A.weight must have shape (4, 32), not (4, 31)",
        "lm_head.lora_A.weight is not part of the adapted model",
        "lm_head.weight is not part of the adapted model",
    ]
    for model in (fresh(), adapted(seed=2, target_modules=["o_proj"])):
        assert_refused(model, folder, *faults)


def test_an_adapter_of_another_shape_of_model_is_refused(tmp_path):
    folder = write(tmp_path / "adapter")
    assert_refused(fresh(hidden_size=64), folder, f"{O_PROJ.format(1)}.lora_A.weight must have shape (4, 64), not (4, 32)")
    assert_refused(fresh(num_hidden_layers=1), folder, f"{O_PROJ.format(1)}.lora_A.weight is not part of the adapted model")
    assert_refused(fresh(num_hidden_layers=3), folder, f"{O_PROJ.format(2)}.lora_B.weight is missing")
    assert_refused(nn.Sequential(nn.Linear(3, 3)), folder, "match no linear layer")


def test_an_adapter_that_an_injected_model_cannot_take_is_refused(tmp_path):
    folder = write(tmp_path / "adapter")
    name = O_PROJ.format(0)
    assert_refused(
        adapted(seed=2, r=3, target_modules=["o_proj"]), folder, f"{name}.lora_A.weight must have shape (3, 32), not (4, 32)"
    )
    other = adapted(seed=2, target_modules=["down_proj"])
    assert_refused(other, folder, f"{name}.lora_A.weight is not part of", "model.layers.0.mlp.down_proj.lora_A.weight is missing")
    other = adapted(seed=2, lora_alpha=7, target_modules=["o_proj"])
    assert_refused(other, folder, f"{name} is scaled by 1.5 in the file and by 1.75 in the model")
    other = adapted(seed=2, use_rslora=True, target_modules=["o_proj"])
    assert_refused(other, folder, f"{name} is scaled by 1.5 in the file and by 3.0 in the model")


def test_slices_refuse_an_adapter_that_reaches_further(tmp_path):
    lora.save_adapter(adapted(r=8, lora_alpha=12, target_modules=["qkv_proj"]), tmp_path / "adapter")
    model = adapted(seed=2, target_modules=["q_proj", "v_proj"])
    assert_refused(
        model, tmp_path / "adapter", "qkv_proj.lora_B.weight reaches outputs that the model's adapter, by slices, does not"
    )


def test_a_merged_model_is_refused_until_unmerged(tmp_path):
    folder, model = write(tmp_path / "adapter"), adapted(seed=2, target_modules=["o_proj"])
    lora.merge(model)
    assert_refused(model, folder, f"unmerge it first: {O_PROJ.format(0)}, {O_PROJ.format(1)}")
    lora.unmerge(model)
    lora.load_adapter(model, folder)


def test_convolutions_that_are_not_pefts_are_refused(tmp_path):
    message = "hold no convolutions with groups or with loralib's factors: load and save 0 with lora_state_dict"
    grouped = lora.inject(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), lora.LoraConfig(r=2, target_modules=["0"]))
    for model in (nn.Sequential(lora.Conv2d(3, 4, 3, r=2)), grouped):
        with pytest.raises(ValueError, match=message):
            lora.save_adapter(model, tmp_path / "adapter")
    theirs = peft.get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), peft.LoraConfig(r=2, target_modules=["0"]))
    theirs.save_pretrained(tmp_path / "theirs")
    assert_refused(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), tmp_path / "theirs", message)
