import peft
import pytest
import torch
import transformers
from helpers import rms_error, tiny_config, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import minilora as lora
from minilora import phi3

IDS = torch.arange(22).view(2, 11)


def adapted(config=None, dtype=torch.float32, **settings):
    """A tiny Phi-3 with an adapter that is not zero."""
    model = lora.inject(tiny_model(config or tiny_config()).to(dtype), lora.LoraConfig(**{"r": 2, "lora_alpha": 4} | settings))
    generator = torch.Generator().manual_seed(1)
    for layer in layers(model).values():
        for parameter in (layer.lora_A, layer.lora_B):
            nn.init.normal_(parameter, 0.0, 0.3, generator)
    return model


def layers(model) -> dict[str, lora.Linear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, lora.Linear)}


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_bitwise(actual: torch.Tensor, expected: torch.Tensor, name: str = "") -> None:
    assert actual.dtype == expected.dtype
    bits = {4: torch.int32, 2: torch.int16}[actual.element_size()]
    assert torch.equal(actual.view(bits), expected.view(bits)), name  # as bits, so that −0 is not 0 and NaN is itself


def assert_unchanged(model, before) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert_bitwise(tensor, before[name], name)


TARGETS = ["all-linear", ["lm_head", "o_proj"], ["q_proj", "v_proj", "up_proj"], ["k_proj", "down_proj"]]


@pytest.mark.parametrize("target_modules", TARGETS)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_merged_model_computes_what_the_unmerged_one_did(target_modules, use_rslora):
    model = adapted(target_modules=target_modules, use_rslora=use_rslora)
    base, expected = tiny_model(tiny_config())(IDS), model(IDS)
    lora.merge(model)
    assert rms_error(model(IDS), expected) < 1e-5
    assert rms_error(model(IDS), base) > 0.05  # else nothing would have been merged


@pytest.mark.parametrize("target_modules", TARGETS)
def test_a_merged_weight_is_the_float32_sum_rounded_once(target_modules):
    model = adapted(dtype=torch.bfloat16, target_modules=target_modules)
    expected = {}
    for path, layer in layers(model).items():
        expected[path] = layer.weight.detach().float()
        parts = zip(layer.slices, layer.lora_A.chunk(len(layer.slices)), strict=True)
        row = 0
        for (start, stop), A in parts:
            B = layer.lora_B[row : row + stop - start]
            expected[path][start:stop] += (layer.scaling * (B @ A)).detach()
            row += stop - start
    lora.merge(model)
    for path, layer in layers(model).items():
        assert_bitwise(layer.weight.detach(), expected[path].bfloat16(), path)


@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    lora_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    weight_scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e4]),
    delta_scale=st.sampled_from([0.0, 1e-8, 1.0, 1e6]),
    sliced=st.booleans(),
)
def test_merge_then_unmerge_is_bit_exact(seed, dtype, lora_dtype, weight_scale, delta_scale, sliced):
    generator = torch.Generator().manual_seed(seed)
    splits = {"enable_lora": [True, False, True], "out_splits": [7, 2, 4]} if sliced else {}
    kind = lora.MergedLinear if sliced else lora.Linear
    layer = kind(5, 13, r=3, dtype=dtype, lora_dtype=lora_dtype, **splits)
    nn.init.normal_(layer.weight, 0.0, weight_scale, generator)
    nn.init.normal_(layer.lora_B, 0.0, delta_scale, generator)
    with torch.no_grad():
        layer.weight[0, 0] = -0.0
    before, weight = state(layer), layer.weight
    for _ in range(2):
        lora.merge(layer)
        assert layer.merged
        layer.train().eval()
        lora.unmerge(layer)
        assert not layer.merged
        assert layer.weight is weight
        assert_unchanged(layer, before)


@pytest.mark.parametrize("sliced", [False, True])
def test_a_weight_stored_transposed_is_merged_and_unmerged(sliced):
    settings = {"enable_lora": [True, False, True], "out_splits": [7, 2, 4]} if sliced else {}
    layer = (lora.MergedLinear if sliced else lora.Linear)(5, 13, r=3, fan_in_fan_out=True, **settings)
    nn.init.normal_(layer.lora_B)
    x, before = torch.randn(4, 5), state(layer)
    expected = layer(x)
    lora.merge(layer)
    assert not torch.equal(layer.weight, before["weight"])
    assert rms_error(layer.eval()(x), expected) < 1e-6
    lora.unmerge(layer)
    assert_unchanged(layer, before)


