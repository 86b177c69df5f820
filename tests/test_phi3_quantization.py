"""4-bit checkpoints: quantised as they stream in, and read and written as bitsandbytes and transformers have them."""

import copy
import json

import bitsandbytes
import pytest
import torch
from helpers import load_in_transformers, rms_error, tiny_config, tiny_model
from safetensors.torch import load_file, save_file

from minilora import phi3
from minilora.kernels.nf4_state import STATE, to_bitsandbytes
from minilora.kernels.nf4_tensor import NF4Tensor
from minilora.phi3.cache import KVCache
from minilora.phi3.quantization import CONFIG, dequantize, quantized_weights

named = pytest.mark.parametrize
SIZES = {"hidden_size": 64, "intermediate_size": 128}  # bitsandbytes on a CPU misreads rows that are no whole blocks of 64
PROJECTIONS = {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"}
IDS = torch.randint(0, 250, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A checkpoint in bfloat16."""
    folder = tmp_path_factory.mktemp("quantization") / "plain"
    phi3.save(tiny_model(tiny_config(**SIZES)).bfloat16(), folder)
    return folder


@pytest.fixture(scope="module")
def stored(tmp_path_factory, plain):
    """The same one in 4 bits, computed with in float32."""
    folder = tmp_path_factory.mktemp("quantization") / "stored"
    phi3.save(phi3.load(plain, torch.float32, quantize="nf4"), folder)
    return folder


def in_transformers(folder):
    """In training mode, since in eval mode bitsandbytes may multiply in bfloat16; the model has no dropout."""
    return load_in_transformers(folder).train()


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert weight.dtype == other[name].dtype
        assert all(map(torch.equal, weight.parts, other[name].parts)), name


@named("dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_the_projections_are_quantised_from_what_is_stored_and_nothing_else_is(plain, dtype):
    model, original = phi3.load(plain, dtype, quantize="nf4"), phi3.load(plain)
    assert {name.split(".", 3)[3] for name in quantized_weights(model)} == {f"{path}.weight" for path in PROJECTIONS}
    assert len(quantized_weights(model)) == 8
    for name, parameter in model.named_parameters():
        weight = original.get_parameter(name)
        assert parameter.dtype == (dtype or torch.bfloat16)
        if isinstance(parameter, NF4Tensor):
            assert not parameter.requires_grad
            assert all(map(torch.equal, parameter.parts, NF4Tensor.quantize(weight).parts))
            assert 0.05 < rms_error(parameter.dequantize(), weight) < 0.15
        else:
            assert torch.equal(parameter, weight)


def test_the_head_is_quantised_when_asked(plain, tmp_path):
    model = phi3.load(plain, quantize="nf4", quantize_head=True)
    assert isinstance(model.lm_head.weight, NF4Tensor)
    assert not isinstance(model.model.embed_tokens.weight, NF4Tensor)
    phi3.save(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"] == []
    assert_same(quantized_weights(phi3.load(tmp_path / "saved")), quantized_weights(model))


def test_a_head_that_is_the_embedding_is_not_quantised(tmp_path):
    phi3.save(tiny_model(tiny_config(tie_word_embeddings=True)), tmp_path / "tied")
    with pytest.raises(ValueError, match="quantize_head needs a head of its own, and this one is the embedding"):
        phi3.load(tmp_path / "tied", quantize="nf4", quantize_head=True)


@named("settings", [{"quantize": "int8"}, {"quantize_head": True}], ids=str)
def test_other_ways_to_quantise_are_refused(plain, settings):
    with pytest.raises(ValueError, match='quantize must be "nf4" or None, and "nf4" with quantize_head'):
        phi3.load(plain, **settings)


def test_it_computes_what_its_dequantised_weights_compute(plain):
    model = phi3.load(plain, torch.float32, quantize="nf4")
    dense = copy.deepcopy(model)
    dequantize(dense)
    assert not quantized_weights(dense)
    assert rms_error(model(IDS), dense(IDS)) < 1e-5
    assert 0.01 < rms_error(model(IDS), phi3.load(plain, torch.float32)(IDS)) < 0.2


def test_it_is_a_model_as_any_other(plain):
    """Copies, the cache, activation checkpointing, and another dtype, which never expands it."""
    model = phi3.load(plain, torch.float32, quantize="nf4")
    with torch.no_grad():
        logits = model(IDS)
        assert torch.equal(copy.deepcopy(model)(IDS), logits)
        assert torch.equal(model.to("cpu")(IDS), logits)
        cache = KVCache(model.config, 2, 9, torch.float32, "cpu")
        steps = [model(IDS[:, :5], cache=cache), *(model(IDS[:, t : t + 1], cache=cache) for t in range(5, 9))]
        assert rms_error(torch.cat(steps, dim=1), logits) < 1e-5
    gradients = []
    for checkpointing in (False, True):
        model.model.gradient_checkpointing = checkpointing
        model.train().zero_grad()
        model(IDS, labels=IDS).backward()
        gradients.append(model.model.embed_tokens.weight.grad)
    assert gradients[0].norm() > 1e-3
    assert torch.equal(*gradients)
    half = model.bfloat16()
    assert len(quantized_weights(half)) == 8
    assert rms_error(half(IDS).float(), logits) < 0.05


def test_saving_and_loading_are_bit_exact(plain, stored, tmp_path):
    model = phi3.load(plain, torch.float32, quantize="nf4")
    loaded = phi3.load(stored)
    assert_same(quantized_weights(loaded), quantized_weights(model))
    assert torch.equal(loaded(IDS), model(IDS))
    assert loaded.config == model.config
    again = phi3.load(stored, torch.bfloat16, quantize="nf4")  # 4-bit already: nothing is rounded anew
    for name, weight in quantized_weights(again).items():
        assert all(map(torch.equal, weight.parts, model.get_parameter(name).parts))
        assert weight.dtype == torch.bfloat16
    phi3.save(model, tmp_path / "shards", shard_bytes=20_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert_same(quantized_weights(phi3.load(tmp_path / "shards")), quantized_weights(model))


def test_transformers_loads_what_is_saved(stored):
    theirs = in_transformers(stored)
    assert isinstance(theirs.model.layers[1].mlp.down_proj, bitsandbytes.nn.Linear4bit)
    assert type(theirs.lm_head) is torch.nn.Linear
    assert rms_error(theirs(IDS).logits, phi3.load(stored)(IDS)) < 1e-5


def test_what_transformers_quantises_and_saves_is_loaded(plain, tmp_path):
    import transformers

    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, **settings)
    theirs = transformers.Phi3ForCausalLM.from_pretrained(plain, dtype=torch.float32, quantization_config=config).train()
    logits = theirs(IDS).logits
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = phi3.load(tmp_path / "theirs")
    assert rms_error(loaded(IDS), logits) < 1e-5
    assert_same(quantized_weights(loaded), quantized_weights(phi3.load(plain, torch.float32, quantize="nf4")))
    ours, named_so = tmp_path / "ours", {"config.json", "model.safetensors"}
    phi3.save(loaded, ours)
    files = [load_file(folder / "model.safetensors") for folder in (ours, tmp_path / "theirs")]
    assert files[0].keys() == files[1].keys()
    for name, tensor in files[0].items():
        assert tensor.shape == files[1][name].shape or name.endswith(STATE), name  # JSON has no one order
        assert torch.equal(tensor, files[1][name]) or name.endswith(STATE), name
    assert {path.name for path in ours.iterdir()} == named_so


def test_a_model_that_is_4_bit_in_part_is_one_for_transformers_too(plain, tmp_path):
    model = phi3.load(plain, torch.float32, quantize="nf4")
    mlp = model.model.layers[0].mlp
    mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight.dequantize())
    phi3.save(model, tmp_path / "part")
    assert len(quantized_weights(phi3.load(tmp_path / "part"))) == 7
    theirs = in_transformers(tmp_path / "part")
    assert type(theirs.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert rms_error(theirs(IDS).logits, model(IDS)) < 1e-5


REFUSED = {
    "gptq": {"quant_method": "gptq", "bits": 4},
    "8-bit": CONFIG | {"load_in_4bit": False, "load_in_8bit": True},
    "fp4": CONFIG | {"bnb_4bit_quant_type": "fp4"},
    "fp4 by default": {name: value for name, value in CONFIG.items() if name != "bnb_4bit_quant_type"},
    "single": CONFIG | {"bnb_4bit_use_double_quant": False},
    "storage": CONFIG | {"bnb_4bit_quant_storage": "bfloat16"},
    "no object": ["nf4"],
}


@named("raw", REFUSED.values(), ids=REFUSED)
def test_other_quantisations_are_refused_by_name(stored, tmp_path, raw):
    config = json.loads((stored / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": raw}))
    wrong = (
        next((name for name, value in CONFIG.items() if raw.get(name) != value), "storage") if isinstance(raw, dict) else "must"
    )
    with pytest.raises(ValueError, match=rf"quantization_config.*{wrong}"):
        phi3.load(tmp_path)


NAME = "model.layers.0.self_attn.o_proj.weight"
BROKEN = {
    r"o_proj\.weight\.absmax is missing": lambda tensors: tensors.pop(f"{NAME}.absmax"),
    r"the codes must be torch\.uint8 \(2048, 1\) for 4096 numbers": lambda tensors: tensors.update({NAME: tensors[NAME][:10]}),
    r"quant_map must be the table of NF4": lambda tensors: tensors[f"{NAME}.quant_map"].neg_(),
    r"is no JSON": lambda tensors: tensors[f"{NAME}.{STATE}"].fill_(7),
    r"embed_tokens\.weight is 4-bit, which only the weights of linear layers may be": lambda tensors: tensors.update(
        to_bitsandbytes(NF4Tensor.quantize(torch.randn(260, 64)), "model.embed_tokens.weight")
    ),
    r"absmaximum in model\.safetensors is not part of this model": lambda tensors: tensors.update(
        {f"{NAME}.absmaximum": torch.zeros(1)}
    ),
    r"o_proj\.weight must have shape \[64, 64\], not \[128, 64\]": lambda tensors: tensors.update(
        {
            NAME + part: tensors[NAME.replace("o_proj", "qkv_proj") + part].clone()
            for part in ("", ".absmax", ".nested_absmax", f".{STATE}")
        }
    ),
}


@named("message", BROKEN)
def test_what_does_not_fit_is_named(stored, tmp_path, message):
    tensors = {name: tensor.clone() for name, tensor in load_file(stored / "model.safetensors").items()}
    BROKEN[message](tensors)
    (tmp_path / "config.json").write_text((stored / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        phi3.load(tmp_path)
