"""The weighted sum of adapters, compared with the sum of their ΔW and with PEFT's "cat"."""

import copy

import peft
import pytest
import torch
import transformers
from helpers import rms_error, tiny_config, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import minilora as lora
from minilora import phi3

IDS = torch.arange(22).view(2, 11)
WHOLE = {
    "a": {"r": 4, "lora_alpha": 8, "target_modules": ["qkv_proj", "o_proj"]},
    "b": {"r": 2, "lora_alpha": 3, "target_modules": ["qkv_proj", "o_proj"]},
    "c": {"r": 4, "lora_alpha": 3, "target_modules": ["qkv_proj", "o_proj"], "use_rslora": True},
}
OTHERS = {
    "sliced": {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "up_proj"]},
    "elsewhere": {"r": 3, "target_modules": ["down_proj", "lm_head"], "rank_pattern": {"down_proj": 5}},
}


def several(settings: dict, dtype=torch.float32):
    model = tiny_model(tiny_config())
    for seed, (name, fields) in enumerate(settings.items()):
        lora.inject(model, lora.LoraConfig(**fields), dtype, adapter_name=name)
        generator = torch.Generator().manual_seed(seed)
        for _, parameter in filter(lambda item: "lora_" in item[0], model.named_parameters()):
            nn.init.normal_(parameter, 0.0, 0.3, generator)
    return model


def deltas(model, name: str) -> dict[str, torch.Tensor]:
    """ΔW (out_features, in_features) of each layer that the adapter adapts, in float64."""
    found = {}
    for path, layer in model.lora_adapters.named[name].layers.items():
        found[path] = torch.zeros(layer.weight.shape, dtype=torch.float64)
        Bs = layer.lora_B.double().split([stop - start for start, stop in layer.slices])
        for (start, stop), B, A in zip(layer.slices, Bs, layer.lora_A.double().chunk(len(layer.slices)), strict=True):
            found[path][start:stop] = (layer.scaling * B @ A).detach()
    return found


@given(
    names=st.lists(st.sampled_from([*WHOLE, *OTHERS]), min_size=1, max_size=4),
    weights=st.lists(st.floats(-3, 3).filter(lambda weight: abs(weight) > 1e-3), min_size=4, max_size=4),
)
def test_the_sum_of_adapters_is_the_sum_of_their_updates(names, weights):
    model, weights = several(WHOLE | OTHERS), weights[: len(names)]
    expected = {}
    for name, weight in zip(names, weights, strict=True):
        for path, delta in deltas(model, name).items():
            expected[path] = expected.get(path, 0) + weight * delta
    lora.add_weighted_adapter(model, names, weights, "sum")
    assert model.lora_adapters.active == "sum"
    found = deltas(model, "sum")
    assert found.keys() == expected.keys()
    scale = sum(map(abs, weights))
    assert {path: (layer.r, layer.r) for path, layer in model.lora_adapters.named["sum"].layers.items()} == {
        path: (model.lora_config.rank(path), model.lora_config.alpha(path)) for path in found
    }
    for path, delta in expected.items():  # beside the terms, since they may cancel
        assert (found[path] - delta).abs().max() < 1e-5 * scale * delta.shape[1]
    assert max(rms_error(found[path], delta) for path, delta in expected.items()) < 1e-3 or len(set(names)) < len(names)


def test_the_sum_is_pefts_cat_and_not_its_linear(tmp_path):
    model = several(WHOLE)
    phi3.save(tiny_model(tiny_config()), tmp_path / "base")
    for name in WHOLE:
        lora.set_adapter(model, name)
        lora.save_adapter(model, tmp_path / name)
    base = transformers.Phi3ForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "a", adapter_name="a")
    for name in ("b", "c"):
        theirs.load_adapter(tmp_path / name, adapter_name=name)
    for names, weights in ((["a", "b"], [0.7, -0.4]), (["a", "b", "c"], [1.0, 2.0, 0.3]), (["a", "c"], [0.5, 0.5])):
        summed = "+".join(names)
        theirs.add_weighted_adapter(names, weights, summed, combination_type="cat")
        theirs.set_adapter(summed)
        lora.add_weighted_adapter(model, names, weights, summed)
        assert rms_error(model(IDS), theirs(IDS).logits) < 1e-5
    theirs.add_weighted_adapter(["a", "c"], [0.5, 0.5], "linear", combination_type="linear")
    theirs.set_adapter("linear")
    assert rms_error(model(IDS), theirs(IDS).logits) > 0.05  # a and c have one rank, and cross products all the same


