import copy
import json

import peft
import pytest
import torch
import transformers
from helpers import load_in_transformers, outputs_and_gradients, rms_error, tiny_config, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import minilora as lora
from minilora import phi3
from minilora.adapters.adapter_files import CONFIG, TENSORS
from minilora.adapters.trainable import count_parameters
from minilora.commands import describe_adapter
from minilora.kernels.linear import Linear as PlainLinear

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of tied embeddings whatever it is asked for
IDS = torch.arange(22).view(2, 11)
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
EITHER = [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]]


def fresh(**fields):
    return tiny_model(tiny_config(tie_word_embeddings=True, **fields))


def fill(tensors) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in tensors:
            nn.init.normal_(tensor, 0.0, 0.3, generator)


def adapted(model=None, name: str = "default", **settings):
    """A tied model with a tied adapter that is not zero."""
    settings = {"r": 3, "lora_alpha": 6, "target_modules": ["embed_tokens", "o_proj"]} | settings
    model = lora.inject(model or fresh(), lora.LoraConfig(**settings), adapter_name=name)
    lora.mark_only_lora_as_trainable(model)
    fill(parameter for parameter in model.parameters() if parameter.requires_grad)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied") / "base"
    phi3.save(fresh(), folder)
    return folder


def theirs(folder, **settings):
    """PEFT's adapter of the tied model in transformers, filled."""
    settings = {"task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 6, "ensure_weight_tying": True} | settings
    model = peft.get_peft_model(load_in_transformers(folder), peft.LoraConfig(**settings)).eval()
    fill(parameter for parameter in model.parameters() if parameter.requires_grad)
    return model


def test_the_line_about_what_is_trained_says_what_follows():
    model = adapted(target_modules=["lm_head"])
    assert describe_adapter(model, model.lora_config).endswith("; lm_head shares the embedding's")
    model = adapted(target_modules=["o_proj"])
    assert "shares" not in describe_adapter(model, model.lora_config)


# In PEFT


@pytest.mark.parametrize("tying", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head", "o_proj"]},
        {"target_modules": ["embed_tokens", "lm_head"], "use_rslora": True},
        {"target_modules": ".*embed_tokens|.*o_proj", "lora_dropout": 0.1},
        {"target_modules": "lm_head|.*qkv_proj"},
        {"target_modules": ["lm_head"], "rank_pattern": {"embed_tokens": 2, "lm_head": 2}},
        {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["o_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["o_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=str,
)
def test_tied_adapters_travel_both_ways_as_the_same_function(folder, tmp_path, settings, tying):
    expected = theirs(folder, ensure_weight_tying=tying, **settings)
    expected.save_pretrained(tmp_path / "theirs")
    ours = lora.load_adapter(fresh(), tmp_path / "theirs")
    assert rms_error(ours(IDS), expected(IDS).logits) < 1e-5
    assert rms_error(ours(IDS), fresh()(IDS)) > 0.05
    lora.save_adapter(ours, tmp_path / "ours")
    written, read = load_file(tmp_path / "ours" / TENSORS), load_file(tmp_path / "theirs" / TENSORS)
    if tying:
        assert json.loads((tmp_path / "ours" / CONFIG).read_text())["ensure_weight_tying"] is True
        assert written.keys() == {name for name in read if "base_layer" not in name}
    assert all(torch.equal(tensor, read[name]) for name, tensor in written.items())
    again = peft.PeftModel.from_pretrained(load_in_transformers(folder), tmp_path / "ours").eval()
    assert rms_error(again(IDS).logits, ours(IDS)) < 1e-5
    assert torch.equal(lora.load_adapter(fresh(), tmp_path / "ours")(IDS), ours(IDS))
    assert lora.remove(ours).lm_head.weight is ours.model.embed_tokens.weight


def test_a_file_without_the_field_is_not_tied(folder, tmp_path):
    expected = theirs(folder, ensure_weight_tying=False, target_modules=["embed_tokens"])
    expected.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / CONFIG).read_text())
    del raw["ensure_weight_tying"]
    (tmp_path / CONFIG).write_text(json.dumps(raw))
    ours = lora.load_adapter(fresh(), tmp_path)
    assert type(ours.lm_head) is PlainLinear
    assert rms_error(ours(IDS), expected(IDS).logits) < 1e-5


def test_a_file_by_slices_of_a_version_without_the_field_is_not_tied(tmp_path):
    model = adapted(target_modules=["q_proj", "lm_head"], ensure_weight_tying=False)
    lora.save_adapter(model, tmp_path)
    raw = json.loads((tmp_path / CONFIG).read_text())
    del raw["ensure_weight_tying"]
    config = vars(model.lora_config) | {}
    del config["ensure_weight_tying"]
    (tmp_path / CONFIG).write_text(json.dumps(raw))
    save_file(load_file(tmp_path / TENSORS), tmp_path / TENSORS, {"minilora": json.dumps(config)})
    assert torch.equal(lora.load_adapter(fresh(), tmp_path)(IDS), model(IDS))


@pytest.mark.parametrize("target_modules", EITHER, ids=str)
def test_the_gradients_of_both_uses_add_up_to_those_that_peft_finds_apart(folder, tmp_path, target_modules):
    expected = theirs(folder, target_modules=target_modules)
    expected.save_pretrained(tmp_path)
    ours = lora.load_adapter(fresh(), tmp_path)
    lora.mark_only_lora_as_trainable(ours)
    ours(IDS, labels=IDS).backward()
    expected(IDS, labels=IDS).loss.backward()
    embedding, head = expected.base_model.model.model.embed_tokens, expected.base_model.model.lm_head
    of_A, of_B = embedding.lora_embedding_A["default"].grad, embedding.lora_embedding_B["default"].grad
    for gradient in (of_A, of_B):
        assert gradient.abs().max() > 0
    assert rms_error(ours.lm_head.lora_A.grad, of_A + head.lora_B["default"].weight.grad.T) < 1e-5
    assert rms_error(ours.lm_head.lora_B.grad, of_B + head.lora_A["default"].weight.grad.T) < 1e-5


# One set of parameters


@pytest.mark.parametrize("target_modules", EITHER, ids=str)
def test_embedding_and_head_train_the_same_parameters_counted_and_stepped_once(target_modules):
    model = adapted(target_modules=target_modules)
    embedding, head = model.model.embed_tokens, model.lm_head
    assert head.lora_A is embedding.lora_A
    assert head.lora_B is embedding.lora_B
    assert head.weight is embedding.weight
    assert count_parameters(model)[0] == 3 * (260 + 32)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 2
    model(IDS, labels=IDS).backward()
    before = [parameter.detach().clone() for parameter in trained]
    torch.optim.SGD(trained, lr=0.1).step()
    for parameter, start in zip(trained, before, strict=True):
        assert rms_error(start - parameter, 0.1 * parameter.grad) < 1e-4
    assert all(map(torch.equal, head.factors(), (embedding.lora_B.T, embedding.lora_A.T)))


def test_an_adapter_starts_as_the_frozen_model_and_can_start_anew():
    model = lora.inject(fresh(), lora.LoraConfig(r=3, target_modules=["lm_head"]))
    assert rms_error(model(IDS), fresh()(IDS)) < 1e-6
    fill([model.lm_head.lora_A])
    assert rms_error(model(IDS), fresh()(IDS)) > 0.05
    for layer in (model.lm_head, model.model.embed_tokens):
        layer.reset_lora_parameters()
        assert not layer.lora_A.any()
        assert layer.lora_B.any()


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 20), st.booleans(), st.booleans(), st.sampled_from([0.0, 0.5]))
def test_a_tied_layer_is_a_linear_one_with_the_factors_crossed_over(r, features, vocabulary, use_rslora, bias, dropout):
    settings = {"r": r, "lora_alpha": 6, "lora_dropout": dropout, "use_rslora": use_rslora}
    model = nn.ModuleDict({"embedding": nn.Embedding(vocabulary, features), "head": nn.Linear(features, vocabulary, bias)})
    model["head"].weight = model["embedding"].weight
    adapted(model, target_modules=["head"], **settings)
    tied, plain = model["head"], lora.Linear(features, vocabulary, **settings, bias=bias)
    plain.load_state_dict(tied.state_dict() | {"lora_A": tied.lora_B.T, "lora_B": tied.lora_A.T})
    found = []
    for layer in (tied, plain):
        torch.manual_seed(0)
        found.append(outputs_and_gradients(layer, torch.linspace(-1, 1, 3 * features).view(3, features)))
    ours, expected = found
    assert torch.equal(ours["y"], expected["y"])
    assert torch.equal(ours["x"], expected["x"])
    assert rms_error(ours["lora_A"], expected["lora_B"].T) < 1e-5
    assert rms_error(ours["lora_B"], expected["lora_A"].T) < 1e-5
    assert torch.equal(tied.delta(), model["embedding"].delta())
    assert rms_error(tied.delta(), plain.delta()) < 1e-5
    assert tied.lora_shapes() == (tied.lora_A.shape, tied.lora_B.shape)


