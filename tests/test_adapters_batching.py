"""A batch whose rows use different adapters, compared with each row alone, with float64 and with PEFT's adapter_names."""

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import Multiplications, rms_error, tiny_config, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import minilora as lora
from minilora import phi3
from minilora.adapters.batching import Group, grouped_lora_linear
from minilora.phi3.cache import KVCache

WHOLE = {
    "a": {"r": 4, "lora_alpha": 8, "target_modules": ["qkv_proj", "o_proj"]},
    "b": {"r": 2, "lora_alpha": 3, "target_modules": ["o_proj", "down_proj", "lm_head"], "use_rslora": True},
}
SLICED = {"sliced": {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "up_proj"]}}
ROWS = ["b", "__base__", "a", "sliced", "a"]
IDS = torch.arange(55).view(5, 11)


def several(settings: dict, dtype=torch.float32, config=None):
    model = tiny_model(config or tiny_config()).to(dtype)
    for seed, (name, fields) in enumerate(settings.items()):
        lora.inject(model, lora.LoraConfig(**fields), adapter_name=name)
        generator = torch.Generator().manual_seed(seed)
        for _, parameter in filter(lambda item: "lora_" in item[0], model.named_parameters()):
            nn.init.normal_(parameter, 0.0, 0.3, generator)
    return model


def one_by_one(model, names, ids):
    """The logits of each row from a forward of its own."""
    rows = []
    for name, row in zip(names, ids, strict=True):
        if name == "__base__":
            with lora.disable_adapter(model):
                rows.append(model(row[None]))
        else:
            lora.set_adapter(model, name)
            rows.append(model(row[None]))
    return torch.cat(rows)


# The equation


def problem(seed: int, B: int, T: int | None, K: int, ranks: list[int], slices, dtype):
    """x, weight, bias and a factor pair for each rank, scaled so that every term counts."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).mul(shape[-1] ** -0.5).to(dtype).requires_grad_()

    width = sum(stop - start for start, stop in slices)
    x = draw(B, K) if T is None else draw(B, T, K)
    return x, draw(7, K), draw(7), [(draw(len(slices) * r, K), draw(width, r)) for r in ranks]


def dense(x, weight, bias, groups):
    """The equation row by row, with each row's whole weight W + s B A."""
    weights = [weight] * len(x)
    for rows, lora_A, lora_B, scaling, slices, _ in groups:
        delta, row = torch.zeros_like(weight), 0
        for (start, stop), A in zip(slices, lora_A.chunk(len(slices)), strict=True):
            delta = delta + F.pad(scaling * lora_B[row : row + stop - start] @ A, (0, 0, start, len(weight) - stop))
            row += stop - start
        for i in rows.tolist():
            weights[i] = weight + delta
    return torch.stack([F.linear(x_i, W_i, bias) for x_i, W_i in zip(x, weights, strict=True)])


@given(
    seed=st.integers(0, 2**31),
    owners=st.lists(st.integers(-1, 2), min_size=1, max_size=6),
    T=st.none() | st.integers(1, 3),
    ranks=st.lists(st.integers(1, 4), min_size=3, max_size=3),
    slices=st.sampled_from([((0, 7),), ((0, 2), (5, 7)), ((1, 4),)]),
)
def test_the_operation_and_its_gradients_are_the_equations_in_float64(seed, owners, T, ranks, slices):
    x, weight, bias, pairs = problem(seed, len(owners), T, 5, ranks, slices, torch.float64)
    groups = [
        Group(torch.tensor([i for i, owner in enumerate(owners) if owner == g], dtype=torch.int64), A, B, 0.5 + g, slices)
        for g, (A, B) in enumerate(pairs)
    ]
    inputs = [x, weight, bias, *(tensor for pair in pairs for tensor in pair)]
    outputs = grouped_lora_linear(x, weight, bias, groups), dense(x, weight, bias, groups)
    assert rms_error(*outputs) < 1e-14
    dy = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found, expected = (torch.autograd.grad(y, inputs, dy, materialize_grads=True, allow_unused=True) for y in outputs)
    for gradient, other in zip(found, expected, strict=True):
        assert rms_error(gradient, other) < 1e-13


