"""The shapes on disk; tests/test_adapters_adapter_files.py holds what PEFT makes of them."""

import pytest
import torch
from torch import nn

import minilora as lora
from minilora.adapters.dora import DoraLinear
from minilora.adapters.lora_bias import BiasedLinear
from minilora.adapters.offset import OffsetLinear
from minilora.adapters.peft_tensors import by_slices, faults_outside_slices, from_disk, on_disk

SPLIT = {"r": 2, "lora_alpha": 3, "enable_lora": [True, False, True], "out_splits": [3, 4, 5]}
MAKERS = {
    "linear": lambda: lora.Linear(6, 12, r=2),
    "slices": lambda: lora.MergedLinear(6, 12, **SPLIT),
    "dora": lambda: DoraLinear(6, 12, **SPLIT),
    "lora_bias": lambda: BiasedLinear(6, 12, **SPLIT),
    "offset": lambda: OffsetLinear(6, 12, start="pissa", **SPLIT),
    "embedding": lambda: lora.Embedding(7, 6, r=2),
    "convolution": lambda: lora.Conv2d.around(nn.Conv2d(3, 4, (3, 2)), torch.float32, r=2),
}


def filled(make, seed: int):
    torch.manual_seed(0)
    layer = make()
    torch.manual_seed(seed)
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_from_disk_is_the_inverse_of_on_disk(make):
    source, target = filled(make, 1), filled(make, 2)
    stored = on_disk(source)
    with torch.no_grad():
        from_disk(target, stored)
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor), name
    assert all(torch.equal(on_disk(target)[key], tensor) for key, tensor in stored.items())


def test_slices_are_one_pair_with_zeros_elsewhere():
    layer = filled(MAKERS["slices"], 1)
    stored = on_disk(layer)
    expected = torch.zeros(12, 4)
    expected[:3, :2], expected[7:, 2:] = layer.lora_B.detach().split([3, 5])
    assert torch.equal(stored["lora_B.weight"], expected)
    assert torch.equal(stored["lora_A.weight"], layer.lora_A)
    assert by_slices(layer)
    assert not by_slices(filled(MAKERS["linear"], 1))


def test_a_convolution_is_one_into_r_channels_and_a_pointwise_one_out_of_them():
    shapes = {key: tuple(tensor.shape) for key, tensor in on_disk(filled(MAKERS["convolution"], 1)).items()}
    assert shapes == {"lora_A.weight": (2, 3, 3, 2), "lora_B.weight": (4, 2, 1, 1)}


@pytest.mark.parametrize(
    ("kind", "key"),
    [("slices", "lora_B.weight"), ("dora", "lora_magnitude_vector"), ("lora_bias", "lora_B.bias")],
)
def test_what_reaches_beyond_the_slices_is_told(kind, key):
    layer = filled(MAKERS[kind], 1)
    stored = {f"fc.{name}": tensor for name, tensor in on_disk(layer).items()}
    assert faults_outside_slices("fc", layer, stored) == []
    stored[f"fc.{key}"][5] += 0.1
    assert faults_outside_slices("fc", layer, stored) == [
        f"fc.{key} reaches outputs that the model's adapter, by slices, does not adapt"
    ]
