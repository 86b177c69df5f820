import math
from itertools import product

import loralib
import pytest
import torch
import torch.nn.functional as F
from helpers import outputs_and_gradients, rms_error
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.profiler import profile

import minilora as lora
from minilora.kernels.dropout import draw_seed
from minilora.kernels.lora_linear import lora_linear_reference

SUBSETS = [list(enabled) for enabled in product([True, False], repeat=3) if any(enabled)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def filled(layer):
    """The layer with a B that is not zero, as after training."""
    nn.init.normal_(layer.lora_B)
    return layer


TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.05}  # small sums cancel to less than they round to


def assert_same(ours, theirs, x):
    """Equal outputs and gradients of the same parameters, the rounding of the dtype apart."""
    theirs.load_state_dict(ours.state_dict())
    found, expected = outputs_and_gradients(ours, x), outputs_and_gradients(theirs, x)
    assert found.keys() == expected.keys() >= {"y", "x", "lora_A", "lora_B"}
    for name in expected:
        assert found[name].dtype == expected[name].dtype == x.dtype
        assert rms_error(found[name], expected[name]) < TOLERANCE[x.dtype], name


# loralib is the law

SHAPES = {
    "leading": st.lists(st.integers(1, 4), min_size=1, max_size=3),
    "in_features": st.integers(1, 9),
    "r": st.integers(1, 5),
    "lora_alpha": st.sampled_from([1, 6, 0.5]),
    "bias": st.booleans(),
    "fan_in_fan_out": st.booleans(),
    "dtype": st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
}


@given(out_features=st.integers(1, 9), **SHAPES)
def test_linear_computes_as_loralib_does(leading, dtype, **settings):
    ours = filled(lora.Linear(**settings, dtype=dtype))
    theirs = loralib.Linear(**settings, dtype=dtype, merge_weights=False)
    assert ours.scaling == theirs.scaling
    assert_same(ours, theirs, torch.randn(*leading, settings["in_features"], dtype=dtype))


@given(width=st.integers(1, 4), enable_lora=st.lists(st.booleans(), min_size=1, max_size=4).filter(any), **SHAPES)
def test_merged_linear_computes_as_loralib_does(leading, width, dtype, **settings):
    settings |= {"out_features": width * len(settings["enable_lora"]), "dtype": dtype}
    ours = filled(lora.MergedLinear(**settings))
    assert_same(
        ours, loralib.MergedLinear(**settings, merge_weights=False), torch.randn(*leading, settings["in_features"], dtype=dtype)
    )


@pytest.mark.parametrize("library", [lora, loralib])
def test_arguments_may_be_given_by_position_in_loralibs_order(library):
    layer = library.Linear(12, 20, 4, 6, 0.25, True, False)
    assert (layer.r, layer.lora_alpha, layer.fan_in_fan_out, tuple(layer.weight.shape)) == (4, 6, True, (12, 20))
    layer = library.MergedLinear(12, 20, 4, 6, 0.25, [True, False], True, False)
    assert (layer.r, layer.enable_lora, layer.fan_in_fan_out, tuple(layer.weight.shape)) == (4, [True, False], True, (12, 20))
    assert tuple(layer.lora_B.shape) == (10, 4)


PLAIN = {
    "Linear": lambda library, **settings: library.Linear(12, 18, **settings),
    "MergedLinear": lambda library, **settings: library.MergedLinear(12, 18, enable_lora=[True, False], **settings),
}


@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("settings", [{}, {"r": 0, "lora_dropout": 0.5, "fan_in_fan_out": True}])
def test_of_rank_0_it_is_a_plain_layer(make, settings):
    ours, theirs = make(lora, **settings), make(loralib, **settings)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 12)
    assert torch.equal(ours(x), F.linear(x, ours.matrix, ours.bias))
    assert rms_error(ours(x), theirs(x)) < 1e-6  # the stored transpose of theirs is not contiguous
    assert ours.weight.requires_grad
    assert dict(ours.named_parameters()).keys() == {"weight", "bias"}


def test_a_layer_with_an_adapter_freezes_its_weight_and_nothing_else():
    for library in (lora, loralib):
        for layer in (library.Linear(12, 18, r=2), library.MergedLinear(12, 18, r=2, enable_lora=[True, False])):
            trained = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
            assert trained == {"lora_A", "lora_B", "bias"}


# loralib's defects are not copied


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_merged_linear_forms_no_dense_delta_and_takes_no_second_full_product(fan_in_fan_out):
    settings = {"r": 2, "enable_lora": [True, False, True], "fan_in_fan_out": fan_in_fan_out}
    x, flops = torch.randn(50, 60), {}
    for library in (lora, loralib):
        layer = library.MergedLinear(60, 90, **settings)
        with profile(with_flops=True, record_shapes=True) as events:
            layer(x)
        flops[library] = sum(event.flops for event in events.events())
    full, low_rank = 2 * 50 * 60 * 90, 2 * 50 * 2 * (2 * 60 + 60)  # x Wᵀ; x Aᵀ and B of the two slices
    assert full < flops[lora] <= full + low_rank
    assert flops[loralib] >= 2 * full