def test_gradients_stand_up_to_finite_differences():
    slices = ((0, 2), (5, 7))
    x, weight, bias, pairs = problem(0, 3, 2, 5, [2, 1], slices, torch.float64)

    def function(x, weight, bias, *factors):
        groups = [Group(torch.tensor(rows), *factors[2 * g : 2 * g + 2], 1.5, slices) for g, rows in enumerate(([2, 0], [1]))]
        return grouped_lora_linear(x, weight, bias, groups)

    assert torch.autograd.gradcheck(function, (x, weight, bias, *pairs[0], *pairs[1]))


def test_the_frozen_product_runs_once_and_no_row_pays_for_anothers_adapter():
    slices = ((0, 7),)
    x, weight, bias, pairs = problem(0, 4, 3, 5, [2, 4], slices, torch.float32)
    groups = [Group(torch.tensor(rows), *pairs[g], 1.0, slices) for g, rows in enumerate(([0], [1, 3]))]
    with torch.no_grad(), Multiplications() as run:
        grouped_lora_linear(x, weight, bias, groups)
    assert run.count == 4 * 3 * 5 * 7 + (1 * 2 + 2 * 4) * 3 * (5 + 7)


def test_dropout_falls_on_the_adapters_view_alone_and_keeps_its_mean():
    slices = ((0, 7),)
    x, weight, _, pairs = problem(0, 1, None, 5, [2], slices, torch.float64)
    torch.manual_seed(0)
    x = x.detach().expand(20000, 5)
    y = grouped_lora_linear(x, weight, None, [Group(torch.arange(20000), *pairs[0], 1.0, slices, 0.5)])
    assert rms_error(y.mean(dim=0), dense(x[:1], weight, None, [Group(torch.tensor([0]), *pairs[0], 1.0, slices)])[0]) < 0.02
    assert not torch.equal(y[0], y[1])


# In a model


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_each_row_gets_what_it_would_alone(dtype, tolerance):
    model = several(WHOLE | SLICED, dtype)
    expected = one_by_one(model, ROWS, IDS)
    with lora.mixed_batch(model, ROWS) as inside:
        assert inside is model
        found = model(IDS)
    for i, name in enumerate(ROWS):
        assert rms_error(found[i], expected[i]) < tolerance, name
    assert rms_error(found, one_by_one(model, ["__base__"] * 5, IDS)) > 0.05


def test_the_logits_are_pefts_for_the_same_adapter_names(tmp_path):
    model = several(WHOLE)
    phi3.save(tiny_model(tiny_config()), tmp_path / "base")
    for name in WHOLE:
        lora.set_adapter(model, name)
        lora.save_adapter(model, tmp_path / name)
    base = transformers.Phi3ForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "a", adapter_name="a").eval()
    theirs.load_adapter(tmp_path / "b", adapter_name="b")
    names = ["b", "__base__", "a", "b", "a"]
    with lora.mixed_batch(model, names):
        assert rms_error(model(IDS), theirs(IDS, adapter_names=names).logits) < 1e-5


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_row_may_use_an_adapter_that_starts_from_the_weight(start):
    settings = {"r": 2, "target_modules": ["o_proj", "v_proj"], "init_lora_weights": start}
    model, names = several({"offset": settings} | WHOLE), ["a", "offset", "__base__"]
    expected = one_by_one(model, names, IDS[:3])
    with lora.mixed_batch(model, names):
        assert rms_error(model(IDS[:3]), expected) < 1e-5


