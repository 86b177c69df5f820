"""LoftQ: the start that PEFT's own code finds, nearer to the original weight, and kept apart from 16-bit bases."""

import json

import bitsandbytes.functional
import pytest
import torch
from helpers import rms_error, tiny_config, tiny_model
from peft.utils.loftq_utils import _low_rank_decomposition
from safetensors import safe_open
from torch import nn

import minilora as lora
from minilora import phi3
from minilora.adapters.layers import adapted_layers
from minilora.adapters.loftq import start_by_loftq
from minilora.kernels.nf4_tensor import NF4Tensor

named = pytest.mark.parametrize
TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
IDS = torch.randint(0, 250, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loftq") / "checkpoint"
    phi3.save(tiny_model(tiny_config()), folder)
    return folder


def config(iterations=1, **settings) -> lora.LoraConfig:
    loftq = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": iterations}}
    return lora.LoraConfig(**{"r": 8, "lora_alpha": 8, "target_modules": TARGETS} | loftq | settings)


def started(checkpoint, settings) -> nn.Module:
    return lora.inject(phi3.load(checkpoint, quantize="nf4"), settings, original=phi3.Checkpoint(checkpoint).tensor)


def of_peft(weight, r, iterations):
    """PEFT's loop, loftq_init, which runs on a GPU only, from its own parts, with the scales quantised too: Q, L, R."""
    rest = weight
    for _ in range(iterations):
        codes, state = bitsandbytes.functional.quantize_4bit(rest, blocksize=64, quant_type="nf4", compress_statistics=True)
        Q = bitsandbytes.functional.dequantize_4bit(codes, state)
        found = _low_rank_decomposition(weight - Q, reduced_rank=r)
        rest = weight - found["L"] @ found["R"]
    return Q, found["L"], found["R"]


@named("use_rslora", [False, True])
@named("iterations", [1, 3])
def test_the_start_is_pefts(iterations, use_rslora):
    torch.manual_seed(0)
    weight = torch.randn(48, 64)
    linear = nn.Linear(64, 48, bias=False)
    linear.weight = nn.Parameter(NF4Tensor.quantize(weight), requires_grad=False)
    layer = lora.Linear.around(linear, torch.float32, r=8, lora_alpha=4, use_rslora=use_rslora)
    start_by_loftq({"path": layer}, {"path.weight": weight}.__getitem__, iterations)
    Q, L, R = of_peft(weight, 8, iterations)
    # Singular vectors have no sign of their own: what counts is the product. Ours holds for any scaling, PEFT's for 1.
    assert rms_error(layer.delta(), L @ R) < 1e-3
    assert rms_error(layer.weight.dequantize(), Q) < 1e-3


def distances(checkpoint, model) -> list[float]:
    layers, original = adapted_layers(model), phi3.Checkpoint(checkpoint).tensor
    found = []
    for path, layer in layers.items():
        weight = layer.weight.dequantize()
        for (start, stop), part in zip(layer.slices, layer.delta().split([b - a for a, b in layer.slices]), strict=True):
            weight[start:stop] += part
        found.append(rms_error(weight, original(f"{path}.weight")))
    return found


def test_every_layer_starts_nearer_to_the_original_and_nearer_still_with_more_iterations(checkpoint):
    plain = distances(
        checkpoint, lora.inject(phi3.load(checkpoint, quantize="nf4"), config(init_lora_weights=True, loftq_config={}))
    )
    once, thrice = (distances(checkpoint, started(checkpoint, config(iterations))) for iterations in (1, 3))
    assert all(a < 0.9 * b for a, b in zip(once, plain, strict=True))
    assert sum(thrice) < 0.98 * sum(once)
    original, logits = phi3.load(checkpoint)(IDS), phi3.load(checkpoint, quantize="nf4")(IDS)
    assert rms_error(started(checkpoint, config(lora_alpha=24))(IDS), original) < 0.9 * rms_error(logits, original)


def test_slices_start_so_too_and_rows_outside_them_stay(checkpoint):
    once, thrice = (started(checkpoint, config(n, target_modules=["q_proj", "v_proj"])) for n in (1, 3))
    base = phi3.load(checkpoint, quantize="nf4")
    layers = [model.model.layers[1].self_attn.qkv_proj for model in (once, base, thrice)]
    assert type(layers[0]) is lora.MergedLinear
    assert all(map(torch.equal, layers[0].weight.parts, layers[1].weight.parts))
    assert not torch.equal(layers[2].weight.codes, layers[1].weight.codes)
    W, (once, base, thrice) = (
        phi3.load(checkpoint).model.layers[1].self_attn.qkv_proj.weight,
        (x.weight.dequantize() for x in layers),
    )
    assert rms_error(base[32:48], W[32:48]) == rms_error(once[32:48], W[32:48])
    assert sum(distances(checkpoint, started(checkpoint, config(target_modules=["q_proj", "v_proj"])))) < 0.9 * 2 * rms_error(
        base, W
    )


def test_one_iteration_leaves_the_base_as_it_is_and_its_adapter_loads_beside_any_that_was_quantised_alike(checkpoint, tmp_path):
    model = started(checkpoint, config(lora_dropout=0.05))
    lora.save_adapter(model, tmp_path / "adapter")
    loaded = lora.load_adapter(phi3.load(checkpoint, quantize="nf4"), tmp_path / "adapter")
    assert torch.equal(loaded(IDS), model.eval()(IDS))
    assert loaded.lora_config == model.lora_config
    stored = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert stored["init_lora_weights"] is True  # PEFT would start it anew otherwise
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert "loftq" in file.metadata()["minilora"]


def test_with_more_iterations_the_4_bit_base_is_saved_too_and_both_together_are_the_model(checkpoint, tmp_path):
    model = started(checkpoint, config(3))
    lora.save_adapter(model, tmp_path / "adapter")
    with lora.disable_adapter(model):
        phi3.save(model, tmp_path / "base")
    loaded = lora.load_adapter(phi3.load(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(loaded(IDS), model(IDS))


def test_a_16_bit_base_is_refused(checkpoint, tmp_path):
    message = r'"loftq" is for 4-bit weights, which model\.layers\.0\.\S+, .* have not: load the model with quantize="nf4"'
    with pytest.raises(ValueError, match=message):
        lora.inject(phi3.load(checkpoint), config(), original=phi3.Checkpoint(checkpoint).tensor)
    lora.save_adapter(started(checkpoint, config()), tmp_path / "adapter")
    with pytest.raises(ValueError, match=message):
        lora.load_adapter(phi3.load(checkpoint), tmp_path / "adapter")


def test_the_original_must_be_there_and_be_the_one(checkpoint):
    with pytest.raises(ValueError, match=r"needs the weights as they were before: inject\(…, original=…\)"):
        lora.inject(phi3.load(checkpoint, quantize="nf4"), config())
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.qkv_proj\.weight is another weight than the 4-bit one"):
        lora.inject(
            phi3.load(checkpoint, quantize="nf4"), config(), original=dict(tiny_model(tiny_config(), 1).named_parameters()).get
        )
    with pytest.raises(ValueError, match=r"qkv_proj\.weight must be floating \(64, 32\), not torch\.float32 \(3,\)"):
        lora.inject(phi3.load(checkpoint, quantize="nf4"), config(), original=lambda name: torch.zeros(3))


def test_a_base_that_other_adapters_use_is_not_changed(checkpoint):
    model = started(checkpoint, config())
    with pytest.raises(ValueError, match="a loftq_iter above 1 changes the 4-bit weights, which the model's other adapters"):
        lora.inject(model, config(2), adapter_name="second", original=phi3.Checkpoint(checkpoint).tensor)
    lora.inject(model, config(1, r=4), adapter_name="second", original=phi3.Checkpoint(checkpoint).tensor)


@named(
    ("settings", "message"),
    [
        ({"loftq_config": {"loftq_bits": 8}}, "loftq_config must hold loftq_bits = 4 and a loftq_iter of at least 1"),
        ({"loftq_config": {"loftq_iter": 0}}, "loftq_config must hold"),
        ({"loftq_config": {"bits": 4}}, "loftq_config must hold"),
        ({"init_lora_weights": True}, 'loftq_config needs init_lora_weights = "loftq"'),
        ({"use_dora": True}, "use_dora needs init_lora_weights = True"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)