@pytest.mark.parametrize("enable_lora", [[False, False], [False]])
def test_a_layer_without_an_enabled_slice_is_a_plain_one(enable_lora):
    layer, x = lora.MergedLinear(12, 20, r=4, enable_lora=enable_lora), torch.randn(3, 12)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert dict(layer.named_parameters()).keys() == {"weight", "bias"}
    with pytest.raises(AttributeError, match="lora_A"):
        loralib.MergedLinear(12, 20, r=4, enable_lora=enable_lora)(x)


def test_a_bfloat16_weight_outlives_eval_and_train():
    kept = {}
    for library in (lora, loralib):
        layer = filled(library.Linear(64, 64, r=4, dtype=torch.bfloat16))
        before = layer.weight.clone()
        layer.eval()
        layer.train()
        kept[library] = torch.equal(layer.weight, before)
    assert kept == {lora: True, loralib: False}


def test_eval_and_train_return_the_layer():
    layer = lora.Linear(12, 20, r=4)
    assert layer.eval() is layer.train() is layer
    assert loralib.Linear(12, 20, r=4).eval() is None


@pytest.mark.parametrize("enable_lora", SUBSETS)
def test_merged_linear_of_unequal_splits_is_separate_layers_side_by_side(enable_lora):
    splits = [8, 3, 5]
    fused = filled(lora.MergedLinear(12, 16, r=4, lora_alpha=6, enable_lora=enable_lora, out_splits=splits))
    x = torch.randn(7, 12)
    As = iter(fused.lora_A.split(4))
    Bs = iter(fused.lora_B.split([width for width, enabled in zip(splits, enable_lora, strict=True) if enabled]))
    parts = []
    for weight, bias, enabled in zip(fused.weight.split(splits), fused.bias.split(splits), enable_lora, strict=True):
        A, B = (next(As), next(Bs)) if enabled else (torch.zeros(4, 12), torch.zeros(len(weight), 4))
        part = lora.Linear(12, len(weight), r=4, lora_alpha=6)
        part.load_state_dict({"weight": weight, "bias": bias, "lora_A": A, "lora_B": B})
        parts.append(part(x))
    assert rms_error(fused(x), torch.cat(parts, dim=-1)) < 1e-6


@pytest.mark.parametrize("enable_lora", SUBSETS)
def test_the_delta_is_what_the_adapters_add_to_the_weight(enable_lora):
    layer = filled(lora.MergedLinear(12, 16, r=4, lora_alpha=6, enable_lora=enable_lora, out_splits=[8, 3, 5]).bfloat16())
    delta = layer.delta()
    assert delta.dtype == torch.float32  # whatever the weight's, so that a sum with it is rounded once
    layer.float()
    x = torch.randn(7, 12)
    added = layer(x) - F.linear(x, layer.weight, layer.bias)
    enabled = torch.cat([added[:, start:stop] for start, stop in layer.slices], dim=-1)
    assert rms_error(enabled, x @ delta.T) < 1e-5


# The start


def test_a_layer_starts_as_the_frozen_one():
    x = torch.randn(3, 12)
    for layer in (lora.Linear(12, 18, r=4), lora.MergedLinear(12, 18, 4, enable_lora=[True, False], out_splits=[10, 8])):
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_lora_A_starts_uniform_as_the_weight_of_a_linear_layer():
    A = lora.Linear(400, 8, r=64).lora_A
    bound = 1 / math.sqrt(400)
    assert A.abs().max() <= bound
    assert A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert abs(A.mean().item()) < 0.01 * bound


