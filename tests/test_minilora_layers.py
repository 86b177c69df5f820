import math
from itertools import product

import loralib
import pytest
import torch
import torch.nn.functional as F
from helpers import rms_error
from torch import nn

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


def outputs_and_gradients(layer, x):
    """y and the gradients of a loss that weighs every output differently, by name."""
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return {"y": y, "x": x.grad, "A": layer.lora_A.grad, "B": layer.lora_B.grad, "bias": layer.bias.grad}


def assert_same(ours, theirs):
    x = torch.randn(2, 5, ours.in_features)
    expected = outputs_and_gradients(theirs, x)
    for name, actual in outputs_and_gradients(ours, x).items():
        assert rms_error(actual, expected[name]) < 1e-6, name


# loralib is the law


def test_linear_computes_as_loralib_does():
    ours = filled(lora.Linear(12, 20, r=4, lora_alpha=6))
    theirs = loralib.Linear(12, 20, r=4, lora_alpha=6, merge_weights=False)
    theirs.load_state_dict(ours.state_dict())
    assert ours.scaling == theirs.scaling == 1.5
    assert_same(ours, theirs)


@pytest.mark.parametrize("enable_lora", [*SUBSETS, [True, False], [True]])
def test_merged_linear_computes_as_loralib_does(enable_lora):
    sizes = {"in_features": 12, "out_features": 18, "r": 4, "lora_alpha": 6, "enable_lora": enable_lora}
    ours = filled(lora.MergedLinear(**sizes))
    theirs = loralib.MergedLinear(**sizes, merge_weights=False)
    theirs.load_state_dict(ours.state_dict())
    assert_same(ours, theirs)


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
    for layer in (lora.Linear(12, 18), lora.MergedLinear(12, 18, enable_lora=[True, False, True], out_splits=[10, 4, 4])):
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
    layer, x = lora.Linear(12, 20, lora_dropout=0.9).train(), torch.randn(6, 12)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


# Modes


@pytest.mark.parametrize("merged", [False, True])
def test_eval_and_train_never_change_a_parameter(merged):
    layer = filled(lora.MergedLinear(12, 18, enable_lora=[True, False, True]))
    if merged:
        lora.merge(layer)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.eval().train().train().eval().eval()
    assert layer.merged == merged
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_merged_layer_refuses_training_and_nothing_else():
    layer, x = filled(lora.Linear(12, 20)), torch.randn(3, 12)
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


@pytest.mark.parametrize("settings", [{"r": 0}, {"r": -1}, {"lora_dropout": 1.0}, {"lora_dropout": -0.1}])
def test_rank_and_dropout_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=r"r must be at least 1 and lora_dropout lie in \[0, 1\)"):
        lora.Linear(12, 20, **settings)
    with pytest.raises(ValueError, match=r"r must be at least 1 and lora_dropout lie in \[0, 1\)"):
        lora.Linear.around(nn.Linear(12, 20), torch.float32, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"enable_lora": [True, True], "out_splits": [10, 9]},
        {"enable_lora": [True, True], "out_splits": [20]},
        {"enable_lora": [True, True, True]},  # 20 outputs in three equal parts
        {"enable_lora": [False, True], "out_splits": [-4, 24]},
    ],
)
def test_splits_that_do_not_make_up_the_outputs_are_refused(settings):
    with pytest.raises(ValueError, match="out_splits must be"):
        lora.MergedLinear(12, 20, **settings)


@pytest.mark.parametrize("enable_lora", [[False, False], []])
def test_a_layer_without_any_adapter_is_refused(enable_lora):
    with pytest.raises(ValueError, match="enable_lora must enable at least one slice"):
        lora.MergedLinear(12, 20, enable_lora=enable_lora)


def test_an_input_that_does_not_fit_is_refused():
    layer = lora.Linear(12, 20)
    with pytest.raises(ValueError, match="x must end in K = 12 features"):
        layer(torch.randn(3, 11))
    with pytest.raises(ValueError, match="x and weight must share a dtype"):
        layer(torch.randn(3, 12, dtype=torch.bfloat16))
