import loralib
import peft
import pytest
import torch
from helpers import outputs_and_gradients, rms_error
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import minilora as lora

KINDS = {1: "Conv1d", 2: "Conv2d", 3: "Conv3d"}
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.05}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def filled(layer):
    """The layer with a lora_B that is not zero, as after training."""
    nn.init.normal_(layer.lora_B)
    return layer


def in_loralib(layer, *arguments, **settings):
    """loralib's layer with the same parameters."""
    theirs = getattr(loralib, type(layer).__name__)(*arguments, merge_weights=False, **settings)
    theirs.load_state_dict({name if "lora_" in name else f"conv.{name}": t for name, t in layer.state_dict().items()})
    return theirs


def assert_same(ours, theirs, x):
    found, expected = outputs_and_gradients(ours, x), outputs_and_gradients(theirs, x)
    assert found.keys() == expected.keys() >= {"y", "x", "lora_A", "lora_B"}
    for name in expected:
        assert found[name].dtype == expected[name].dtype == x.dtype
        assert rms_error(found[name], expected[name]) < TOLERANCE[x.dtype], name


SETTINGS = {
    "groups": st.integers(1, 3),
    "ins": st.integers(1, 3),
    "outs": st.integers(1, 3),
    "r": st.integers(1, 4),
    "lora_alpha": st.sampled_from([1, 6, 0.5]),
    "stride": st.integers(1, 3),
    "padding": st.sampled_from([0, 1, 2]),
    "dilation": st.integers(1, 3),
    "bias": st.booleans(),
    "padding_mode": st.sampled_from(["zeros", "circular"]),
    "dtype": st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
}


# loralib is the law


@given(kernel_size=st.integers(1, 4), size=st.integers(3, 9), **SETTINGS)
def test_conv2d_computes_as_loralib_does(kernel_size, size, groups, ins, outs, dtype, **settings):
    assume(size + 2 * settings["padding"] > settings["dilation"] * (kernel_size - 1))
    arguments, settings = (groups * ins, groups * outs, kernel_size), settings | {"groups": groups, "dtype": dtype}
    ours = filled(lora.Conv2d(*arguments, **settings))
    assert_same(ours, in_loralib(ours, *arguments, **settings), torch.randn(2, groups * ins, size, size + 1, dtype=dtype))


@pytest.mark.parametrize("dimensions", [1, 3])
@given(**SETTINGS)
def test_conv1d_and_conv3d_compute_as_loralib_does_with_the_one_kernel_that_works_there(
    dimensions, groups, ins, outs, dtype, **settings
):
    arguments, settings = (groups * ins, groups * outs, 1), settings | {"groups": groups, "dtype": dtype}
    ours = filled(getattr(lora, KINDS[dimensions])(*arguments, **settings))
    assert_same(ours, in_loralib(ours, *arguments, **settings), torch.randn(2, groups * ins, *[4] * dimensions, dtype=dtype))


