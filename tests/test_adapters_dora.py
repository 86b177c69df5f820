import peft
import torch
from helpers import rms_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import minilora as lora
from minilora.adapters.dora import DoraLinear

TENSORS = ("y", "x", "lora_A", "lora_B", "magnitude", "bias")


def fill(*parameters) -> None:
    for parameter in parameters:
        nn.init.normal_(parameter, 0.0, 0.5)


def ours_and_pefts(in_features, out_features, r, bias, use_rslora, dropout):
    """Our layer and PEFT's with the same weight, factors and magnitudes, none of them at its start."""
    torch.manual_seed(0)
    base = nn.Linear(in_features, out_features, bias)
    made = {"r": r, "lora_alpha": 3, "lora_dropout": dropout, "use_rslora": use_rslora}
    ours = DoraLinear.around(base, torch.float32, enable_lora=[True], **made)
    theirs = peft.get_peft_model(nn.Sequential(base), peft.LoraConfig(target_modules=["0"], use_dora=True, **made))
    theirs = theirs.base_model.model[0]
    assert rms_error(ours.lora_magnitude_vector, theirs.lora_magnitude_vector["default"].weight) < 1e-6  # both start at ‖W‖
    fill(ours.lora_A, ours.lora_B, ours.lora_magnitude_vector)
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(ours.lora_A)
        theirs.lora_B["default"].weight.copy_(ours.lora_B)
        theirs.lora_magnitude_vector["default"].weight.copy_(ours.lora_magnitude_vector)
    return ours.train(), theirs.train()


def run(layer, x, dy, parameters) -> dict[str, torch.Tensor]:
    """Output and gradients, the dropout drawn from one seed."""
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    y = layer(x)
    return dict(zip(TENSORS, (y, *torch.autograd.grad(y, [x, *parameters], dy)), strict=False))


@settings(max_examples=25)
@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4)),
    bias=st.booleans(),
    use_rslora=st.booleans(),
    dropout=st.sampled_from([0.0, 0.4]),
    training=st.booleans(),
)
def test_output_and_gradients_are_pefts_with_and_without_dropout(sizes, bias, use_rslora, dropout, training):
    ours, theirs = ours_and_pefts(*sizes, bias, use_rslora, dropout)
    ours.train(training), theirs.train(training)
    x, dy = torch.randn(2, 3, sizes[0]), torch.randn(2, 3, sizes[1])
    A, B, m = (getattr(theirs, name)["default"].weight for name in ("lora_A", "lora_B", "lora_magnitude_vector"))
    base = theirs.base_layer.requires_grad_()
    found = run(ours, x, dy, [ours.lora_A, ours.lora_B, ours.lora_magnitude_vector, *([ours.bias] if bias else [])])
    expected = run(theirs, x, dy, [A, B, m, *([base.bias] if bias else [])])
    for name, tensor in expected.items():
        assert rms_error(found[name], tensor) < 2e-5, name


def test_norms_are_those_of_the_dense_weight_without_making_it():
    layer = DoraLinear(40, 30, r=3, lora_alpha=5, enable_lora=[True, False, True], out_splits=[10, 12, 8])
    fill(layer.lora_B)
    rows = torch.cat([layer.weight[:10], layer.weight[22:]])
    assert rms_error(layer.norms(), torch.linalg.vector_norm(rows + lora.MergedLinear.delta(layer), dim=1)) < 1e-6


def test_slices_are_so_many_layers_of_their_own():
    torch.manual_seed(0)
    fused = DoraLinear(6, 9, r=2, lora_alpha=3, enable_lora=[True, False, True], out_splits=[2, 3, 4])
    fill(fused.lora_A, fused.lora_B, fused.lora_magnitude_vector)
    x, parts, edges = torch.randn(5, 6), [], [(0, 2), (5, 9)]
    splits = zip(fused.lora_A.chunk(2), fused.lora_B.split([2, 4]), fused.lora_magnitude_vector.split([2, 4]), edges, strict=True)
    for A, B, m, (start, stop) in splits:
        part = DoraLinear(6, stop - start, r=2, lora_alpha=3, enable_lora=[True])
        tensors = {"weight": fused.weight[start:stop], "bias": fused.bias[start:stop], "lora_magnitude_vector": m}
        part.load_state_dict(tensors | {"lora_A": A, "lora_B": B})
        parts.append(part(x))
    frozen = nn.functional.linear(x, fused.weight, fused.bias)[:, 2:5]
    assert rms_error(fused(x), torch.cat([parts[0], frozen, parts[1]], dim=1)) < 1e-6


def test_merging_adds_the_magnitudes_too():
    torch.manual_seed(0)
    model = nn.Sequential(DoraLinear(6, 9, r=2, lora_alpha=3, enable_lora=[True, False, True]))
    fill(model[0].lora_B, model[0].lora_magnitude_vector)
    x, weight = torch.randn(5, 6), model[0].weight.detach().clone()
    expected = model(x)
    lora.merge(model)
    assert rms_error(model.eval()(x), expected) < 1e-6
    assert torch.equal(model[0].weight[3:6], weight[3:6])
    lora.unmerge(model)
    assert torch.equal(model[0].weight, weight)


def test_a_row_of_zeros_stays_one():
    """Vocabularies are padded with such rows, and 0 / 0 would be NaN."""
    layer = DoraLinear(4, 3, r=2, enable_lora=[True], bias=False)
    nn.init.zeros_(layer.weight[1].detach())
    layer.reset_lora_parameters()
    y = layer(torch.randn(2, 4))
    y.sum().backward()
    assert torch.equal(y[:, 1], torch.zeros(2))
    assert all(parameter.grad.isfinite().all() for parameter in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector))


def test_a_small_change_of_magnitude_is_not_lost_in_bfloat16():
    torch.manual_seed(0)
    layer = DoraLinear.around(nn.Linear(64, 64, bias=False, dtype=torch.bfloat16), torch.float32, enable_lora=[True], r=2)
    x = torch.randn(50, 64, dtype=torch.bfloat16)
    before = layer(x).double()
    assert layer(x).dtype == torch.bfloat16
    with torch.no_grad():
        layer.lora_magnitude_vector.mul_(1.003)  # bfloat16 has no number between 1 and 1.0078
    grown = (layer(x).double() / before).mean()
    assert 1.002 < grown < 1.004
