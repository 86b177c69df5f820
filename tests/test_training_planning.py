"""What is foretold of a run against what autograd keeps, a step allocates and the products multiply, on small real models."""

import math

import pytest
import torch
from helpers import examples, held_bytes, multiplications, peak_bytes, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

import minilora as lora
from minilora import phi3
from minilora.data.encoding import collate
from minilora.kernels import arithmetic
from minilora.training import planning
from minilora.training.planning import Batch

PROJECTIONS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def adapted(targets=None, config=None, dtype=torch.float32, **fields):
    model = tiny_model(config or tiny_config()).to(dtype)
    lora.inject(model, lora.LoraConfig(r=4, target_modules=targets or PROJECTIONS, **fields))
    return lora.mark_only_lora_as_trainable(model) or model.train()


def ids_of(batch: Batch) -> torch.Tensor:
    return torch.randint(3, 250, (batch.rows, batch.length), generator=torch.Generator().manual_seed(0))


def settings_of(checkpointing=False, packing=False) -> lora.TrainConfig:
    return lora.TrainConfig(gradient_checkpointing=checkpointing, packing=packing)


def bytes_kept(model, batch: Batch, masked: bool) -> int:
    """Of all that a loss holds on to."""
    ids = ids_of(batch)
    documents = {"attention_mask": torch.ones_like(ids).index_fill_(1, torch.arange(batch.length // 2), 2)} if masked else {}
    model(ids, labels=ids, **documents)  # first, for what the thread keeps
    return held_bytes(lambda: model(ids, labels=ids, **documents))


@settings(max_examples=12)
@given(
    rows=st.integers(1, 3),
    length=st.integers(8, 40),
    targets=st.sampled_from([PROJECTIONS, PROJECTIONS[:1], PROJECTIONS[1:], ["q_proj", "v_proj", "down_proj"]]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    packing=st.booleans(),
    multiplies=st.booleans(),
)
def test_the_layers_keep_what_is_foretold(rows, length, targets, dtype, packing, multiplies):
    batch, kept = Batch(rows, length, rows * (length - 1)), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arithmetic, "multiplies", lambda dtype: multiplies or dtype == torch.float32)
        for layers in (2, 3):
            model = adapted(targets, tiny_config(num_hidden_layers=layers), dtype)
            foretold = planning.kept(model, batch, settings_of(packing=packing))
            kept[layers] = foretold, bytes_kept(model, batch, packing)
    foretold, found = (three - two for two, three in zip(kept[2], kept[3], strict=True))
    assert foretold == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("vocabulary", [260, 20_000])
def test_the_peak_of_a_step_is_what_its_allocations_come_to(checkpointing, vocabulary):
    """All that torch allocates in a step, at its most; the layers outweigh the head, or the head the layers."""
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6, "vocab_size": vocabulary}
    model, batch, config = adapted(config=tiny_config(**sizes)), Batch(4, 96, 4 * 95), settings_of(checkpointing)
    model.model.gradient_checkpointing = checkpointing
    ids = ids_of(batch)
    most = peak_bytes(lambda: model(ids, labels=ids).backward())
    foretold = planning.memory(model, batch, config)
    assert foretold.activations + foretold.transient == pytest.approx(most, rel=0.1)


def test_weights_adapter_and_moments_are_counted_as_they_will_be_stored(tiny_checkpoint):
    config = phi3.Phi3Config.read(tiny_checkpoint / "config.json")
    for dtype, quantize in [(torch.float32, None), (torch.bfloat16, None), (torch.float32, "nf4")]:
        with torch.device("meta"):
            bare = phi3.Phi3ForCausalLM(config).to(dtype)
        lora.mark_only_lora_as_trainable(lora.inject(bare, lora.LoraConfig(r=4)))
        found = planning.memory(bare, Batch(1, 8, 7), settings_of(), quantize=quantize)
        model = phi3.load(tiny_checkpoint, dtype, quantize=quantize)
        four_bit = phi3.quantized_weights(model)
        plain = sum(parameter.nbytes for name, parameter in model.named_parameters() if name not in four_bit)
        assert found.weights == plain + sum(part.nbytes for weight in four_bit.values() for part in weight.parts)
        lora.mark_only_lora_as_trainable(lora.inject(model, lora.LoraConfig(r=4)))
        assert found.adapter == found.gradients == sum(p.nbytes for p in model.parameters() if p.requires_grad)
        optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
        ids = ids_of(Batch(1, 8, 7))
        model.train()(ids, labels=ids).backward()
        optimizer.step()
        moments = [state[name].nbytes for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        assert found.moments == sum(moments)


def test_holes_are_those_of_glibcs_heap(monkeypatch):
    model, batch = adapted(), Batch(2, 16, 30)
    monkeypatch.delenv(planning.THRESHOLD, raising=False)
    plain, checkpointed = (planning.memory(model, batch, settings_of(checkpointing)) for checkpointing in (False, True))
    assert plain.holes == round(planning.HOLES * plain.activations) > 0
    assert checkpointed.holes == round(planning.HOLES_CHECKPOINTED * plain.activations) > 0
    assert checkpointed.activations < plain.activations
    assert planning.memory(model, batch, settings_of(), device="cuda").holes == 0
    monkeypatch.setenv(planning.THRESHOLD, "65536")
    assert planning.memory(model, batch, settings_of()).holes == 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_products_multiply_what_is_counted(checkpointing):
    """All matrix products; not attention's own, which is one operation to the profiler. The first layer's x needs no gradient."""
    sizes = {"num_hidden_layers": 8, "hidden_size": 64, "intermediate_size": 192}
    model, batch = adapted(config=tiny_config(**sizes)), Batch(2, 16, 30)
    model.model.gradient_checkpointing = checkpointing
    ids = ids_of(batch)
    counted = 2 * multiplications(lambda: model(ids, labels=ids).backward())
    foretold = planning.layer_flops(model, batch) + planning.head_flops(model, batch.targets)
    foretold += planning.forward_flops(model, batch) if checkpointing else 0
    foretold -= (9 if checkpointing else 7) * batch.tokens * batch.length * 8 * 64  # attention: L layers of H·D
    assert counted == pytest.approx(foretold, rel=0.02)


def test_batches_are_those_of_training():
    dataset, config = (
        examples(10),
        lora.TrainConfig(per_device_train_batch_size=4, num_train_epochs=2, gradient_accumulation_steps=2),
    )
    found, seen = planning.batches_of(dataset, config), []
    model = adapted()
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["labels"]), with_kwargs=True)
    lora.train(model, dataset, config, progress=False)
    assert [(batch.rows, batch.length) for batch in found] == [tuple(labels.shape) for labels in seen]
    assert [batch.targets for batch in found] == [int((labels[:, 1:] != -100).sum()) for labels in seen]


def test_packed_rows_are_batches_too():
    config = lora.TrainConfig(packing=True, max_seq_length=32, per_device_train_batch_size=2)
    found = planning.batches_of(examples(8), config)
    rows = lora.pack(examples(8), 32)
    assert sum(batch.rows for batch in found) == len(rows)
    assert sum(batch.targets for batch in found) == sum(int((collate([row])["labels"][:, 1:] != -100).sum()) for row in rows)


@pytest.mark.parametrize(("dtype", "quantize"), [(torch.float32, None), (torch.bfloat16, "nf4")])
def test_rates_are_found_on_a_model_without_weights(monkeypatch, dtype, quantize):
    monkeypatch.setattr(planning, "SECONDS", 0.0)
    with torch.device("meta"):
        model = phi3.Phi3ForCausalLM(tiny_config()).to(dtype)
    lora.mark_only_lora_as_trainable(lora.inject(model, lora.LoraConfig(r=4, lora_dropout=0.1)))
    rates = planning.calibrate(model, Batch(2, 16, 30), quantize=quantize)
    assert all(0 < rate < math.inf for rate in rates)
    assert all(parameter.is_meta for parameter in model.parameters())
    one, two = (planning.seconds(model, [Batch(2, 16, 30)] * count, settings_of(), rates) for count in (1, 2))
    assert two == pytest.approx(2 * one)
    assert planning.seconds(model, [Batch(2, 16, 30)], settings_of(checkpointing=True), rates) > one


def test_the_plan_is_of_the_batch_that_needs_most_and_adds_up(monkeypatch):
    monkeypatch.setattr(planning, "SECONDS", 0.0)
    said = planning.describe_plan(adapted(), [Batch(2, 16, 30), Batch(2, 64, 126), Batch(1, 8, 7)], settings_of())
    assert "of the largest batch, 2 × 64 tokens" in said
    assert "3 steps of 56 tokens" in said
    assert "with gradient_checkpointing = true: " in said
    figures = {line.split()[0]: float(line.split()[1].replace(",", "")) for line in said.splitlines()[1:9]}
    assert sum(size for name, size in figures.items() if name != "peak") == pytest.approx(figures["peak"], abs=0.5)


def test_a_long_time_is_told_in_hours():
    assert [planning._clock(seconds) for seconds in (3.14, 75, 7322)] == ["3.1 s", "0:01:15", "2:02:02"]
