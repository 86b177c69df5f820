"""Adapters beside 4-bit weights: all that they do beside the dequantised weights, and the weights unharmed by it."""

import copy

import peft
import pytest
import torch
from helpers import outputs_and_gradients, rms_error, tiny_config, tiny_model
from torch import nn

import minilora as lora
from minilora import phi3
from minilora.adapters.dora import DoraLinear
from minilora.adapters.four_bit import dense, row_blocks, row_lengths
from minilora.data.encoding import Example
from minilora.kernels.nf4_tensor import NF4Tensor
from minilora.phi3.quantization import dequantize, quantized_weights

named = pytest.mark.parametrize
SLICES = ["q_proj", "v_proj", "gate_proj", "down_proj"]
WHOLE = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
IDS = torch.randint(0, 250, (3, 8), generator=torch.Generator().manual_seed(1))
VARIANTS = {
    "LoRA": {},
    "slices": {"target_modules": SLICES},
    "dropout": {"lora_dropout": 0.5},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "DoRA of slices": {"use_dora": True, "target_modules": SLICES},
    "lora_bias": {"lora_bias": True},
}


def config(**settings) -> lora.LoraConfig:
    return lora.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": WHOLE} | settings)


def quantized(dtype=torch.float32) -> phi3.Phi3ForCausalLM:
    """A tiny model whose projections are 4-bit, with rows that are no whole blocks."""
    model = tiny_model(tiny_config()).to(dtype)
    for path, module in model.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(NF4Tensor.quantize(module.weight), requires_grad=False)
            assert path
    return model


def trained(model: nn.Module, settings: lora.LoraConfig, name: str = "default", seed: int = 0) -> nn.Module:
    """The model with an adapter that does something."""
    torch.manual_seed(seed)
    lora.inject(model, settings, adapter_name=name)
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            nn.init.normal_(parameter, float("magnitude" in parameter_name), 0.1)
    lora.mark_only_lora_as_trainable(model)
    return model


def pair(settings: lora.LoraConfig, dtype=torch.float32) -> tuple[nn.Module, nn.Module]:
    """The same adapter beside 4-bit weights, and beside what they dequantise to."""
    ours = quantized(dtype)
    plain = copy.deepcopy(ours)
    dequantize(plain)
    return trained(ours, settings), trained(plain, settings)