def test_a_sum_with_slices_is_saved_and_loaded_as_any_adapter(tmp_path):
    model = several(WHOLE | OTHERS)
    lora.add_weighted_adapter(model, ["a", "sliced", "elsewhere"], [0.5, -1.0, 2.0], "sum")
    expected = model(IDS)
    lora.save_adapter(model, tmp_path / "sum")
    assert torch.equal(lora.load_adapter(tiny_model(tiny_config()), tmp_path / "sum")(IDS), expected)
    phi3.save(tiny_model(tiny_config()), tmp_path / "base")
    base = transformers.Phi3ForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert rms_error(peft.PeftModel.from_pretrained(base, tmp_path / "sum").eval()(IDS).logits, expected) < 1e-5


def test_a_sum_of_bfloat16_adapters_is_rounded_once():
    model = several({"a": WHOLE["a"], "b": WHOLE["b"]}, torch.bfloat16)
    lora.add_weighted_adapter(model, ["a", "b"], [0.3, 0.7], "sum")
    for path, layer in model.lora_adapters.named["sum"].layers.items():
        assert layer.lora_A.dtype == layer.lora_B.dtype == torch.bfloat16
        a, b = (model.lora_adapters.named[name].layers[path] for name in "ab")
        expected = torch.cat([0.3 * 2.0 * a.lora_B.float(), 0.7 * 1.5 * b.lora_B.float()], dim=1)
        assert rms_error(layer.lora_B, expected) < torch.finfo(torch.bfloat16).eps / 2
        assert torch.equal(layer.lora_A, torch.cat([a.lora_A, b.lora_A]))


def test_the_sum_is_independent_of_its_parts_and_shares_the_base():
    model = several(WHOLE)
    lora.add_weighted_adapter(model, ["a", "b"], [1.0, 1.0], "sum")
    expected = model(IDS)
    with torch.no_grad():
        for layer in model.lora_adapters.named["a"].layers.values():
            layer.lora_A.zero_()
    assert torch.equal(model(IDS), expected)
    for path, layer in model.lora_adapters.named["sum"].layers.items():
        assert layer.weight is model.lora_adapters.base[path].weight


def test_embeddings_and_convolutions_are_added_up_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 4), nn.Conv1d(4, 6, 3, groups=2))
    ids, base = torch.arange(10).view(2, 5), copy.deepcopy(model)
    settings = {"a": {"r": 2, "target_modules": ["0", "1"]}, "b": {"r": 3, "lora_alpha": 5, "target_modules": ["1", "0"]}}
    for name, fields in settings.items():
        lora.inject(model, lora.LoraConfig(**fields), adapter_name=name)
        for parameter in (parameter for path, parameter in model.named_parameters() if "lora_" in path):
            nn.init.normal_(parameter)
    lora.add_weighted_adapter(model, ["a", "b"], [0.5, -2.0], "sum")
    for i, module in enumerate(base):
        deltas = {name: model.lora_adapters.named[name].layers[str(i)].delta() for name in ("a", "b", "sum")}
        assert rms_error(deltas["sum"], 0.5 * deltas["a"] - 2 * deltas["b"]) < 1e-5
        with torch.no_grad():
            module.weight += deltas["sum"]
    x = base[0](ids).transpose(1, 2)
    assert rms_error(model[1](model[0](ids).transpose(1, 2)), base[1](x)) < 1e-5


