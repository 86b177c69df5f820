from types import SimpleNamespace

import hypothesis
import peft
import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from torch import nn

import minilora as lora
from minilora.adapters.config import LoraConfig
from minilora.adapters.matching import hits, meant, saved_whole

NAMES = ["o_proj", "self_attn.o_proj", "lm_head", "proj", "model.layers.1.mlp.down_proj", "layers.0.fc", "mlp", "fc"]
PATTERNS = [r".*o_proj", r"model\.layers\.\d\.mlp\..*", r"o_proj|lm_head", r".*", r"layers\.0\.fc"]
PATHS = [
    "o_proj",
    "lm_head",
    "model.layers.0.self_attn.o_proj",
    "model.layers.1.self_attn.o_proj",
    "model.layers.1.mlp.down_proj",
    "model.layers.11.mlp.experts.0.down_proj",
    "encoder.blocks.1.fc",
    "layers.0.fc",
    "model.embed_tokens",
]
names = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True)


@st.composite
def settings(draw) -> dict:
    """Of LoraConfig, with all that decides which modules are meant."""
    found = {"target_modules": draw(names | st.sampled_from(PATTERNS))}
    found["exclude_modules"] = draw(st.none() | names | st.sampled_from(PATTERNS))
    found["modules_to_save"] = draw(
        st.none() | st.lists(st.sampled_from(["lm_head", "mlp", "embed_tokens"]), max_size=2, unique=True)
    )
    if isinstance(found["target_modules"], list):
        found["layers_to_transform"] = draw(st.none() | st.integers(0, 2) | st.lists(st.integers(0, 11), max_size=3))
        if found["layers_to_transform"] not in (None, []):
            found["layers_pattern"] = draw(st.none() | st.sampled_from(["layers", "blocks", ["experts", "layers"], []]))
    return found


@hypothesis.settings(max_examples=500)
@given(settings(), st.sampled_from(PATHS))
def test_the_same_modules_are_meant_as_by_peft(fields, path):
    config = LoraConfig(**fields)
    try:
        theirs = check_target_module_exists(SimpleNamespace(target_parameters=None, **fields), path)
    except UnboundLocalError:  # PEFT's own fault where a layers_pattern matches nowhere
        theirs = False
    assert meant(path, config) == (bool(theirs) and not isinstance(theirs, _ExcludedModule))


def test_the_entries_that_matched_are_told():
    config = LoraConfig(target_modules=["o_proj", "self_attn.o_proj", "down_proj"])
    assert hits("model.layers.0.self_attn.o_proj", config) == {"o_proj", "self_attn.o_proj"}


@pytest.mark.parametrize("path", ["model.norm", "model.layers.0.input_layernorm", "model.norm.weight", "normal"])
def test_modules_saved_whole_are_named_by_any_end_of_their_path_as_in_peft(path):
    assert saved_whole(path, LoraConfig(modules_to_save=["norm"])) == ({"norm"} if path.endswith("norm") else set())


def test_modules_saved_whole_are_pefts():
    def network():
        blocks = [nn.ModuleDict({"norm": nn.LayerNorm(4), "pre_norm": nn.LayerNorm(4), "fc": nn.Linear(4, 4)}) for _ in range(2)]
        return nn.ModuleDict({"blocks": nn.ModuleList(blocks), "normal": nn.Linear(4, 4), "head": nn.Sequential(nn.Linear(4, 4))})

    fields = {"target_modules": ["fc"], "modules_to_save": ["norm", "head"]}
    theirs = peft.get_peft_model(network(), peft.LoraConfig(r=2, **fields))
    ours = lora.inject(network(), LoraConfig(r=2, **fields))
    found = {key.removeprefix("base_model.model.") for key in peft.get_peft_model_state_dict(theirs) if "lora_" not in key}
    assert {name for name in lora.lora_state_dict(ours) if "lora_" not in name} == found
    assert "head.0.weight" in found