@named("settings", VARIANTS.values(), ids=VARIANTS)
def test_a_training_step_is_that_beside_the_dequantised_weights(settings):
    found = []
    for model in pair(config(**settings)):
        torch.manual_seed(0)
        model.train().zero_grad()
        loss = model(IDS, labels=IDS)
        loss.backward()
        found.append({"loss": loss} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        assert rms_error(tensor, found[1][name]) < 1e-4, name
        assert tensor.abs().max() > 0, name


@named("settings", [VARIANTS["LoRA"], VARIANTS["DoRA of slices"]], ids=["LoRA", "DoRA of slices"])
def test_in_bfloat16_it_is_beside_the_weights_rounded_to_bfloat16(settings):
    ours, plain = pair(config(**settings), torch.bfloat16)
    assert rms_error(ours(IDS), plain(IDS)) < 0.02


@named("settings", [s for name, s in VARIANTS.items() if name != "lora_bias"], ids=[v for v in VARIANTS if v != "lora_bias"])
@named("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_makes_plain_weights_and_unmerging_restores_the_4_bits(settings, dtype):
    model = trained(quantized(dtype), config(**settings)).eval()
    before = {name: [part.clone() for part in weight.parts] for name, weight in quantized_weights(model).items()}
    with torch.no_grad():
        logits = model(IDS)
        lora.merge(model)
        assert model.model.layers[0].mlp.down_proj.weight.dtype == dtype
        assert not {name for name in quantized_weights(model) if name.endswith("down_proj.weight")}
        assert rms_error(model(IDS), logits) < (1e-5 if dtype == torch.float32 else 0.03)
        copied = copy.deepcopy(model)
        for merged in (model, copied.to("cpu")):
            lora.unmerge(merged)
            after = quantized_weights(merged)
            assert after.keys() == before.keys()
            assert all(torch.equal(*parts) for name in before for parts in zip(before[name], after[name].parts, strict=True))
            assert torch.equal(merged(IDS), logits)
    assert not any(weight.requires_grad for weight in quantized_weights(model).values())


def test_merging_rounds_the_sum_once_and_not_the_dequantised_weight_before_it():
    torch.manual_seed(0)
    weight = NF4Tensor.quantize(torch.randn(24, 40)).to(torch.bfloat16)
    linear = nn.Linear(40, 24)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    layer = lora.Linear.around(linear, torch.float32, r=4)
    nn.init.normal_(layer.lora_B)
    expected = (weight.to(torch.float32).dequantize() + layer.delta()).bfloat16()
    lora.merge(nn.Sequential(layer))
    assert torch.equal(layer.weight, expected)


def test_a_merged_model_is_saved_as_a_checkpoint_4_bit_where_it_was_not_merged(tmp_path):
    model = trained(quantized(), config(target_modules=["down_proj"]))
    with torch.no_grad():
        lora.merge(model)
        phi3.save(model, tmp_path / "merged")
        loaded = phi3.load(tmp_path / "merged")
        assert len(quantized_weights(loaded)) == 6
        assert torch.equal(loaded(IDS), model(IDS))


def test_several_adapters_share_the_4_bit_weights():
    """Switching, the base alone, mixed batches, sums and removal, as beside the dequantised weights; with graphs alive too."""
    found = []
    for model in (quantized(), "dequantised"):
        if model == "dequantised":
            model = quantized()
            dequantize(model)
        weights = list(model.parameters())
        trained(model, config(), "one", seed=1)
        trained(model, config(target_modules=SLICES, r=2), "two", seed=2)
        logits = {"two": model(IDS)}
        lora.set_adapter(model, "one")
        logits["one"] = model(IDS)
        with lora.disable_adapter(model):
            logits["base"] = model(IDS)
        with lora.mixed_batch(model, ["one", "two", "__base__"]):
            logits["mixed"] = model(IDS)
        lora.add_weighted_adapter(model, ["one", "two"], [0.7, -0.3], "sum")
        logits["sum"] = model(IDS)
        lora.remove(model)
        logits["removed"] = model(IDS)
        assert [id(weight) for weight in model.parameters()] == [id(weight) for weight in weights]
        found.append(logits)
    ours, plain = found
    for name in ours:
        assert rms_error(ours[name], plain[name]) < 1e-5, name
    assert torch.equal(ours["removed"], ours["base"])
    for row, name in enumerate(("one", "two", "base")):
        assert rms_error(ours["mixed"][row], ours[name][row]) < 1e-5
        assert rms_error(ours["sum"], ours[name]) > 1e-3


def test_training_learns_and_the_adapter_is_saved_and_loaded(tmp_path):
    model = quantized()
    before = copy.deepcopy(quantized_weights(model))
    torch.manual_seed(0)
    lora.inject(model, config())
    lora.mark_only_lora_as_trainable(model)
    data = [Example(row.tolist(), [True] * 8) for row in IDS]
    settings = lora.TrainConfig(max_steps=8, learning_rate=2e-2, loraplus_lr_ratio=4, gradient_checkpointing=True)
    result = lora.train(model, data, settings, output_dir=tmp_path, progress=False)
    assert result.log[-1]["loss"] < 0.9 * result.log[0]["loss"]
    loaded = lora.load_adapter(quantized(), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(loaded(IDS), model(IDS))
    for name, weight in quantized_weights(model).items():
        assert all(map(torch.equal, weight.parts, before[name].parts))


@named("start", ["pissa", "olora"])
def test_a_start_from_the_weight_itself_is_refused(start, tmp_path):
    model = quantized()
    with pytest.raises(ValueError, match=rf'"{start}" starts from the weight itself, and model\.layers\.0\.\S+, .* in 4 bits'):
        lora.inject(model, config(init_lora_weights=start))
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(target_modules=["0"], init_lora_weights=start))
    theirs.save_pretrained(tmp_path)
    net = nn.Sequential(nn.Linear(8, 8))
    net[0].weight = nn.Parameter(NF4Tensor.quantize(net[0].weight), requires_grad=False)
    with pytest.raises(ValueError, match=rf'"{start}" starts from the weight itself, and 0 hold'):
        lora.load_adapter(net, tmp_path)


def test_4_bit_modules_are_not_trained_whole():
    model = quantized()
    with pytest.raises(ValueError, match=r"modules_to_save: model\.layers\.1\.mlp has 4-bit weights, which cannot be trained"):
        lora.inject(model, config(target_modules=["o_proj"], modules_to_save=["layers.1.mlp"]))
    lora.inject(model, config(target_modules=["o_proj"], modules_to_save=["lm_head"]))


@named("shape", [(5, 7), (64, 64), (130, 70)], ids=str)
def test_rows_and_their_lengths_are_those_of_the_dequantised_weight(shape):
    weight = NF4Tensor.quantize(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    plain = weight.dequantize()
    assert torch.equal(dense(weight, torch.float32), plain)
    assert torch.equal(row_lengths(weight, torch.float32), plain.norm(dim=1))
    for start, stop in ((0, shape[0]), (1, shape[0] - 1), (2, 3)):
        for matrix in (weight, plain):
            rows = torch.full((stop - start, shape[1]), torch.nan)
            for place, values in row_blocks(matrix, start, stop):
                rows[place] = values
            assert torch.equal(rows, plain[start:stop])


def test_the_norms_of_dora_hold_a_block_of_the_weight_at_a_time(monkeypatch):
    torch.manual_seed(0)
    linear = nn.Linear(32, 96)
    linear.weight = nn.Parameter(NF4Tensor.quantize(linear.weight), requires_grad=False)
    layer = DoraLinear.around(linear, torch.float32, enable_lora=[True, False, True], out_splits=[32, 32, 32], r=4)
    nn.init.normal_(layer.lora_B)
    norms, largest = layer.norms(), []
    monkeypatch.setattr("minilora.adapters.four_bit.CHUNK", 320)
    original = NF4Tensor.row_blocks
    monkeypatch.setattr(
        NF4Tensor, "row_blocks", lambda *args: (largest.append(rows[1].numel()) or rows for rows in original(*args))
    )
    assert torch.allclose(layer.norms(), norms, rtol=1e-6)
    assert max(largest) == 320
    assert sum(largest) == 2 * 32 * 32
    merged = layer.matrix.dequantize()
    for (start, stop), delta in zip(layer.slices, super(DoraLinear, layer).delta().split(32), strict=True):
        merged[start:stop] += delta
    assert rms_error(norms, torch.cat([merged[start:stop].norm(dim=1) for start, stop in layer.slices])) < 1e-6


def test_outputs_and_gradients_of_a_layer_are_pefts_over_bitsandbytes():
    import bitsandbytes

    torch.manual_seed(0)
    base, x = nn.Linear(64, 48, bias=False), torch.randn(5, 64)
    four = bitsandbytes.nn.Linear4bit(64, 48, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    four.load_state_dict(base.state_dict())
    theirs = peft.get_peft_model(nn.Sequential(four.to("cpu")), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"])).train()
    base.weight = nn.Parameter(NF4Tensor.quantize(base.weight), requires_grad=False)
    ours = lora.Linear.around(base, torch.float32, r=4, lora_alpha=8)
    ours.weight.requires_grad_(False)
    with torch.no_grad():
        A, B = (getattr(theirs.base_model.model[0], name)["default"].weight for name in ("lora_A", "lora_B"))
        nn.init.normal_(B)
        ours.lora_A.copy_(A)
        ours.lora_B.copy_(B)
    found, expected = (outputs_and_gradients(layer, x) for layer in (ours, theirs))
    assert rms_error(found["y"], expected["y"]) < 1e-6
    assert rms_error(found["x"], expected["x"]) < 1e-6
    assert rms_error(found["lora_A"], A.grad) < 1e-6
    assert rms_error(found["lora_B"], B.grad) < 1e-6