def test_layers_without_adapter_are_left_out():
    model = nn.Sequential(lora.Linear(5, 5, r=2), lora.Linear(5, 5), lora.Embedding(5, 5))
    lora.merge(model)
    assert [layer.merged for layer in model] == [True, False, False]
    lora.unmerge(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_itself_after_merge_and_unmerge(dtype):
    model = adapted(dtype=dtype, target_modules=["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"])
    before, logits = state(model), model(IDS)
    lora.merge(model)
    assert not torch.equal(model(IDS), logits)
    lora.unmerge(model)
    assert_unchanged(model, before)
    assert torch.equal(model(IDS), logits)


def test_merging_changes_the_adapted_weights_and_nothing_else():
    model = adapted(target_modules=["o_proj", "q_proj"])
    before = state(model)
    lora.merge(model)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{path}.weight" for path in layers(model)}
    for i in range(2):  # k_proj and v_proj have no adapter
        name = f"model.layers.{i}.self_attn.qkv_proj.weight"
        assert_bitwise(model.state_dict()[name][32:], before[name][32:])


def test_each_state_refuses_the_verb_that_does_not_fit_it():
    model = adapted(target_modules=["o_proj"])
    paths = ", ".join(layers(model))
    before = state(model)
    with pytest.raises(ValueError, match=f"2 adapted layers are not merged: {paths}"):
        lora.unmerge(model)
    assert_unchanged(model, before)
    lora.merge(model)
    before = state(model)
    with pytest.raises(ValueError, match=f"2 adapted layers are merged already: {paths}"):
        lora.merge(model)
    assert_unchanged(model, before)


def test_a_model_merged_in_part_is_refused_whole():
    model = adapted(target_modules=["o_proj"])
    first = model.get_submodule("model.layers.0")
    lora.merge(first)
    before = state(model)
    with pytest.raises(ValueError, match=r"1 adapted layers are merged already: model\.layers\.0\.self_attn\.o_proj$"):
        lora.merge(model)
    with pytest.raises(ValueError, match=r"1 adapted layers are not merged: model\.layers\.1\.self_attn\.o_proj$"):
        lora.unmerge(model)
    assert_unchanged(model, before)


def test_a_model_without_adapter_has_nothing_to_merge():
    for verb in (lora.merge, lora.unmerge):
        with pytest.raises(ValueError, match="the model has no adapter"):
            verb(tiny_model(tiny_config()))


def test_training_while_merged_is_refused():
    model = adapted(target_modules=["o_proj"])
    lora.merge(model)
    with pytest.raises(ValueError, match="unmerge before training"):
        model.train()(IDS, labels=IDS)
    lora.unmerge(model)
    model(IDS, labels=IDS).backward()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 3e38])
def test_a_sum_that_is_not_finite_is_refused_and_nothing_changes(poison):
    model = adapted(target_modules=["q_proj", "o_proj"])
    with torch.no_grad():
        list(layers(model).values())[-1].lora_B[0] = poison
    before = state(model)
    with pytest.raises(ValueError, match=r"NaN or infinity came out in model\.layers\.1\.self_attn\.o_proj: check the adapter"):
        lora.merge(model)
    assert_unchanged(model, before)
    assert not any(layer.merged for layer in layers(model).values())


# Weights that modules share


def test_an_adapter_of_a_tied_head_alone_is_not_merged_since_the_embedding_would_change_with_it():
    model = adapted(tiny_config(tie_word_embeddings=True), target_modules=["lm_head", "o_proj"], ensure_weight_tying=False)
    before = state(model)
    with pytest.raises(ValueError, match=r"do not: model\.embed_tokens\.weight and lm_head\.weight: train it with"):
        lora.merge(model)
    assert_unchanged(model, before)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.filterwarnings("ignore")  # PEFT says itself that its merged tied models go wrong
def test_peft_merges_a_tied_head_into_another_function(tmp_path):
    """Why it is refused: the one weight changes under the embedding too, and the logits are others."""
    phi3.save(tiny_model(tiny_config(tie_word_embeddings=True)), tmp_path)
    base = transformers.Phi3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)).eval()
    with torch.no_grad():
        expected = theirs(IDS).logits
        merged = theirs.merge_and_unload()
    assert rms_error(merged(IDS).logits, expected) > 0.05


