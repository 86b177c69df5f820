import re

import peft
import pytest
import torch
import transformers
from helpers import tiny_config, tiny_model
from peft.tuners.lora import LoraLayer

import minilora as lora
from minilora.injection import find_targets
from minilora.phi3 import Phi3Config, Phi3ForCausalLM
from minilora.trainable import count_parameters

FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
COOKBOOK = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # the Phi-3 cookbook's own list


@pytest.fixture
def model():
    return tiny_model(tiny_config())


def hugging_face():
    """transformers' Phi-3 in the shape of the tiny model."""
    config = tiny_config()
    fields = {name: value for name, value in vars(config).items() if value is not None}
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**fields))


def adapters(model) -> dict[str, lora.Linear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, lora.Linear)}


def assert_refused_unchanged(model, config, *messages):
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=re.escape(messages[0])) as refused:
        lora.inject(model, config)
    for message in messages:
        assert message in str(refused.value)
    after = dict(model.named_modules())
    assert before.keys() == after.keys()
    assert all(after[path] is module for path, module in before.items())


# PEFT's rules


@pytest.mark.parametrize(
    "target_modules",
    [
        ["o_proj"],
        FUSED,
        ["lm_head"],
        ["model.layers.0.mlp.down_proj"],
        ["1.self_attn.o_proj", "mlp.gate_up_proj"],
        r".*\.1\..*_proj",
        r"model\.layers\.0\.self_attn\.(qkv|o)_proj",
        r".*(lm_head|o_proj)",
        "all-linear",
    ],
)
def test_the_same_modules_are_adapted_as_by_peft(model, target_modules):
    config = peft.LoraConfig(r=2, target_modules=target_modules, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(hugging_face(), config)
    theirs = {path.removeprefix("base_model.model.") for path, module in theirs.named_modules() if isinstance(module, LoraLayer)}
    for base in (model, hugging_face()):  # adapters go into any model: transformers' own takes them too
        assert adapters(lora.inject(base, lora.LoraConfig(r=2, target_modules=target_modules))).keys() == theirs


@pytest.mark.parametrize("target_modules", [["proj"], "o_proj", r".*o_pro", ["o_proj."], ["Lm_head"]])
def test_what_peft_finds_nowhere_is_found_nowhere(model, target_modules):
    with pytest.raises(ValueError, match="not found in the base model"):
        peft.get_peft_model(hugging_face(), peft.LoraConfig(r=2, target_modules=target_modules))
    assert_refused_unchanged(model, lora.LoraConfig(target_modules=target_modules), "match no linear layer")


def test_each_layer_gets_the_rank_and_scaling_that_peft_gives_it(model):
    patterns = {"rank_pattern": {"layers.0.self_attn.o_proj": 4, ".*mlp.*": 6}, "alpha_pattern": {"o_proj": 3}}
    theirs = peft.LoraConfig(r=2, lora_alpha=5, target_modules="all-linear", use_rslora=True, task_type="CAUSAL_LM", **patterns)
    theirs = peft.get_peft_model(hugging_face(), theirs)
    lora.inject(model, lora.LoraConfig(r=2, lora_alpha=5, use_rslora=True, **patterns))
    for path, layer in adapters(model).items():
        other = theirs.get_submodule(f"base_model.model.{path}")
        assert layer.r == other.r["default"]
        assert layer.scaling == other.scaling["default"]


# Slices of fused layers

SLICES = {
    "q_proj": ("self_attn.qkv_proj", (0, 32)),
    "k_proj": ("self_attn.qkv_proj", (32, 48)),
    "v_proj": ("self_attn.qkv_proj", (48, 64)),
    "gate_proj": ("mlp.gate_up_proj", (0, 48)),
    "up_proj": ("mlp.gate_up_proj", (48, 96)),
}


@pytest.mark.parametrize("names", [["q_proj"], ["v_proj", "q_proj"], ["k_proj"], ["gate_proj"], ["up_proj", "k_proj"]])
def test_a_slices_adapter_moves_its_own_outputs_and_no_others(model, names):
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    before = {path: module(x) for path, module in model.named_modules() if path.endswith(("qkv_proj", "gate_up_proj"))}
    lora.inject(model, lora.LoraConfig(r=2, target_modules=names))
    assert adapters(model).keys() == {f"model.layers.{i}.{SLICES[name][0]}" for i in range(2) for name in names}
    for path, layer in adapters(model).items():
        torch.nn.init.normal_(layer.lora_B)
        moved = (layer(x) != before[path]).all(dim=0)
        expected = torch.zeros_like(moved)
        for fused, (start, stop) in (SLICES[name] for name in names):
            if path.endswith(fused):
                expected[start:stop] = True
        assert torch.equal(moved, expected)


def test_the_cookbooks_list_reaches_every_projection(model):
    lora.inject(model, lora.LoraConfig(target_modules=COOKBOOK))
    layers = adapters(model)
    assert len(layers) == 2 * 4
    assert all(sum(stop - start for start, stop in layer.slices) == layer.out_features for layer in layers.values())


def test_slices_can_be_named_by_path_and_by_pattern(model):
    lora.inject(model, lora.LoraConfig(target_modules=["model.layers.1.self_attn.q_proj"]))
    assert {path: layer.enable_lora for path, layer in adapters(model).items()} == {
        "model.layers.1.self_attn.qkv_proj": [True, False, False]
    }
    model = tiny_model(tiny_config())
    lora.inject(model, lora.LoraConfig(target_modules=r".*\.0\..*\.(q|v)_proj"))
    assert {path: layer.enable_lora for path, layer in adapters(model).items()} == {
        "model.layers.0.self_attn.qkv_proj": [True, False, True]
    }


def test_a_pattern_that_fits_a_fused_layer_means_the_whole_of_it(model):
    lora.inject(model, lora.LoraConfig(target_modules=r".*_proj"))
    assert not any(isinstance(layer, lora.MergedLinear) for layer in adapters(model).values())


def test_a_slice_takes_the_rank_of_its_own_name(model):
    ranks = {"rank_pattern": {"q_proj": 3, "v_proj": 3}, "alpha_pattern": {"q_proj": 6, "v_proj": 6}}
    lora.inject(model, lora.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"], **ranks))
    found = {path.rpartition(".")[2]: (layer.r, layer.lora_alpha) for path, layer in adapters(model).items()}
    assert found == {"qkv_proj": (3, 6), "gate_up_proj": (2, 8)}


# What is refused


def test_a_name_that_matches_nothing_is_answered_with_what_there_is(model):
    assert_refused_unchanged(
        model,
        lora.LoraConfig(target_modules=["o_proj", "query", "mlp"]),
        "target_modules ['mlp', 'query'] match no linear layer, embedding or convolution",
        "embed_tokens, qkv_proj (q_proj, k_proj, v_proj), o_proj, gate_up_proj (gate_proj, up_proj), down_proj, lm_head",
    )


def test_a_layer_named_whole_and_by_slice_is_refused(model):
    assert_refused_unchanged(
        model, lora.LoraConfig(target_modules=["qkv_proj", "q_proj"]), "qkv_proj is named whole and by its slices q_proj"
    )


@pytest.mark.parametrize("pattern", [{"rank_pattern": {"v_proj": 4}}, {"alpha_pattern": {"q_proj": 4}}])
def test_slices_of_one_layer_with_unlike_settings_are_refused(model, pattern):
    config = lora.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"], **pattern)
    assert_refused_unchanged(model, config, "the slices q_proj, v_proj of model.layers.0.self_attn.qkv_proj must share one r")


def test_all_faults_are_named_at_once(model):
    names = ["gate_up_proj", "up_proj", "nonsense", "q_proj", "v_proj"]
    config = lora.LoraConfig(r=2, target_modules=names, rank_pattern={"v_proj": 4})
    assert_refused_unchanged(model, config, "named whole and by its slices up_proj", "must share one r", "['nonsense'] match no")


def test_a_second_injection_of_one_name_is_refused(model):
    lora.inject(model, lora.LoraConfig(target_modules=["o_proj"]))
    assert_refused_unchanged(model, lora.LoraConfig(target_modules=["down_proj"]), "has an adapter 'default' already")
    assert model.lora_config.target_modules == ["o_proj"]


def test_injection_into_a_model_made_with_adapters_is_refused():
    model = torch.nn.Sequential(lora.Linear(4, 4, r=2), torch.nn.Linear(4, 4))
    assert_refused_unchanged(model, lora.LoraConfig(target_modules=["1"]), "made with adapters already")


# What stays and what comes


@pytest.mark.parametrize("target_modules", [FUSED, COOKBOOK, "all-linear", ["v_proj", "lm_head"]])
def test_injection_keeps_the_models_parameters_and_outputs(model, target_modules):
    before = dict(model.named_parameters())
    ids = torch.arange(12).view(2, 6)
    logits = model(ids)
    assert lora.inject(model, lora.LoraConfig(target_modules=target_modules)) is model
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert {name.rpartition(".")[2] for name in after.keys() - before.keys()} == {"lora_A", "lora_B"}
    assert torch.equal(model(ids), logits)


@pytest.mark.parametrize(("dtype", "expected"), [({}, torch.float32), ({"dtype": None}, torch.bfloat16)])
def test_adapters_are_float32_unless_the_weights_own_dtype_is_asked_for(model, dtype, expected):
    lora.inject(model.bfloat16(), lora.LoraConfig(target_modules=["q_proj", "o_proj"]), **dtype)
    assert {parameter.dtype for name, parameter in model.named_parameters() if "lora_" in name} == {expected}
    assert {parameter.dtype for name, parameter in model.named_parameters() if "lora_" not in name} == {torch.bfloat16}


def test_layers_keep_the_mode_of_those_that_they_replace(model):
    for training in (True, False):
        model = tiny_model(tiny_config()).train(training)
        lora.inject(model, lora.LoraConfig())
        assert {module.training for module in model.modules()} == {training}


def test_settings_reach_every_layer(model):
    lora.inject(model, lora.LoraConfig(r=3, lora_alpha=9, lora_dropout=0.25, target_modules=COOKBOOK))
    for layer in adapters(model).values():
        assert (layer.r, layer.lora_alpha, layer.lora_dropout, layer.scaling) == (3, 9, 0.25, 3.0)


@pytest.mark.parametrize("target_modules", [FUSED, COOKBOOK, ["q_proj", "v_proj"], ["gate_proj", "lm_head"]])
def test_targets_foretell_the_number_of_new_parameters(model, target_modules):
    config = lora.LoraConfig(r=3, target_modules=target_modules, rank_pattern={"lm_head": 5})
    foretold = sum(target.parameters for target in find_targets(model, config))
    before = count_parameters(model)[1]
    assert count_parameters(lora.inject(model, config))[1] - before == foretold > 0


# Phi-3-mini


def test_phi3_mini_has_the_published_counts():
    with torch.device("meta"):
        model = Phi3ForCausalLM(Phi3Config())
    assert count_parameters(model)[1] == 3_821_079_552
    lora.inject(model, lora.LoraConfig(r=16, target_modules=FUSED))
    lora.mark_only_lora_as_trainable(model)
    assert count_parameters(model) == (25_165_824, 3_821_079_552 + 25_165_824)
