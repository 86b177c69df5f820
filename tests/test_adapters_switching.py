"""Several adapters on one base, compared with PEFT's set_adapter and disable_adapter."""

import copy

import peft
import pytest
import torch
import transformers
from helpers import rms_error, tiny_config, tiny_model
from torch import nn

import minilora as lora
from minilora import phi3

IDS = torch.arange(22).view(2, 11)

# Adapters that PEFT knows too, of unlike layers, ranks and scalings; and one by slices.
ADAPTERS = {
    "a": {"r": 4, "lora_alpha": 8, "target_modules": ["qkv_proj", "o_proj"]},
    "b": {"r": 2, "lora_alpha": 3, "target_modules": ["o_proj", "down_proj", "lm_head"]},
    "c": {"r": 3, "use_rslora": True, "target_modules": "all-linear"},
}
SLICED = {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "up_proj"]}


def fresh():
    return tiny_model(tiny_config())


def fill(model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, 0.0, 0.3, generator)


def alone(seed: int, settings: dict):
    """A model of its own for one adapter: what several on one base are compared with."""
    model = lora.inject(fresh(), lora.LoraConfig(**settings))
    fill(model, seed)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict:
    """Each adapter saved, and the base as "base"."""
    root = tmp_path_factory.mktemp("switching")
    phi3.save(fresh(), root / "base")
    for seed, (name, settings) in enumerate((ADAPTERS | {"sliced": SLICED}).items()):
        lora.save_adapter(alone(seed, settings), root / name)
    return {name: root / name for name in [*ADAPTERS, "sliced", "base"]}


@pytest.fixture
def logits(folders) -> dict:
    """What the base and each adapter compute when they are alone."""
    with_adapters = {name: lora.load_adapter(fresh(), folders[name])(IDS) for name in [*ADAPTERS, "sliced"]}
    return {"__base__": fresh()(IDS)} | with_adapters


@pytest.fixture
def model(folders):
    model = fresh()
    for name in [*ADAPTERS, "sliced"]:
        lora.load_adapter(model, folders[name], adapter_name=name)
    return model


def test_each_adapter_computes_bitwise_what_it_does_alone(model, logits):
    for name in ["a", "sliced", "b", "b", "c", "a"]:
        lora.set_adapter(model, name)
        assert model.lora_adapters.active == name
        assert torch.equal(model(IDS), logits[name])
    assert rms_error(logits["a"], logits["b"]) > 0.05


def test_switching_and_disabling_agree_with_peft(model, folders):
    base = transformers.Phi3ForCausalLM.from_pretrained(folders["base"], dtype=torch.float32).eval()
    theirs = peft.PeftModel.from_pretrained(base, folders["a"], adapter_name="a")
    for name in ("b", "c"):
        theirs.load_adapter(folders[name], adapter_name=name)
    for name in ADAPTERS:
        theirs.set_adapter(name)
        lora.set_adapter(model, name)
        assert rms_error(model(IDS), theirs(IDS).logits) < 1e-5
    with theirs.disable_adapter(), lora.disable_adapter(model):
        assert rms_error(model(IDS), theirs(IDS).logits) < 1e-5


def test_disabled_the_model_is_the_base_bit_for_bit_and_its_own_modules(logits):
    model = fresh()
    modules = dict(model.named_modules())
    lora.inject(model, lora.LoraConfig())
    fill(model, 1)
    with lora.disable_adapter(model) as inside:
        assert inside is model
        assert dict(model.named_modules()) == modules
        assert torch.equal(model(IDS), logits["__base__"])
    assert not torch.equal(model(IDS), logits["__base__"])


def test_the_adapter_comes_back_after_nested_disabling_and_after_a_fault(model, logits):
    lora.set_adapter(model, "b")
    with lora.disable_adapter(model):
        with lora.disable_adapter(model):
            pass
        assert torch.equal(model(IDS), logits["__base__"])
    assert torch.equal(model(IDS), logits["b"])
    with pytest.raises(KeyError), lora.disable_adapter(model):
        raise KeyError
    assert torch.equal(model(IDS), logits["b"])


def test_an_adapter_chosen_while_disabled_stays(model, logits):
    lora.set_adapter(model, "b")
    with lora.disable_adapter(model):
        lora.set_adapter(model, "a")
    assert torch.equal(model(IDS), logits["a"])