def test_transposed_layers_take_a_mixed_batch_too():
    model, x = nn.Sequential(transformers.pytorch_utils.Conv1D(6, 4)), torch.randn(3, 1, 4)
    for name in ("a", "b"):
        lora.inject(model, lora.LoraConfig(r=2, target_modules=["0"]), adapter_name=name)
        nn.init.normal_(model[0].lora_B)
    names = ["b", "__base__", "a"]
    expected = one_by_one(model, names, x)
    with lora.mixed_batch(model, names):
        assert rms_error(model(x), expected) < 1e-5


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_every_adapter_gets_the_gradients_of_its_own_rows(gradient_checkpointing):
    model = several(WHOLE | SLICED).train()
    weight = torch.randn(5, 11, 1, generator=torch.Generator().manual_seed(0))

    def gradients(logits) -> dict:
        named = model.lora_adapters.named
        factors = {
            (name, path, factor): getattr(layer, factor)
            for name in named
            for path, layer in named[name].layers.items()
            for factor in ("lora_A", "lora_B")
        }
        return dict(zip(factors, torch.autograd.grad((logits * weight).sum(), list(factors.values())), strict=True))

    model.model.gradient_checkpointing = False  # a switch between forward and backward would change what is computed again
    expected = gradients(one_by_one(model, ROWS, IDS))
    model.model.gradient_checkpointing = gradient_checkpointing
    with lora.mixed_batch(model, ROWS):
        found = gradients(model(IDS))
    for key, gradient in found.items():
        assert rms_error(gradient, expected[key]) < 1e-4, key


def test_a_cached_generation_of_mixed_rows_gives_each_its_own_tokens():
    model = several(WHOLE | SLICED)
    expected = one_by_one(model, ROWS, IDS)
    cache = KVCache(model.config, 5, 11, torch.float32, torch.device("cpu"))
    with lora.mixed_batch(model, ROWS), torch.no_grad():
        steps = [model(IDS[:, :4], cache=cache)] + [model(IDS[:, t : t + 1], cache=cache) for t in range(4, 11)]
    assert rms_error(torch.cat(steps, dim=1), expected) < 1e-5


def test_dropout_is_the_adapters_and_only_in_training():
    model = several({"a": WHOLE["a"] | {"lora_dropout": 0.5}})
    with lora.mixed_batch(model, ["a", "__base__"]):
        first, second = model.train()(IDS[:2]), model(IDS[:2])
        assert not torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])
        assert torch.equal(model.eval()(IDS[:2]), model(IDS[:2]))
    assert not model.training


def test_after_the_batch_the_active_adapter_is_back():
    model = several(WHOLE)
    lora.set_adapter(model, "a")
    expected, names = model(IDS), model.state_dict().keys()
    with lora.mixed_batch(model, ["a", "b"]):
        model(IDS[:2])
    assert torch.equal(model(IDS), expected)
    assert model.state_dict().keys() == names
    assert model.lora_adapters.active == "a"


def test_a_tied_model_stays_tied_in_a_mixed_batch():
    head = WHOLE["b"] | {"ensure_weight_tying": False}
    model = several(WHOLE | {"b": head}, config=tiny_config(tie_word_embeddings=True))
    expected = one_by_one(model, ["a", "b"], IDS[:2])
    with lora.mixed_batch(model, ["a", "b"]):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert rms_error(model(IDS[:2]), expected) < 1e-5


def test_rows_without_a_name_and_names_without_an_adapter_are_refused():
    model = several(WHOLE)
    with lora.mixed_batch(model, ["a", "b"]), pytest.raises(ValueError, match=r"names 2 rows, and a layer got \(5, 11, 32\)"):
        model(IDS)
    with lora.mixed_batch(model, ["a", "b"]), pytest.raises(ValueError, match="find it from the logits"):
        model(IDS[:2], labels=IDS[:2])  # the head gets chunks of tokens
    with pytest.raises(ValueError, match="there is no adapter 'z'"), lora.mixed_batch(model, ["a", "z"]):
        pass
    assert model(IDS).isfinite().all()