def test_a_copy_of_the_model_shares_within_itself_and_with_no_other():
    model = adapted()
    other = copy.deepcopy(model)
    assert other.lm_head.lora_A is other.model.embed_tokens.lora_A
    assert other.lm_head.lora_A is not model.lm_head.lora_A
    assert torch.equal(other(IDS), model(IDS))


def test_a_state_dict_takes_the_adapter_to_another_model():
    model, other = adapted(), lora.inject(fresh(), adapted().lora_config)
    found = lora.lora_state_dict(model)
    assert {f"{path}.{name}" for path in (EMBEDDING, HEAD) for name in ("lora_A", "lora_B")} <= found.keys()
    other.load_state_dict(found, strict=False)
    assert torch.equal(other(IDS), model(IDS))


def test_modules_trained_whole_are_one_copy_and_apart_when_asked_so():
    model = adapted(target_modules=["o_proj"], modules_to_save=["lm_head"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.requires_grad
    assert count_parameters(model)[0] == 2 * 3 * (32 + 32) + 260 * 32
    model(IDS, labels=IDS).backward()
    apart = adapted(target_modules=["o_proj"], modules_to_save=["lm_head"], ensure_weight_tying=False)
    assert apart.lm_head.weight is not apart.model.embed_tokens.weight
    assert not apart.model.embed_tokens.weight.requires_grad


def test_a_module_saved_whole_holds_its_part_of_what_is_tied():
    model = nn.ModuleDict(
        {"body": nn.ModuleDict({"embedding": nn.Embedding(7, 4)}), "last": nn.Linear(4, 4), "head": nn.Linear(4, 7)}
    )
    model["head"].weight = model["body"]["embedding"].weight
    adapted(model, target_modules=["last"], modules_to_save=["body", "head"])
    assert list(model.lora_adapters["default"].copies) == ["body", "head"]
    assert model["head"].weight is model["body"]["embedding"].weight


def test_what_is_not_tied_or_not_named_stays_as_it_was():
    apart = adapted(tiny_model(tiny_config()), target_modules=["embed_tokens"])
    assert type(apart.lm_head) is PlainLinear
    elsewhere = adapted(target_modules="all-linear")
    assert type(elsewhere.lm_head) is PlainLinear
    assert type(elsewhere.model.embed_tokens) is nn.Embedding


def test_in_any_model_the_module_that_shares_the_weight_follows_and_no_namesake():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4)), nn.Linear(4, 7))
    model[2].weight = model[0].weight
    lora.inject(model, lora.LoraConfig(r=2, target_modules=["2"]))
    assert model[2].lora_A is model[0].lora_A
    assert type(model[1][0]) is nn.Embedding
    assert lora.LoraConfig(r=2, target_modules=["2"]) == model.lora_config


