import loralib
import pytest
import torch
from helpers import rms_error, tiny_config, tiny_model
from torch import nn

import minilora as lora
from minilora.adapters.trainable import count_parameters

BIASES = ["none", "all", "lora_only"]


def network(library) -> nn.Sequential:
    """Adapted and plain layers, with and without biases, out of the classes of one library."""
    return nn.Sequential(
        nn.Linear(6, 6),
        library.Linear(6, 6, r=2),
        nn.Sequential(library.MergedLinear(6, 6, r=2, enable_lora=[True, False, True]), nn.LayerNorm(6)),
        library.Linear(6, 6, r=2, bias=False),
    )


@pytest.fixture
def twins():
    """The same network by this library and by loralib."""
    ours, theirs = network(lora), network(loralib)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("bias", BIASES)
def test_the_same_parameters_learn_as_with_loralib(twins, bias):
    ours, theirs = twins
    lora.mark_only_lora_as_trainable(ours, bias)
    loralib.mark_only_lora_as_trainable(theirs, bias)
    assert trainable(ours) == trainable(theirs)
    assert "1.lora_A" in trainable(ours)


@pytest.mark.parametrize("bias", BIASES)
def test_the_state_dict_of_the_adapter_is_loralibs(twins, bias):
    ours, theirs = twins
    found, expected = lora.lora_state_dict(ours, bias), loralib.lora_state_dict(theirs, bias)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_all_biases_are_those_whose_name_says_bias_as_in_loralib():
    models = [nn.ModuleList([library.Linear(6, 6, r=2), nn.MultiheadAttention(6, 2)]) for library in (lora, loralib)]
    lora.mark_only_lora_as_trainable(models[0], "all")
    loralib.mark_only_lora_as_trainable(models[1], "all")
    assert trainable(models[0]) == trainable(models[1])
    assert "1.in_proj_bias" in trainable(models[0])
    assert lora.lora_state_dict(models[0], "all").keys() == loralib.lora_state_dict(models[1], "all").keys()


@pytest.mark.parametrize("bias", BIASES)
def test_what_is_marked_is_what_the_state_dict_holds(twins, bias):
    lora.mark_only_lora_as_trainable(twins[0], bias)
    assert lora.lora_state_dict(twins[0], bias).keys() == trainable(twins[0])


def test_a_frozen_adapter_learns_again_once_marked(twins):
    twins[0].requires_grad_(False)
    lora.mark_only_lora_as_trainable(twins[0])
    assert trainable(twins[0]) == lora.lora_state_dict(twins[0]).keys()


def test_a_single_layer_is_a_model_too():
    layer = lora.Linear(6, 6, r=2)
    lora.mark_only_lora_as_trainable(layer, "lora_only")
    assert trainable(layer) == {"lora_A", "lora_B", "bias"}


def test_the_adapters_state_dict_moves_an_adapter_to_another_copy_of_the_base():
    source, target = (lora.inject(tiny_model(tiny_config()), lora.LoraConfig(r=2)) for _ in range(2))
    for name, parameter in source.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    ids = torch.arange(12).view(2, 6)
    assert not torch.equal(source(ids), target(ids))
    target.load_state_dict(lora.lora_state_dict(source), strict=False)
    assert torch.equal(source(ids), target(ids))


def test_a_model_without_adapter_is_refused_and_stays_trainable():
    model = nn.Linear(6, 6)
    with pytest.raises(ValueError, match="the model has no adapter: inject one first"):
        lora.mark_only_lora_as_trainable(model)
    assert trainable(model) == {"weight", "bias"}


def test_an_unknown_bias_is_refused_with_the_known_ones(twins):
    for verb in (lora.mark_only_lora_as_trainable, lora.lora_state_dict):
        with pytest.raises(ValueError, match='bias must be "none", "all" or "lora_only", not True'):
            verb(twins[0], True)


@pytest.mark.parametrize("target_modules", ["all-linear", ["q_proj", "v_proj", "gate_proj", "lm_head"]])
def test_backward_reaches_every_adapter_and_nothing_else(target_modules):
    model = lora.inject(tiny_model(tiny_config()), lora.LoraConfig(r=2, target_modules=target_modules)).train()
    lora.mark_only_lora_as_trainable(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    ids = torch.arange(12).view(2, 6)
    model(ids, labels=ids).backward()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


def test_counts_tell_trainable_from_all_and_shared_ones_once():
    config = tiny_config(tie_word_embeddings=True)
    model = lora.inject(tiny_model(config), lora.LoraConfig(r=2, target_modules=["o_proj"]))
    untied = count_parameters(lora.inject(tiny_model(tiny_config()), lora.LoraConfig(r=2, target_modules=["o_proj"])))[1]
    lora.mark_only_lora_as_trainable(model)
    assert count_parameters(model) == (2 * 2 * (32 + 32), untied - config.vocab_size * config.hidden_size)


def mixture(library):
    return nn.Sequential(
        library.Embedding(9, 6, r=2), library.MergedLinear(6, 6, r=2, enable_lora=[True, False]), nn.Linear(6, 2)
    )


@pytest.mark.parametrize("bias", BIASES)
def test_embeddings_are_treated_as_by_loralib(bias):
    ours, theirs = mixture(lora), mixture(loralib)
    theirs.load_state_dict(ours.state_dict())
    lora.mark_only_lora_as_trainable(ours, bias)
    loralib.mark_only_lora_as_trainable(theirs, bias)
    assert trainable(ours) == trainable(theirs) == lora.lora_state_dict(ours, bias).keys()
    found, expected = lora.lora_state_dict(ours, bias), loralib.lora_state_dict(theirs, bias)
    assert found.keys() == expected.keys()


@pytest.mark.parametrize("bias", BIASES)
def test_an_adapter_file_of_either_library_loads_after_the_base_in_the_other(bias, tmp_path):
    base = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 2)).state_dict()
    for source, target in ((lora, loralib), (loralib, lora)):
        trained, other = mixture(source), mixture(target)
        trained.load_state_dict(base, strict=False)
        source.mark_only_lora_as_trainable(trained, bias)
        with torch.no_grad():
            for parameter in trained.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
        torch.save(source.lora_state_dict(trained, bias), tmp_path / "adapter.pt")
        other.load_state_dict(base, strict=False)
        other.load_state_dict(torch.load(tmp_path / "adapter.pt"), strict=False)
        ids = torch.arange(9)
        assert rms_error(other(ids), trained(ids)) < 1e-6


def test_a_layer_without_adapter_is_neither_marked_nor_saved():
    """loralib marks its bias and does not save it."""
    models = {library: nn.Sequential(library.Linear(6, 6, r=2), library.Linear(6, 6)) for library in (lora, loralib)}
    for library, model in models.items():
        library.mark_only_lora_as_trainable(model, "lora_only")
        assert "1.bias" not in library.lora_state_dict(model, "lora_only")
    assert "1.bias" not in trainable(models[lora])
    assert "1.bias" in trainable(models[loralib])
