import copy

import peft
import pytest
import torch
from helpers import rms_error
from torch import nn

import minilora as lora
from minilora.adapters.offset import STARTS, OffsetLinear, as_saved, olora, pissa

named = pytest.mark.parametrize
starts = named("start", STARTS)


@named("use_rslora", [False, True])
@starts
def test_the_start_is_pefts(start, use_rslora):
    torch.manual_seed(0)
    base = nn.Linear(12, 9)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], use_rslora=use_rslora, init_lora_weights=start)
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config).base_model.model[0]
    scaling = 6 / (2 if use_rslora else 4)
    A, B = STARTS[start](base.weight.detach(), 4, scaling)
    # Singular vectors have no sign of their own: what counts is the product.
    assert rms_error(B @ A, theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight) < 1e-5
    assert rms_error(base.weight - scaling * B @ A, theirs.base_layer.weight) < 1e-5


def test_pissa_is_the_best_approximation_of_its_rank():
    weight = torch.randn(9, 12, generator=torch.Generator().manual_seed(0))
    A, B = pissa(weight, 4, scaling=2.0)
    assert torch.linalg.matrix_norm(weight - 2 * B @ A, 2) == pytest.approx(torch.linalg.svdvals(weight)[4].item(), rel=1e-5)


def test_oloras_B_has_orthonormal_columns():
    A, B = olora(torch.randn(9, 12, generator=torch.Generator().manual_seed(0)), 4, scaling=2.0)
    assert A.shape == (4, 12)
    assert rms_error(B.T @ B, torch.eye(4)) < 1e-6


@starts
def test_training_is_pefts(start):
    """The same gradients at every step, though the start stays in the weight here."""
    torch.manual_seed(0)
    base, x, wanted = nn.Linear(12, 9), torch.randn(20, 12), torch.randn(20, 9)
    ours = OffsetLinear.around(copy.deepcopy(base), torch.float32, start=start, enable_lora=[True], r=3, lora_alpha=6)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights=start)
    theirs = peft.get_peft_model(nn.Sequential(base), config)
    for layer, factors in (
        (ours, [ours.lora_A, ours.lora_B]),
        (theirs, [parameter for name, parameter in theirs.named_parameters() if "lora_" in name]),
    ):
        optimizer = torch.optim.SGD(factors, lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.mse_loss(layer(x), wanted).backward()
            optimizer.step()
    assert rms_error(ours(x), theirs(x)) < 1e-5
    assert rms_error(ours(x), base(x)) > 1e-2


@starts
def test_the_layer_starts_as_the_frozen_one_and_leaves_its_weight(start):
    torch.manual_seed(0)
    linear = nn.Linear(12, 9)
    weight = linear.weight.detach().clone()
    layer = OffsetLinear.around(linear, torch.float32, start=start, enable_lora=[True, True], out_splits=[4, 5], r=3)
    x = torch.randn(5, 12)
    assert rms_error(layer(x), linear(x)) < 1e-6
    assert layer.weight is linear.weight
    assert torch.equal(linear.weight, weight)
    assert layer.lora_A.detach().norm() > 0.1


@starts
def test_the_whole_adapter_is_one_pair_of_twice_the_rank(start):
    torch.manual_seed(0)
    layer = OffsetLinear(12, 9, start=start, r=2, lora_alpha=3, enable_lora=[True, False, True], out_splits=[4, 2, 3])
    nn.init.normal_(layer.lora_A)
    plain = lora.MergedLinear(12, 9, r=4, lora_alpha=6, enable_lora=[True, False, True], out_splits=[4, 2, 3])
    x = torch.randn(5, 12)
    A, B = layer.factors()
    plain.load_state_dict({"weight": layer.weight, "bias": layer.bias, "lora_A": A, "lora_B": B})
    assert rms_error(plain(x), layer(x)) < 1e-6
    assert rms_error(plain.delta(), layer.delta()) < 1e-6
    other = OffsetLinear(12, 9, start=start, r=2, lora_alpha=3, enable_lora=[True, False, True], out_splits=[4, 2, 3])
    with torch.no_grad():
        other.set_factors(A, B)
    for name in ("lora_A", "lora_B", "lora_A_start", "lora_B_start"):
        assert torch.equal(getattr(other, name), getattr(layer, name))


def test_dropout_is_refused():
    with pytest.raises(ValueError, match=r"starts by pissa must have lora_dropout 0, not 0\.1"):
        OffsetLinear(12, 9, r=2, start="pissa", enable_lora=[True], lora_dropout=0.1)


@named("use_rslora", [False, True])
def test_the_saved_config_has_the_same_scaling(use_rslora):
    config = lora.LoraConfig(r=3, lora_alpha=5, use_rslora=use_rslora, init_lora_weights="pissa", rank_pattern={"o_proj": 2})
    saved = as_saved(config)
    for path in ("o_proj", "down_proj"):
        assert saved.rank(path) == 2 * config.rank(path)
        scales = [c.alpha(path) / c.rank(path) ** (0.5 if use_rslora else 1) for c in (config, saved)]
        assert scales[0] == pytest.approx(scales[1])
    assert saved.init_lora_weights is True
