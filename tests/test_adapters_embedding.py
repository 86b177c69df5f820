import loralib
import pytest
import torch
import torch.nn.functional as F
from helpers import outputs_and_gradients, rms_error
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import minilora as lora


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def filled(layer):
    """The layer with a lora_A that is not zero, as after training."""
    nn.init.normal_(layer.lora_A)
    return layer


@given(
    shape=st.lists(st.integers(1, 4), max_size=3),
    num_embeddings=st.integers(2, 9),
    embedding_dim=st.integers(1, 9),
    r=st.integers(1, 5),
    lora_alpha=st.sampled_from([1, 6, 0.5]),
    padding_idx=st.sampled_from([None, 0, -1]),
    max_norm=st.sampled_from([None, 0.5]),
    scale_grad_by_freq=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_an_embedding_computes_as_loralib_does(shape, **settings):
    ours = filled(lora.Embedding(**settings))
    theirs = loralib.Embedding(**settings, merge_weights=False)
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(settings["num_embeddings"], shape)
    found, expected = outputs_and_gradients(ours, ids), outputs_and_gradients(theirs, ids)
    assert found.keys() == expected.keys() == {"y", "lora_A", "lora_B"}
    for name in expected:
        assert rms_error(found[name], expected[name]) < 1e-5, name


@pytest.mark.parametrize("library", [lora, loralib])
def test_arguments_may_be_given_by_position_in_loralibs_order(library):
    layer = library.Embedding(10, 6, 2, 4, False, padding_idx=3)
    assert (layer.r, layer.scaling, layer.padding_idx) == (2, 2, 3)
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    assert shapes == {"weight": (10, 6), "lora_A": (2, 10), "lora_B": (6, 2)}
    assert {name for name, parameter in layer.named_parameters() if parameter.requires_grad} == {"lora_A", "lora_B"}


def test_of_rank_0_it_is_a_plain_embedding():
    layer, ids = lora.Embedding(10, 6), torch.arange(10)
    assert torch.equal(layer(ids), layer.weight)
    assert layer.weight.requires_grad
    assert dict(layer.named_parameters()).keys() == {"weight"}


def test_it_starts_as_the_frozen_one_and_with_a_gradient_for_lora_A():
    layer, ids = lora.Embedding(10, 6, r=2), torch.tensor([1, 7])
    assert torch.equal(layer(ids), F.embedding(ids, layer.weight))
    gradients = outputs_and_gradients(layer, ids)
    assert gradients["lora_A"][:, [1, 7]].abs().min() > 0


def test_the_delta_is_what_the_adapter_adds_to_the_table():
    layer = filled(lora.Embedding(10, 6, r=2, lora_alpha=3, dtype=torch.bfloat16))
    delta = layer.delta()
    assert delta.dtype == torch.float32
    layer.float()
    assert rms_error(layer(torch.arange(10)) - layer.weight, delta) < 1e-6


def test_an_adapter_finer_than_the_table_is_rounded_once():
    layer = filled(lora.Embedding(10, 6, r=2, dtype=torch.bfloat16, lora_dtype=torch.float32))
    ids = torch.arange(10)
    assert torch.equal(layer(ids), (layer.weight + layer.delta()).bfloat16())
    assert outputs_and_gradients(layer, ids)["lora_A"].dtype == torch.float32


def test_a_merged_embedding_computes_the_same_and_unmerges_bit_for_bit():
    layer, ids = filled(lora.Embedding(10, 6, r=2)), torch.arange(10)
    before, expected = layer.weight.clone(), layer(ids)
    lora.merge(layer)
    assert rms_error(layer.eval()(ids), expected) < 1e-6
    assert not torch.equal(layer.weight, before)
    with pytest.raises(ValueError, match="unmerge before training"):
        layer.train()(ids)
    lora.unmerge(layer)
    assert torch.equal(layer.weight, before)


# loralib's defects are not copied


def test_a_sparse_embedding_can_be_trained():
    gradients = outputs_and_gradients(filled(lora.Embedding(10, 6, r=2, sparse=True)), torch.tensor([1, 7]))
    assert gradients["lora_A"].abs().sum() > 0
    with pytest.raises(RuntimeError, match="sparse"):
        outputs_and_gradients(filled(loralib.Embedding(10, 6, r=2, sparse=True)), torch.tensor([1, 7]))


def test_eval_leaves_the_table_alone():
    layer = filled(lora.Embedding(10, 6, r=2))
    before = layer.weight.clone()
    assert layer.eval() is layer
    assert torch.equal(layer.weight, before)


# around


def test_around_takes_over_the_table_and_its_settings():
    plain = nn.Embedding(10, 6, padding_idx=3, max_norm=0.5, scale_grad_by_freq=True)
    layer = lora.Embedding.around(plain, torch.float32, r=2, lora_dropout=0.5)
    assert layer.weight is plain.weight
    assert (layer.padding_idx, layer.max_norm, layer.scale_grad_by_freq) == (3, 0.5, True)
    ids = torch.arange(10)
    assert torch.equal(layer(ids), plain(ids))
    assert torch.equal(filled(layer).train()(ids), layer.eval()(ids))  # no dropout