def test_a_module_in_two_places_stays_one_in_the_sum():
    linear = nn.Linear(4, 4)
    model = nn.Sequential(linear, nn.Tanh(), linear)
    for name in ("a", "b"):
        lora.inject(model, lora.LoraConfig(r=2, target_modules=["0"]), adapter_name=name)
        assert model[0] is model[2]
    lora.add_weighted_adapter(model, ["a", "b"], [1.0, 1.0], "sum")
    assert model[0] is model[2]
    with lora.disable_adapter(model):
        assert model[0] is model[2] is linear


@pytest.mark.parametrize("target_modules", [["o_proj"], ["q_proj", "v_proj"]])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_that_starts_from_the_weight_is_added_without_its_start(start, target_modules):
    settings = {"r": 2, "lora_alpha": 3, "target_modules": target_modules}
    model = several({"offset": settings | {"init_lora_weights": start}, "a": WHOLE["a"]})
    lora.set_adapter(model, "offset")
    offset = model(IDS)
    lora.add_weighted_adapter(model, ["offset"], [1.0], "same")
    assert rms_error(model(IDS), offset) < 1e-5
    lora.add_weighted_adapter(model, ["offset", "a", "offset"], [0.5, 2.0, -0.5], "sum")
    lora.add_weighted_adapter(model, ["a"], [2.0], "twice")
    twice = model(IDS)
    lora.set_adapter(model, "sum")
    assert rms_error(model(IDS), twice) < 1e-4


def test_transposed_layers_are_added_up_too():
    model = nn.Sequential(transformers.pytorch_utils.Conv1D(6, 4))
    base, x = copy.deepcopy(model), torch.randn(3, 4)
    for name in ("a", "b"):
        lora.inject(model, lora.LoraConfig(r=2, target_modules=["0"]), adapter_name=name)
        nn.init.normal_(model[0].lora_B)
    lora.add_weighted_adapter(model, ["a", "b"], [0.5, -2.0], "sum")
    a, b = (model.lora_adapters.named[name].layers["0"].delta() for name in ("a", "b"))
    assert rms_error(model(x), base(x) + x @ (0.5 * a - 2 * b).T) < 1e-5


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"use_dora": True}, "o_proj is DoraLinear"),
        ({"lora_bias": True}, "o_proj is BiasedLinear"),
        ({"modules_to_save": ["lm_head"]}, "lm_head is Linear"),
    ],
)
def test_an_adapter_that_is_more_than_a_product_is_refused(settings, kind):
    model = several({"a": WHOLE["a"], "more": {"r": 2, "target_modules": ["o_proj"]} | settings})
    expected = model(IDS)
    path = r"lm_head" if "lm_head" in kind else r"model\.layers\.0\.self_attn\.o_proj"
    with pytest.raises(ValueError, match=rf"one product B A a layer .*, and is more in {path}.*: switch to it with set_adapter"):
        lora.add_weighted_adapter(model, ["a", "more"], [1.0, 1.0], "sum")
    with pytest.raises(ValueError, match=rf"{kind} in more.*with set_adapter"), lora.mixed_batch(model, ["a", "more"]):
        pass
    assert torch.equal(model(IDS), expected)


@pytest.mark.parametrize(
    ("adapters", "weights", "name", "fault"),
    [
        (["a", "b"], [1.0], "sum", r"one finite weight, not \[1.0\] for \['a', 'b'\]"),
        ([], [], "sum", "one finite weight"),
        (["a"], [float("nan")], "sum", "one finite weight"),
        (["a", "z"], [1.0, 1.0], "sum", "there is no adapter 'z'"),
        (["a", "b"], [1.0, 1.0], "c", "has an adapter 'c' already"),
    ],
)
def test_a_sum_that_is_not_one_is_refused_and_nothing_changes(adapters, weights, name, fault):
    model = several(WHOLE)
    expected = model(IDS)
    with pytest.raises(ValueError, match=fault):
        lora.add_weighted_adapter(model, adapters, weights, name)
    assert list(model.lora_adapters.named) == list(WHOLE)
    assert torch.equal(model(IDS), expected)