def test_no_adapter_copies_the_base(model):
    weights = {parameter.data_ptr() for parameter in fresh().parameters()} | {p.data_ptr() for p in model.parameters()}
    for name, adapter in model.lora_adapters.named.items():
        for path, layer in adapter.layers.items():
            assert layer.weight is model.lora_adapters.base[path].weight, (name, path)
            assert layer.weight.data_ptr() in weights


def test_names_and_parameters_are_the_active_adapters_alone(model, folders):
    for name in ["c", "a"]:
        lora.set_adapter(model, name)
        only = lora.load_adapter(fresh(), folders[name])
        assert model.state_dict().keys() == only.state_dict().keys()
        assert lora.lora_state_dict(model).keys() == lora.lora_state_dict(only).keys()
        assert model.lora_config == only.lora_config


@pytest.mark.parametrize("name", [*ADAPTERS, "sliced"])
def test_the_active_adapter_is_the_one_saved(model, folders, tmp_path, name):
    lora.set_adapter(model, name)
    lora.save_adapter(model, tmp_path / "again")
    for file in (tmp_path / "again").iterdir():
        assert file.read_bytes() == (folders[name] / file.name).read_bytes()


def test_training_the_active_adapter_leaves_the_others_and_the_base(model, logits):
    lora.set_adapter(model, "a")
    lora.mark_only_lora_as_trainable(model)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1.0)
    model(IDS, labels=IDS).backward()
    optimizer.step()
    assert not torch.equal(model(IDS), logits["a"])
    for name in ("b", "c", "sliced"):
        lora.set_adapter(model, name)
        assert torch.equal(model(IDS), logits[name])


def test_one_more_adapter_is_injected_beside_the_others(model, logits):
    lora.inject(model, lora.LoraConfig(r=2, target_modules=["k_proj"]), adapter_name="new")
    assert torch.equal(model(IDS), logits["__base__"])  # its lora_B is zero
    fill(model, 5)
    assert not torch.equal(model(IDS), logits["__base__"])
    lora.set_adapter(model, "a")
    assert torch.equal(model(IDS), logits["a"])


def test_loading_under_a_name_that_is_there_fills_its_layers(model, folders, tmp_path, logits):
    other = alone(9, ADAPTERS["a"])
    lora.save_adapter(other, tmp_path / "other")
    layers = model.lora_adapters.named["a"].layers
    lora.load_adapter(model, tmp_path / "other", adapter_name="a")
    assert torch.equal(model(IDS), other(IDS))
    assert model.lora_adapters.named["a"].layers is layers
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="does not fit the model"):
        lora.load_adapter(model, folders["b"], adapter_name="a")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_mode_device_and_copies_follow_the_model(model, logits):
    lora.set_adapter(model, "a")
    model.train()
    lora.set_adapter(model, "b")
    assert all(module.training for module in model.modules())
    model.eval()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for name in ("b", "a", "sliced"):
        lora.set_adapter(twin, name)
        assert torch.equal(twin(IDS), logits[name])
        assert not any(module.training for module in twin.modules())


def test_new_parameters_of_the_base_are_every_adapters(model, folders):
    """load_state_dict(assign=True), to_empty and sharding put other parameters into the layers that are in the model."""
    lora.set_adapter(model, "a")
    other = tiny_model(tiny_config(), seed=7)
    model.load_state_dict(other.state_dict(), strict=False, assign=True)
    for name in ("a", "b"):
        lora.set_adapter(model, name)
        assert torch.equal(model(IDS), lora.load_adapter(tiny_model(tiny_config(), seed=7), folders[name])(IDS))
    with lora.disable_adapter(model):
        assert torch.equal(model(IDS), other(IDS))


def test_remove_takes_every_adapter_and_gives_back_the_base(logits):
    model = fresh()
    modules = dict(model.named_modules())
    for name in ("o_proj", "down_proj"):
        lora.inject(model, lora.LoraConfig(r=2, target_modules=[name]), adapter_name=name)
    lora.remove(model)
    assert dict(model.named_modules()) == modules
    assert torch.equal(model(IDS), logits["__base__"])
    with pytest.raises(ValueError, match="the model has none"):
        lora.set_adapter(model, "o_proj")
    lora.inject(model, lora.LoraConfig(r=2, target_modules=["o_proj"]))