def test_parameters_have_loralibs_names_and_shapes():
    layer = lora.Linear(12, 20, r=4)
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    assert shapes == {"weight": (20, 12), "bias": (20,), "lora_A": (4, 12), "lora_B": (20, 4)}
    layer = lora.MergedLinear(12, 16, r=4, enable_lora=[True, False, True], out_splits=[8, 3, 5], bias=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    assert shapes == {"weight": (16, 12), "lora_A": (8, 12), "lora_B": (13, 4)}
    assert layer.bias is None


def test_a_layer_shows_its_settings():
    shown = repr(lora.MergedLinear(12, 16, r=4, lora_alpha=6, lora_dropout=0.25, enable_lora=[True, False], out_splits=[10, 6]))
    for setting in ("r=4", "lora_alpha=6", "lora_dropout=0.25", "enable_lora=[True, False]", "out_splits=[10, 6]"):
        assert setting in shown


def test_rslora_scales_by_the_root_of_r():
    assert lora.Linear(12, 20, r=4, lora_alpha=6, use_rslora=True).scaling == 3


def test_adapters_may_be_finer_than_the_weight():
    layer = filled(lora.Linear(12, 20, r=4, dtype=torch.bfloat16, lora_dtype=torch.float32))
    y = layer(torch.randn(3, 12, dtype=torch.bfloat16))
    y.sum().backward()
    assert y.dtype == layer.weight.dtype == torch.bfloat16
    assert layer.lora_A.dtype == layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32


# Dropout


def test_dropout_takes_from_the_adapters_input_only_and_in_training_only():
    layer, x = filled(lora.Linear(12, 20, r=4, lora_dropout=0.5)), torch.randn(6, 12)
    adapter = (x, layer.weight, layer.lora_A, layer.lora_B, layer.scaling, layer.bias)
    whole = lora_linear_reference(*adapter)
    assert rms_error(layer.eval()(x), whole) < 1e-6
    torch.manual_seed(1)
    seed = draw_seed()
    torch.manual_seed(1)
    dropped = layer.train()(x)
    assert rms_error(dropped, lora_linear_reference(*adapter, dropout=0.5, seed=seed)) < 1e-6
    assert rms_error(dropped, whole) > 0.1
    assert not torch.equal(layer(x), dropped)  # another seed each time


def test_the_frozen_part_loses_nothing_to_dropout():
    layer, x = lora.Linear(12, 20, r=4, lora_dropout=0.9).train(), torch.randn(6, 12)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


# Modes


@pytest.mark.parametrize("merged", [False, True])
def test_eval_and_train_never_change_a_parameter(merged):
    layer = filled(lora.MergedLinear(12, 18, r=4, enable_lora=[True, False, True]))
    if merged:
        lora.merge(layer)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.eval().train().train().eval().eval()
    assert layer.merged == merged
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_merged_layer_refuses_training_and_nothing_else():
    layer, x = filled(lora.Linear(12, 20, r=4)), torch.randn(3, 12)
    lora.merge(layer)
    with pytest.raises(ValueError, match="merged into its weight: unmerge before training"):
        layer.train()(x)
    with torch.no_grad():
        assert torch.equal(layer.train()(x), layer.eval()(x))
    lora.unmerge(layer)
    layer.train()(x).sum().backward()


# around


def test_around_takes_over_weight_and_bias_themselves():
    for bias in (True, False):
        plain = nn.Linear(12, 18, bias=bias).eval()
        whole = lora.Linear.around(plain, torch.float32, r=4)
        sliced = lora.MergedLinear.around(plain, torch.float32, r=4, enable_lora=[True, False], out_splits=[10, 8])
        for layer in (whole, sliced):
            assert layer.weight is plain.weight
            assert layer.bias is plain.bias
            x = torch.randn(3, 12)
            assert torch.equal(layer(x), plain(x))


def test_around_makes_the_adapter_where_it_is_told():
    layer = lora.Linear.around(nn.Linear(12, 18), torch.bfloat16, "meta", r=4)
    assert layer.lora_A.is_meta
    assert layer.lora_B.is_meta
    assert layer.weight.device.type == "cpu"


def test_around_keeps_mode_device_and_what_is_frozen():
    plain = nn.Linear(12, 18, device="meta", dtype=torch.bfloat16)
    plain.weight.requires_grad_(False)
    for training in (True, False):
        layer = lora.Linear.around(plain.train(training), torch.float32, r=4)
        assert layer.training == training
    assert not layer.weight.requires_grad
    assert layer.bias.requires_grad
    assert layer.lora_A.device.type == layer.lora_B.device.type == "meta"
    assert layer.lora_A.dtype == torch.float32


# What is refused


@pytest.mark.parametrize("settings", [{"r": -1}, {"r": 4, "lora_dropout": 1.0}, {"r": 0, "lora_dropout": -0.1}])
def test_rank_and_dropout_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=r"r must be at least 0 and lora_dropout lie in \[0, 1\)"):
        lora.Linear(12, 20, **settings)
    with pytest.raises(ValueError, match=r"r must be at least 0 and lora_dropout lie in \[0, 1\)"):
        lora.Linear.around(nn.Linear(12, 20), torch.float32, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"enable_lora": [True, True], "out_splits": [10, 9]},
        {"enable_lora": [True, True], "out_splits": [20]},
        {"enable_lora": [True, True, True]},  # 20 outputs in three equal parts
        {"enable_lora": [False, True], "out_splits": [-4, 24]},
        {"enable_lora": []},
    ],
)
def test_splits_that_do_not_make_up_the_outputs_are_refused(settings):
    with pytest.raises(ValueError, match="out_splits must be"):
        lora.MergedLinear(12, 20, **settings)


def test_an_input_that_does_not_fit_is_refused():
    layer = lora.Linear(12, 20, r=4)
    with pytest.raises(ValueError, match="x must end in K = 12 features"):
        layer(torch.randn(3, 11))
    with pytest.raises(ValueError, match="x and weight must share a dtype"):
        layer(torch.randn(3, 12, dtype=torch.bfloat16))