@pytest.mark.parametrize("library", [lora, loralib])
def test_arguments_may_be_given_by_position_in_loralibs_order(library):
    layer = library.Conv2d(4, 6, 3, 2, 4, 0.25, False, padding=1, groups=2)
    assert (layer.r, layer.scaling) == (2, 2)
    shapes = {name.removeprefix("conv."): tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    assert shapes == {"weight": (6, 2, 3, 3), "bias": (6,), "lora_A": (6, 12), "lora_B": (9, 6)}
    trained = {name.removeprefix("conv.") for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert trained == {"lora_A", "lora_B", "bias"}


@pytest.mark.parametrize("dimensions", KINDS)
def test_of_rank_0_it_is_a_plain_convolution_and_starts_as_one(dimensions):
    plain = getattr(nn, KINDS[dimensions])(4, 6, 3)
    x = torch.randn(2, 4, *[5] * dimensions)
    for r in (0, 2):
        layer = getattr(lora, KINDS[dimensions])(4, 6, 3, r=r)
        layer.load_state_dict(plain.state_dict(), strict=r == 0)
        assert torch.equal(layer(x), plain(x))
        assert layer.weight.requires_grad == (r == 0)


# Checkpoints


def test_a_checkpoint_of_loralib_loads_whole(tmp_path):
    theirs, ours = (
        nn.Sequential(library.Conv2d(4, 6, 3, r=2), nn.ReLU(), library.Conv2d(6, 2, 1, r=1)) for library in (loralib, lora)
    )
    nn.init.normal_(theirs[0].lora_B)
    torch.save(theirs.state_dict(), tmp_path / "checkpoint.pt")
    assert ours.load_state_dict(torch.load(tmp_path / "checkpoint.pt"), strict=True) is not None
    x = torch.randn(2, 4, 5, 5)
    assert rms_error(ours(x), theirs(x)) < 1e-6
    ours[0].load_state_dict(theirs[0].state_dict())  # a layer alone is a model too


def test_an_adapter_file_of_either_library_loads_in_the_other():
    ours, theirs = filled(lora.Conv2d(4, 6, 3, r=2)), filled(loralib.Conv2d(4, 6, 3, r=2))
    for source, target in ((ours, theirs), (theirs, lora.Conv2d(4, 6, 3, r=2))):
        missing, unexpected = target.load_state_dict(lora.lora_state_dict(source), strict=False)
        assert not unexpected
        assert not any("lora_" in name for name in missing)
        assert torch.equal(target.lora_B, source.lora_B)


# loralib's defects are not copied


def test_the_weight_has_the_plain_layers_name_so_that_the_base_loads():
    base = nn.Sequential(nn.Conv2d(4, 6, 3)).state_dict()
    loaded = {}
    for library in (lora, loralib):
        model = nn.Sequential(library.Conv2d(4, 6, 3, r=2))
        loaded[library] = not model.load_state_dict(base, strict=False).unexpected_keys
    assert loaded == {lora: True, loralib: False}


def test_dropout_takes_from_the_adapters_input_only_and_in_training_only():
    layer, x = filled(lora.Conv2d(4, 6, 3, r=2, lora_dropout=0.5)), torch.randn(2, 4, 5, 5)
    frozen = nn.Conv2d.forward(layer, x)
    whole = frozen + layer._conv_forward(x, layer.delta(), None)
    assert rms_error(layer.eval()(x), whole) < 1e-6
    torch.manual_seed(1)
    dropped = layer.train()(x)
    torch.manual_seed(1)
    assert rms_error(dropped, frozen + layer._conv_forward(nn.functional.dropout(x, 0.5), layer.delta(), None)) < 1e-6
    assert not torch.equal(layer(x), dropped)
    theirs = in_loralib(layer, 4, 6, 3, r=2, lora_dropout=0.5)
    assert theirs.training
    assert rms_error(theirs(x), whole) < 1e-6  # loralib drops nothing


@pytest.mark.parametrize(("dimensions", "kernel_size"), [(1, 3), (2, (1, 3)), (2, (4, 2)), (3, 2), (3, (3, 1, 2))])
@pytest.mark.parametrize("groups", [1, 2])
def test_kernels_that_loralib_refuses_or_fails_on_work(dimensions, kernel_size, groups):
    arguments, settings = (4, 6, kernel_size), {"r": 2, "lora_alpha": 3, "groups": groups, "padding": 1}
    layer, x = filled(getattr(lora, KINDS[dimensions])(*arguments, **settings)), torch.randn(2, 4, *[5] * dimensions)
    k = layer.kernel_size[-1]
    assert tuple(layer.lora_A.shape) == (2 * k, 4 * k)  # as in loralib
    plain = getattr(nn, KINDS[dimensions])(*arguments, groups=groups, padding=1)
    delta = 1.5 * (layer.lora_B @ layer.lora_A).detach().view(plain.weight.shape)
    plain.load_state_dict({"weight": layer.weight + delta, "bias": layer.bias})
    assert rms_error(layer(x), plain(x)) < 1e-6
    assert outputs_and_gradients(layer, x)["lora_A"].abs().min() > 0
    with pytest.raises((AssertionError, RuntimeError)):
        getattr(loralib, KINDS[dimensions])(*arguments, **settings)(x)


def test_the_biases_of_convolutions_learn_and_are_saved_as_those_of_other_layers():
    trained, saved = {}, {}
    for library in (lora, loralib):
        model = nn.Sequential(library.Conv2d(4, 6, 3, r=2))
        library.mark_only_lora_as_trainable(model, "lora_only")
        trained[library] = any("bias" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
        saved[library] = any("bias" in name for name in library.lora_state_dict(model, "lora_only"))
    assert trained == saved == {lora: True, loralib: False}


def test_eval_leaves_the_weight_alone():
    layer = filled(lora.Conv2d(4, 6, 3, r=2, dtype=torch.bfloat16))
    before = layer.weight.clone()
    assert layer.eval() is layer
    assert torch.equal(layer.weight, before)


# Precision and merging


def test_adapters_may_be_finer_than_the_weight():
    layer = filled(lora.Conv2d(4, 6, 3, r=2, lora_dropout=0.5, dtype=torch.bfloat16, lora_dtype=torch.float32))
    x = torch.randn(2, 4, 5, 5, dtype=torch.bfloat16)
    for mode in (True, False):
        gradients = outputs_and_gradients(layer.train(mode), x)
        assert gradients["y"].dtype == torch.bfloat16
        assert gradients["lora_A"].dtype == gradients["lora_B"].dtype == layer.delta().dtype == torch.float32


def test_a_merged_convolution_computes_bit_for_bit_the_same_and_unmerges():
    layer, x = filled(lora.Conv2d(4, 6, 3, r=2, groups=2, dtype=torch.bfloat16)), torch.randn(2, 4, 5, 5).bfloat16()
    before, expected = layer.weight.clone(), layer(x)
    lora.merge(layer)
    assert torch.equal(layer.eval()(x), expected)  # W + ΔW is rounded once in both
    assert not torch.equal(layer.weight, before)
    with pytest.raises(ValueError, match="unmerge before training"):
        layer.train()(x)
    lora.unmerge(layer)
    assert torch.equal(layer.weight, before)


# around


@pytest.mark.parametrize("dimensions", KINDS)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_layer_made_around_a_plain_one_computes_as_pefts(dimensions, use_rslora):
    settings = {"r": 2, "lora_alpha": 3, "use_rslora": use_rslora}
    plain = getattr(nn, KINDS[dimensions])(4, 6, 3, stride=2, padding=1)
    ours = filled(getattr(lora, KINDS[dimensions]).around(plain, torch.float32, **settings))
    assert ours.weight is plain.weight
    assert ours.bias is plain.bias
    theirs = peft.get_peft_model(nn.Sequential(plain), peft.LoraConfig(**settings, target_modules=["0"])).base_model.model[0]
    with torch.no_grad():
        for name, tensor in (("lora_A", ours.lora_A), ("lora_B", ours.lora_B)):
            weight = getattr(theirs, name)["default"].weight
            assert weight.flatten(1).shape == tensor.shape
            weight.copy_(tensor.view(weight.shape))
    x = torch.randn(2, 4, *[5] * dimensions)
    assert rms_error(ours(x), theirs(x)) < 1e-5


def test_around_takes_over_the_settings_of_the_convolution():
    plain = nn.Conv2d(4, 6, (3, 2), stride=2, padding="valid", dilation=2, groups=2, padding_mode="reflect", bias=False)
    layer, x = lora.Conv2d.around(plain, torch.float32, r=2), torch.randn(2, 4, 9, 9)
    assert torch.equal(layer(x), plain(x))
    assert tuple(layer.lora_A.shape) == (2, 2 * 3 * 2)
    assert tuple(layer.lora_B.shape) == (6, 2)
    assert outputs_and_gradients(layer, x)["lora_B"].abs().min() > 0