def test_a_tied_model_with_adapters_elsewhere_stays_tied_when_merged(tmp_path):
    model = adapted(tiny_config(tie_word_embeddings=True), target_modules=["qkv_proj", "down_proj"])
    expected = model(IDS)
    lora.merge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert rms_error(model(IDS), expected) < 1e-5
    phi3.save(model, tmp_path)
    assert torch.equal(phi3.load(tmp_path)(IDS), model(IDS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_head_and_embedding_with_equal_adapters_are_merged_as_one(tmp_path, dtype):
    """The embedding's ΔW = (B A)ᵀ is the head's B A where the head's factors are the embedding's, crossed over."""
    config = tiny_config(tie_word_embeddings=True)
    model = adapted(config, dtype, target_modules=["embed_tokens", "lm_head", "o_proj"], ensure_weight_tying=False)
    embedding, head = model.model.embed_tokens, model.lm_head
    with torch.no_grad():
        head.lora_A.copy_(embedding.lora_B.T)
        head.lora_B.copy_(embedding.lora_A.T)
    before, expected = state(model), model(IDS)
    lora.merge(model)
    assert head.weight is embedding.weight
    assert rms_error(model(IDS), expected) < {torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    assert rms_error(model(IDS), tiny_model(config).to(dtype)(IDS)) > 0.1
    phi3.save(model, tmp_path)
    assert torch.equal(phi3.load(tmp_path)(IDS), model(IDS))
    lora.unmerge(model)
    assert head.weight is embedding.weight
    assert_unchanged(model, before)


def test_an_adapter_of_a_tied_embedding_alone_is_not_merged():
    model = adapted(tiny_config(tie_word_embeddings=True), target_modules=["embed_tokens"], ensure_weight_tying=False)
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight and lm_head\.weight"):
        lora.merge(model)


def test_one_layer_in_two_places_is_merged_as_one():
    layer = lora.Linear(4, 4, r=2)
    nn.init.normal_(layer.lora_B)
    model, x = nn.Sequential(layer, nn.Tanh(), layer).eval(), torch.randn(3, 4)
    expected = model(x)
    lora.merge(model)
    assert rms_error(model(x), expected) < 1e-5


class TwiceUsed(nn.Module):
    """One weight in two layers, as head and embedding of a tied model have it."""

    def __init__(self, dtype):
        super().__init__()
        self.first, self.second = (lora.Linear(6, 6, r=2, bias=False, dtype=dtype) for _ in range(2))
        self.second.weight = self.first.weight
        nn.init.normal_(self.first.lora_B)
        nn.init.normal_(self.second.lora_B)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shared_weight_is_merged_once_where_all_its_modules_carry_the_same_adapter(dtype):
    torch.manual_seed(0)
    model, x = TwiceUsed(dtype).eval(), torch.randn(3, 6).to(dtype)
    with torch.no_grad():  # the same ΔW from other factors: 2 B and A / 2
        model.second.lora_B.copy_(2 * model.first.lora_B)
        model.second.lora_A.copy_(model.first.lora_A / 2)
    before, expected = state(model), model(x)
    weight = model.first.weight.detach().float() + model.first.delta()
    lora.merge(model)
    assert model.first.weight is model.second.weight
    assert_bitwise(model.first.weight.detach(), weight.to(dtype))  # ΔW was added once
    assert rms_error(model(x), expected) < 8 * torch.finfo(dtype).eps
    lora.unmerge(model)
    assert model.first.weight is model.second.weight
    assert_unchanged(model, before)


def test_unlike_adapters_of_a_shared_weight_are_refused_however_small_their_difference():
    torch.manual_seed(0)
    model = TwiceUsed(torch.bfloat16)
    with torch.no_grad():
        model.second.lora_A.copy_(model.first.lora_A)
        model.second.lora_B.copy_(model.first.lora_B)
        model.second.lora_B[0, 0] *= 1.05
    before = state(model)
    with pytest.raises(ValueError, match=r"first\.weight and second\.weight"):
        lora.merge(model)
    assert_unchanged(model, before)


def test_a_merged_model_may_move_and_change_its_dtype_before_it_is_unmerged():
    model = adapted(target_modules=["o_proj"])
    base = tiny_model(tiny_config()).double().state_dict()
    lora.merge(model)
    assert not any("base_weight" in name for name in model.state_dict())
    model.double()
    lora.unmerge(model)
    for path, layer in layers(model).items():
        assert torch.equal(layer.weight, base[f"{path}.weight"])


# In transformers


@pytest.mark.parametrize("target_modules", ["all-linear", ["q_proj", "v_proj", "lm_head"]])
def test_a_merged_and_saved_model_is_the_same_in_transformers(tmp_path, target_modules):
    model = adapted(target_modules=target_modules)
    expected = model(IDS)
    lora.merge(model)
    phi3.save(model, tmp_path / "merged")
    theirs = transformers.Phi3ForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert rms_error(theirs(IDS).logits, expected) < 1e-5
    assert torch.equal(phi3.load(tmp_path / "merged")(IDS), model(IDS))