def test_a_compiled_model_follows_every_switch():
    model = alone(0, ADAPTERS["a"])
    lora.inject(model, lora.LoraConfig(**SLICED), adapter_name="sliced")
    fill(model, 3)
    sliced = model(IDS)
    compiled = torch.compile(model, backend="eager")
    assert rms_error(compiled(IDS), sliced) < 1e-6
    lora.set_adapter(model, "default")
    assert rms_error(compiled(IDS), model(IDS)) < 1e-6
    assert rms_error(compiled(IDS), sliced) > 0.05
    torch._dynamo.reset()  # what other tests compile is not to be compiled for every length


def test_tied_weights_stay_tied_through_every_switch(folders):
    model = tiny_model(tiny_config(tie_word_embeddings=True))
    for name in ("b", "a"):
        lora.load_adapter(model, folders[name], adapter_name=name)
        assert model.lm_head.weight is model.model.embed_tokens.weight
    with lora.disable_adapter(model):
        assert model.lm_head.weight is model.model.embed_tokens.weight


# Variants, and modules trained whole

VARIANTS = {
    "whole": {"r": 2, "target_modules": ["o_proj"], "modules_to_save": ["lm_head", "norm"]},
    "low rank": {"r": 2, "target_modules": ["down_proj", "lm_head"]},
    "dora": {"r": 3, "target_modules": ["q_proj", "o_proj"], "use_dora": True, "modules_to_save": ["lm_head"]},
    "pissa": {"r": 2, "target_modules": ["o_proj", "v_proj"], "init_lora_weights": "pissa"},
    "biased": {"r": 2, "target_modules": ["qkv_proj"], "lora_bias": True},
}


