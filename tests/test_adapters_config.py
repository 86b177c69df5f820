import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from minilora.adapters.config import LoraConfig, scaling

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, r"\br must be at least 1, not 0"),
        ({"r": -2}, r"\br must be at least 1, not -2"),
        ({"rank_pattern": {"o_proj": 0}}, r"rank_pattern.*\b0\b"),
        ({"lora_alpha": NAN}, "lora_alpha must be .*nan"),
        ({"lora_alpha": INF}, "lora_alpha must be .*inf"),
        ({"alpha_pattern": {"o_proj": NAN}}, "alpha_pattern.*nan"),
        ({"lora_dropout": 1.0}, r"lora_dropout must lie in \[0, 1\), not 1.0"),
        ({"lora_dropout": -0.1}, r"lora_dropout must lie in \[0, 1\), not -0.1"),
        ({"lora_dropout": NAN}, r"lora_dropout must lie in \[0, 1\), not nan"),
        ({"target_modules": []}, "target_modules must name at least one module"),
        ({"target_modules": ""}, "target_modules must name at least one module"),
        ({"target_modules": "("}, "target_modules"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern"),
        ({"exclude_modules": "("}, "exclude_modules must"),
        ({"layers_to_transform": [0], "layers_pattern": "(", "target_modules": ["o_proj"]}, "layers_pattern must"),
        ({"bias": "some"}, "bias must be one of none, all, lora_only, not 'some'"),
        ({"init_lora_weights": "eva"}, "init_lora_weights must be one of True, 'pissa', 'olora', 'loftq', not 'eva'"),
        ({"init_lora_weights": False}, "init_lora_weights must be one of"),
        ({"init_lora_weights": 1}, "init_lora_weights must be"),
        ({"layers_to_transform": [True], "target_modules": ["o_proj"]}, "layers_to_transform must be"),
    ],
)
def test_a_broken_lora_rule_is_refused_with_its_value(fields, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**fields)


def test_all_broken_lora_rules_are_named_at_once():
    with pytest.raises(ValueError, match="; ") as refused:
        LoraConfig(r=0, lora_dropout=2, target_modules=[], bias="some")
    for field in ("r must", "lora_dropout must", "target_modules must", "bias must"):
        assert field in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers_to_transform": [0]}, "layers_to_transform needs a list of target_modules"),
        ({"layers_pattern": "layers", "target_modules": ["o_proj"]}, "layers_pattern needs layers_to_transform"),
        ({"lora_bias": True, "use_dora": True}, "lora_bias and use_dora exclude one another"),
        ({"lora_bias": True, "init_lora_weights": "pissa"}, "lora_bias needs init_lora_weights = True"),
        ({"use_dora": True, "init_lora_weights": "olora"}, "use_dora needs init_lora_weights = True"),
        ({"init_lora_weights": "pissa", "lora_dropout": 0.1}, "init_lora_weights = 'pissa' needs lora_dropout = 0"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(fields, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        LoraConfig(**fields)


def test_the_edges_of_the_lora_rules_are_allowed():
    LoraConfig(r=1, lora_dropout=0, target_modules=["o_proj"], rank_pattern={"o_proj": 1})
    LoraConfig(lora_dropout=0.999)


KEYS = ["o_proj", "self_attn.o_proj", r"layers\.1\..*", ".*proj", "^o_proj", "proj", "lm_head|o_proj", "layers.0.mlp.down_proj"]
PATHS = ["o_proj", "lm_head", "layers.0.self_attn.o_proj", "model.layers.11.self_attn.o_proj", "model.layers.0.mlp.down_proj"]


@given(keys=st.lists(st.sampled_from(KEYS), unique=True), path=st.sampled_from(PATHS))
def test_patterns_match_as_in_peft_and_the_first_hit_counts(keys, path):
    ranks = {key: 10 + i for i, key in enumerate(keys)}
    alphas = {key: 0.5 + i for i, key in enumerate(keys)}
    config = LoraConfig(r=3, lora_alpha=7, rank_pattern=ranks, alpha_pattern=alphas)
    assert config.rank(path) == ranks.get(get_pattern_key(ranks, path), 3)
    assert config.alpha(path) == alphas.get(get_pattern_key(alphas, path), 7)


def test_scaling_is_alpha_by_r_or_by_its_root():
    assert scaling(16, 32) == 2
    assert scaling(16, 32, use_rslora=True) == 8
    assert scaling(2, 1, use_rslora=True) == pytest.approx(0.7071067811865476)
