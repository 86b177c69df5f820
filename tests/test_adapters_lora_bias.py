import pytest
import torch
from helpers import rms_error
from torch import nn

import minilora as lora
from minilora.adapters.lora_bias import BiasedLinear


def test_the_bias_is_scaled_and_reaches_the_slices_only():
    torch.manual_seed(0)
    layer = BiasedLinear(6, 9, r=2, lora_alpha=3, enable_lora=[True, False, True], out_splits=[2, 3, 4])
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 6)
    before = layer(x)
    nn.init.normal_(layer.lora_bias)
    change = torch.cat([layer.lora_bias[:2], torch.zeros(3), layer.lora_bias[2:]])
    assert rms_error(layer(x) - before, (1.5 * change).expand(5, 9)) < 1e-6


def test_the_bias_learns():
    layer = BiasedLinear(6, 4, r=2, lora_alpha=6, enable_lora=[True])
    layer(torch.randn(5, 6)).sum().backward()
    assert torch.equal(layer.lora_bias.grad, torch.full((4,), 15.0))


def test_the_layer_starts_as_the_frozen_one():
    linear = nn.Linear(6, 4)
    layer = BiasedLinear.around(linear, torch.float32, enable_lora=[True], r=2)
    x = torch.randn(5, 6)
    assert torch.equal(layer(x), linear(x))


def test_merging_is_refused_since_a_weight_holds_no_bias():
    model = nn.Sequential(BiasedLinear(6, 4, r=2, enable_lora=[True]))
    with pytest.raises(ValueError, match="lora_bias cannot be merged into a weight; it stands in 0"):
        lora.merge(model)