def fill_all(model, seed: int) -> None:
    """Adapters, and modules trained whole."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in lora.lora_state_dict(model).items():
        if "start" not in name:
            nn.init.normal_(tensor, 0.0, 0.3, generator)


@pytest.mark.parametrize("tied", [False, True])
def test_variants_and_modules_trained_whole_are_switched_as_any_adapter(tied):
    def base():
        return tiny_model(tiny_config(tie_word_embeddings=tied))

    model, expected = base(), {"__base__": base()(IDS)}
    modules = dict(model.named_modules())
    for seed, (name, settings) in enumerate(VARIANTS.items()):
        lone = lora.inject(base(), lora.LoraConfig(**settings))
        lora.inject(model, lora.LoraConfig(**settings), adapter_name=name)
        assert rms_error(model(IDS), expected["__base__"]) < 1e-6  # made from the base, whatever was active before
        fill_all(lone, seed)
        fill_all(model, seed)
        expected[name] = lone(IDS)
    for name in ["whole", "low rank", "dora", "dora", "pissa", "whole", "biased", "low rank"]:
        lora.set_adapter(model, name)
        assert torch.equal(model(IDS), expected[name]), name
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        with lora.disable_adapter(model):
            assert torch.equal(model(IDS), expected["__base__"])
    lora.remove(model)
    assert dict(model.named_modules()) == modules
    assert torch.equal(model(IDS), expected["__base__"])


def test_variants_and_modules_trained_whole_are_loaded_beside_others_and_filled_again(tmp_path):
    model, expected = fresh(), {}
    for seed, (name, settings) in enumerate(VARIANTS.items()):
        lone = lora.inject(fresh(), lora.LoraConfig(**settings))
        fill_all(lone, seed)
        lora.save_adapter(lone, tmp_path / name)
        expected[name] = lone(IDS)
        lora.load_adapter(model, tmp_path / name, adapter_name=name)
    for name in [*VARIANTS, "whole"]:
        lora.set_adapter(model, name)
        assert rms_error(model(IDS), expected[name]) < 1e-6, name
        fill_all(model, 9)
        assert rms_error(model(IDS), expected[name]) > 0.05
        lora.set_adapter(model, "low rank")
        lora.load_adapter(model, tmp_path / name, adapter_name=name)
        assert model.lora_adapters.active == name
        assert rms_error(model(IDS), expected[name]) < 1e-6, name
    with lora.disable_adapter(model):
        assert torch.equal(model(IDS), fresh()(IDS))


def test_new_parameters_of_the_base_leave_modules_trained_whole_alone():
    model, other = fresh(), tiny_model(tiny_config(), seed=7)
    lora.inject(model, lora.LoraConfig(**VARIANTS["whole"]), adapter_name="whole")
    fill_all(model, 0)
    head = model.lm_head.weight
    lora.inject(model, lora.LoraConfig(**VARIANTS["low rank"]), adapter_name="low rank")
    model.load_state_dict(other.state_dict(), strict=False, assign=True)
    lora.set_adapter(model, "whole")
    assert model.lm_head.weight is head
    with lora.disable_adapter(model):
        assert torch.equal(model(IDS), other(IDS))


def test_a_module_trained_whole_follows_the_mode_of_its_place():
    model = fresh().train()
    lora.inject(model, lora.LoraConfig(target_modules=["o_proj"], modules_to_save=["mlp"]), adapter_name="whole")
    with lora.disable_adapter(model.eval()):
        assert not any(module.training for module in model.modules())
        model.train()
    assert all(module.training for module in model.modules())


def test_a_module_trained_whole_by_one_holds_nothing_that_another_adapts():
    model = fresh()
    lora.inject(model, lora.LoraConfig(target_modules=["down_proj"]))
    expected, paths = model(IDS), dict(model.named_modules())
    with pytest.raises(ValueError, match=r"one adapter trains whole holds .* adapts: model\.layers\.0\.mlp\.down_proj"):
        lora.inject(model, lora.LoraConfig(target_modules=["o_proj"], modules_to_save=["mlp"]), adapter_name="whole")
    assert dict(model.named_modules()) == paths
    assert list(model.lora_adapters.named) == ["default"]
    assert torch.equal(model(IDS), expected)


@pytest.mark.parametrize("order", [["none", "all"], ["all", "none"]])
def test_an_adapter_that_trains_biases_of_the_base_shares_it_with_none(order):
    model = nn.Sequential(nn.Linear(4, 4))
    lora.inject(model, lora.LoraConfig(r=2, target_modules=["0"], bias=order[0]), adapter_name=order[0])
    with pytest.raises(ValueError, match=r"trains biases of the base \(all\) must be the model's only one"):
        lora.inject(model, lora.LoraConfig(r=2, target_modules=["0"], bias=order[1]), adapter_name=order[1])
    assert list(model.lora_adapters.named) == [order[0]]


# What is refused


def test_a_merged_adapter_is_neither_switched_nor_disabled(model, folders, logits):
    lora.set_adapter(model, "a")
    lora.merge(model)
    merged = model(IDS)
    faults = r"weights hold the active adapter; unmerge it first: model\.layers\.0\.self_attn\.qkv_proj"
    verbs = [
        lambda: lora.set_adapter(model, "b"),
        lambda: lora.disable_adapter(model).__enter__(),
        lambda: lora.inject(model, lora.LoraConfig(target_modules=["down_proj"]), adapter_name="new"),
        lambda: lora.load_adapter(model, folders["b"], adapter_name="new"),
        lambda: lora.add_weighted_adapter(model, ["a", "b"], [1.0, 1.0], "new"),
        lambda: lora.mixed_batch(model, ["a", "b"]).__enter__(),
    ]
    for verb in verbs:
        with pytest.raises(ValueError, match=faults):
            verb()
        assert torch.equal(model(IDS), merged)
        assert list(model.lora_adapters.named) == [*ADAPTERS, "sliced"]
    lora.unmerge(model)
    lora.set_adapter(model, "b")
    assert torch.equal(model(IDS), logits["b"])


def test_names_that_are_not_there_and_names_that_are_taken_are_refused(model):
    with pytest.raises(ValueError, match="there is no adapter 'z'; the model has 'a', 'b', 'c', 'sliced'"):
        lora.set_adapter(model, "z")
    for taken in ("a", "__base__"):
        with pytest.raises(ValueError, match=f"has an adapter '{taken}' already"):
            lora.inject(model, lora.LoraConfig(), adapter_name=taken)
    with pytest.raises(ValueError, match="there is no adapter 'a'; the model has none"):
        lora.set_adapter(fresh(), "a")
    with pytest.raises(ValueError, match="no adapter was injected into this model"), lora.disable_adapter(fresh()):
        pass