def test_what_is_trained_whole_with_what_it_is_tied_to_gets_no_adapter(tmp_path):
    model = adapted(target_modules=["embed_tokens", "o_proj"], modules_to_save=["lm_head"])
    assert not any("embed_tokens" in path for path in model.lora_adapters["default"].layers)
    lora.save_adapter(model, tmp_path)
    assert torch.equal(lora.load_adapter(fresh(), tmp_path)(IDS), model(IDS))


def test_linear_layers_of_one_weight_without_an_embedding_keep_adapters_of_their_own():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    lora.inject(model, lora.LoraConfig(r=2, target_modules=["0"]))
    assert type(model[1]) is nn.Linear


def test_two_embeddings_of_one_weight_share_too():
    model = nn.ModuleDict({"encoder": nn.Embedding(7, 4), "decoder": nn.Embedding(7, 4), "head": nn.Linear(4, 7)})
    model["decoder"].weight = model["head"].weight = model["encoder"].weight
    lora.inject(model, lora.LoraConfig(r=2, target_modules=["decoder"]))
    assert len({model[name].lora_A for name in model}) == 1


# Several adapters


def test_adapters_tied_and_not_are_switched_with_one_another():
    model = fresh()
    base = model(IDS)
    kinds = {
        "tied": {},
        "embedding": {"ensure_weight_tying": False},
        "head": {"target_modules": ["lm_head"], "ensure_weight_tying": False},
        "whole": {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens"]},
    }
    expected = {name: adapted(**settings)(IDS) for name, settings in kinds.items()}
    for name, settings in kinds.items():
        adapted(model, name, **settings)
    for name in [*kinds, "tied", "whole", "embedding"]:
        lora.set_adapter(model, name)
        assert torch.equal(model(IDS), expected[name]), name
        assert model.lm_head.weight is model.model.embed_tokens.weight
        with lora.disable_adapter(model):
            assert torch.equal(model(IDS), base)
    assert torch.equal(lora.remove(model)(IDS), base)


def weight_of(model) -> torch.Tensor:
    return (model.lm_head.weight + model.lm_head.delta()).detach()


def test_a_weighted_sum_of_tied_adapters_is_tied():
    model = adapted(adapted(name="a"), "b", r=2, lora_alpha=3)
    deltas = {}
    for name in ("a", "b"):
        lora.set_adapter(model, name)
        deltas[name] = model.lm_head.delta().detach().clone()
    lora.add_weighted_adapter(model, ["a", "b"], [0.7, -0.3], "sum")
    assert model.lm_head.lora_A is model.model.embed_tokens.lora_A
    expected = 0.7 * deltas["a"] - 0.3 * deltas["b"]
    for layer in (model.lm_head, model.model.embed_tokens):
        assert rms_error(layer.delta(), expected) < 1e-5
    assert model.lora_config.ensure_weight_tying
    lora.merge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_weighted_sum_with_an_adapter_that_is_not_tied_is_not_tied(tmp_path):
    model = adapted(adapted(name="a"), "b", ensure_weight_tying=False)
    lora.add_weighted_adapter(model, ["a", "b"], [1.0, 1.0], "sum")
    assert rms_error(model.model.embed_tokens.delta(), 2 * adapted().model.embed_tokens.delta()) < 1e-5
    assert rms_error(model.lm_head.delta(), adapted().lm_head.delta()) < 1e-5
    lora.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["ensure_weight_tying"] is False
    assert rms_error(lora.load_adapter(fresh(), tmp_path)(IDS), model(IDS)) < 1e-6


def test_a_batch_of_mixed_adapters_refuses_tied_ones_by_name():
    model = adapted()
    with pytest.raises(ValueError, match=r"model\.embed_tokens is Embedding in default"), lora.mixed_batch(model, ["default"]):
        pass


# Merged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target_modules", [["embed_tokens"], ["lm_head", "o_proj"]], ids=str)
def test_a_tied_adapter_is_merged_into_one_weight_saved_once_and_taken_out_again(tmp_path, target_modules, dtype):
    model = adapted(fresh().to(dtype), target_modules=target_modules)
    before, expected = copy.deepcopy(model.state_dict()), model(IDS)
    weight = (model.lm_head.weight.float() + model.lm_head.delta().float()).to(dtype)
    lora.merge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert rms_error(model.lm_head.weight, weight) < torch.finfo(dtype).eps
    assert rms_error(model(IDS), expected) < {torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    assert rms_error(model(IDS), fresh().to(dtype)(IDS)) > 0.1
    phi3.save(model, tmp_path)
    assert HEAD + ".weight" not in load_file(tmp_path / "model.safetensors")
    assert rms_error(load_in_transformers(tmp_path, dtype)(IDS).logits, model(IDS)) < 8 * torch.finfo(dtype).eps
    lora.unmerge(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(IDS), expected)


def test_modules_trained_whole_and_tied_are_saved_once(tmp_path):
    model = adapted(target_modules=["o_proj"], modules_to_save=["embed_tokens"])
    expected = model(IDS)
    lora.merge(model)
    phi3.save(model, tmp_path)
    assert rms_error(load_in_transformers(tmp_path)(IDS).logits, expected) < 1e-5


# Refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": {"embed_tokens": 5}}, r"are tied, and must share one r and lora_alpha, not \[\(3, 6\), \(5, 6\)\]"),
        ({"alpha_pattern": {"lm_head": 5}}, r"are tied, and must share one r and lora_alpha, not \[\(3, 5\), \(3, 6\)\]"),
        ({"exclude_modules": ["lm_head"]}, r"lm_head is excluded, and tied to what is adapted"),
        ({"target_modules": ["lm_head"], "use_dora": True}, r"not for model\.embed_tokens; model\.embed_tokens would follow"),
        ({"target_modules": ["lm_head"], "lora_bias": True}, r"ensure_weight_tying = False leaves it alone"),
        ({"target_modules": ["lm_head"], "init_lora_weights": "pissa"}, r"ensure_weight_tying = False leaves it alone"),
    ],
    ids=str,
)
def test_what_tied_modules_cannot_share_is_refused_by_name(settings, message):
    model = fresh()
    modules = list(model.modules())
    with pytest.raises(ValueError, match=message):
        adapted(model, **settings)
    assert list(model.modules()) == modules
    adapted(model, **settings, ensure_weight_tying=False)
    assert type(model.lm_head) is not type(adapted().lm_head)


