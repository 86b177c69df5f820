import peft
import pytest
import torch
from helpers import rms_error, tiny_config, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import minilora as lora
from minilora.adapters.inspection import inspect_adapter, misfits, product_norm


def saved(folder, base="some/base", **settings):
    model = lora.inject(tiny_model(tiny_config()), lora.LoraConfig(**{"r": 4, "lora_alpha": 6} | settings))
    lora.mark_only_lora_as_trainable(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    lora.save_adapter(model, folder, base)
    return model


@given(st.integers(1, 6), st.integers(1, 20), st.integers(1, 20), st.integers(0, 5))
def test_the_norm_of_a_product_needs_no_product(r, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(r, columns, generator=generator), torch.randn(rows, r, generator=generator)
    assert product_norm(B, A) == pytest.approx(float((B.double() @ A.double()).norm()), rel=1e-6)
    assert product_norm(torch.zeros_like(B), A) == 0


def test_the_norm_of_a_convolutions_update_is_that_of_its_kernel():
    A, B = torch.randn(2, 3, 5, 5), torch.randn(4, 2, 1, 1)
    assert product_norm(B, A) == pytest.approx(float(torch.einsum("or,rihw->oihw", B[..., 0, 0], A).norm()), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"target_modules": ["q_proj", "o_proj"], "rank_pattern": {"o_proj": 2}}, "LoRA"),
        ({"target_modules": ["o_proj", "lm_head"], "use_rslora": True}, "rank-stabilised LoRA"),
        ({"target_modules": ["o_proj"], "use_dora": True}, "DoRA"),
        ({"target_modules": ["o_proj"], "init_lora_weights": "pissa"}, "LoRA"),
    ],
)
def test_every_layer_is_told_with_its_rank_scale_and_norm(tmp_path, settings, kind):
    model = saved(tmp_path / "adapter", **settings)
    found = inspect_adapter(tmp_path / "adapter")
    layers = {path: module for path, module in model.named_modules() if isinstance(module, lora.Linear)}
    assert (found.kind, found.stored.base) == (kind, "some/base")
    assert found.updates.keys() == layers.keys()
    for path, layer in layers.items():
        delta = lora.Linear.delta(layer).detach()  # of DoRA without the magnitudes
        assert found.updates[path].norm == pytest.approx(float(delta.detach().norm()), rel=1e-5)
        assert found.updates[path].scaling == pytest.approx(layer.scaling)
        assert found.updates[path].rank == len(layer.slices) * layer.factors()[1].shape[1]


def test_what_is_no_pair_is_told_by_name(tmp_path):
    saved(tmp_path / "adapter", target_modules=["model.layers.0.self_attn.o_proj"], modules_to_save=["lm_head"], use_dora=True)
    names = ["lm_head.weight", "model.layers.0.self_attn.o_proj.lora_magnitude_vector"]
    assert sorted(inspect_adapter(tmp_path / "adapter").others) == names


def test_pefts_adapters_of_embeddings_and_convolutions_are_told_too(tmp_path):
    net = nn.ModuleDict({"embed": nn.Embedding(9, 6), "conv": nn.Conv2d(3, 4, 3)})
    theirs = peft.get_peft_model(net, peft.LoraConfig(r=2, lora_alpha=6, target_modules=["embed", "conv"]))
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    theirs.save_pretrained(tmp_path / "adapter")
    found = inspect_adapter(tmp_path / "adapter").updates
    for name in ("embed", "conv"):
        delta = theirs.base_model.model[name].get_delta_weight("default")
        assert found[name].norm == pytest.approx(float(delta.detach().norm()), rel=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "o_proj"], "use_dora": True},
        {"target_modules": ["lm_head", "qkv_proj"], "lora_bias": True},
        {"target_modules": ["o_proj"], "modules_to_save": ["norm"]},
        {"target_modules": ["o_proj"], "init_lora_weights": "olora"},
    ],
)
def test_an_adapter_fits_its_base_which_needs_no_weights(tmp_path, settings):
    saved(tmp_path / "adapter", **settings)
    with torch.device("meta"):
        base = tiny_model(tiny_config())
    assert misfits(inspect_adapter(tmp_path / "adapter"), base) == []


def test_every_misfit_is_told(tmp_path):
    saved(tmp_path / "adapter", target_modules=["o_proj", "down_proj"])
    found = inspect_adapter(tmp_path / "adapter")
    faults = misfits(found, tiny_model(tiny_config(intermediate_size=40, num_hidden_layers=1)))
    assert "model.layers.0.mlp.down_proj.lora_A.weight must have shape (4, 40), not (4, 48)" in faults
    assert "model.layers.1.self_attn.o_proj.lora_B.weight is not part of the adapted model" in faults


def test_a_base_without_the_targets_is_told_with_what_is_missing_and_misshapen(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    lora.save_adapter(lora.inject(model, lora.LoraConfig(r=2, target_modules=["a", "b", "c"])), tmp_path / "adapter")
    faults = misfits(inspect_adapter(tmp_path / "adapter"), nn.ModuleDict({"a": nn.Linear(4, 5), "b": nn.Linear(4, 4)}))
    assert any("target_modules ['c'] match no linear layer" in fault for fault in faults)
    assert {"c is not in the model", "a.weight must have shape (6, 4), not (5, 4)"} < set(faults)


def test_inspecting_leaves_the_base_as_it_is(tmp_path):
    saved(tmp_path / "adapter", target_modules=["o_proj"])
    base = tiny_model(tiny_config())
    ids, modules = torch.arange(22).view(2, 11), list(base.modules())
    before = base(ids)
    misfits(inspect_adapter(tmp_path / "adapter"), base)
    assert list(base.modules()) == modules
    assert rms_error(base(ids), before) == 0