def test_a_file_whose_tied_modules_have_unlike_adapters_is_refused(tmp_path):
    lora.save_adapter(adapted(), tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    tensors[f"base_model.model.{HEAD}.lora_A.weight"][0, 0] += 1
    save_file(tensors, tmp_path / TENSORS)
    model = fresh()
    with pytest.raises(ValueError, match=r"lm_head must have the adapter of model\.embed_tokens, to which it is tied"):
        lora.load_adapter(model, tmp_path)
    assert type(model.lm_head) is PlainLinear


def test_peft_scales_a_tied_head_by_itself_and_such_a_file_is_refused(folder, tmp_path):
    """Why tied modules must share lora_alpha: under an alpha of the embedding alone PEFT's head has another ΔW."""
    model = theirs(folder, target_modules=["embed_tokens"], alpha_pattern={"embed_tokens": 3})
    assert model.base_model.model.lm_head.scaling != model.base_model.model.model.embed_tokens.scaling
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must share one r and lora_alpha"):
        lora.load_adapter(fresh(), tmp_path)


def test_a_tied_adapter_on_a_base_with_a_head_of_its_own_is_loaded_for_each(tmp_path):
    model = adapted()
    lora.save_adapter(model, tmp_path)
    apart = tiny_model(tiny_config())
    apart.load_state_dict(fresh().state_dict())
    lora.load_adapter(apart, tmp_path)
    assert rms_error(apart(IDS), model(IDS)) < 1e-6
    assert apart.lm_head.lora_A is not apart.model.embed_tokens.lora_A


def test_gpt2s_tied_head_follows():
    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    lora.inject(model, lora.LoraConfig(r=2, target_modules=["wte"]))
    fill([model.lm_head.lora_A])
    expected = model(IDS).logits
    lora.merge(model)
    assert rms_error(model(IDS).logits, expected) < 1e-5
    assert model.lm_head.weight is model.transformer.wte.weight
