"""vLLM is not installed here: `as_vllm_reads` applies its rules, one rank and one scale and no pattern, and PEFT checks them."""

import json

import peft
import pytest
import torch
import transformers
from helpers import rms_error, tiny_config, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import minilora as lora
from minilora import phi3
from minilora.adapters.adapter_files import CONFIG, TENSORS
from minilora.adapters.export import RANKS, export_adapter

IDS = torch.arange(22).view(2, 11)
SETTINGS = {
    "one scale": {"target_modules": ["o_proj", "qkv_proj"]},
    "patterns": {
        "target_modules": ["o_proj", "qkv_proj", "down_proj"],
        "rank_pattern": {"1.self_attn.o_proj": 5, "qkv_proj": 2},
        "alpha_pattern": {"0.mlp.down_proj": 3.5},
    },
    "slices and rslora": {"target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj"], "use_rslora": True},
}
named = pytest.mark.parametrize


def adapted(dtype=torch.float32, **settings):
    model = lora.inject(tiny_model(tiny_config()), lora.LoraConfig(**{"r": 4, "lora_alpha": 6} | settings), dtype)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, 0.0, 0.3, generator)
    return model


def saved(folder, dtype=torch.float32, **settings):
    lora.save_adapter(adapted(dtype, **settings), folder, base="some/base")
    return folder


def as_vllm_reads(folder) -> dict[str, torch.Tensor]:
    """ΔW of each layer by the one rank and the one scale of the config; every factor must have that rank."""
    raw, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / TENSORS)
    assert raw["r"] in RANKS
    assert not raw["use_rslora"]
    deltas = {}
    for name in (name for name in tensors if name.endswith("lora_A.weight")):
        A, B = tensors[name].double(), tensors[name.replace("lora_A", "lora_B")].double()
        assert A.shape[0] == B.shape[1] == raw["r"]
        path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        deltas[path] = raw["lora_alpha"] / raw["r"] * B @ A
    return deltas


@named("settings", SETTINGS.values(), ids=SETTINGS)
def test_what_vllm_reads_is_the_same_update_of_every_layer(tmp_path, settings):
    export_adapter(saved(tmp_path / "adapter", **settings), tmp_path / "vllm", "vllm")
    layers = {path: module for path, module in adapted(**settings).named_modules() if isinstance(module, lora.Linear)}
    found = as_vllm_reads(tmp_path / "vllm")
    assert found.keys() == layers.keys()
    for path, layer in layers.items():
        rows, expected = torch.cat([torch.arange(*edges) for edges in layer.slices]), torch.zeros_like(found[path])
        expected[rows] = layer.delta().double()
        assert rms_error(found[path], expected) < 1e-6, path


@named("reader", ["peft", "vllm"])
@named("settings", SETTINGS.values(), ids=SETTINGS)
def test_peft_reads_every_export_as_the_same_function(tmp_path, settings, reader):
    export_adapter(saved(tmp_path / "adapter", **settings), tmp_path / "export", reader)
    phi3.save(tiny_model(tiny_config()), tmp_path / "base")
    base = transformers.Phi3ForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    before = base(IDS).logits
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "export").eval()(IDS).logits
    assert (theirs - adapted(**settings)(IDS)).abs().max() < 1e-5
    assert rms_error(theirs, before) > 0.05


def test_with_one_scale_no_factor_is_rounded(tmp_path):
    folder = saved(tmp_path / "adapter", torch.bfloat16, target_modules=["o_proj", "down_proj"], lora_alpha=3)
    assert export_adapter(folder, tmp_path / "vllm", "vllm") == []
    raw, found = json.loads((tmp_path / "vllm" / CONFIG).read_text()), load_file(tmp_path / "vllm" / TENSORS)
    assert (raw["r"], raw["lora_alpha"]) == (8, 6)
    for name, tensor in load_file(folder / TENSORS).items():
        rows, columns = tensor.shape
        assert torch.equal(found[name][:rows, :columns], tensor)
        assert found[name].count_nonzero() == tensor.count_nonzero()


def test_the_layers_that_are_rescaled_are_told(tmp_path):
    folder = saved(tmp_path / "adapter", target_modules=["o_proj", "down_proj"], alpha_pattern={"1.mlp.down_proj": 5})
    assert export_adapter(folder, tmp_path / "vllm", "vllm") == ["model.layers.1.mlp.down_proj"]


def test_an_export_for_peft_is_the_adapter_without_what_is_ours(tmp_path):
    folder = saved(tmp_path / "adapter", **SETTINGS["slices and rslora"])
    export_adapter(folder, tmp_path / "peft", "peft")
    assert (tmp_path / "peft" / CONFIG).read_bytes() == (folder / CONFIG).read_bytes()
    found, expected = load_file(tmp_path / "peft" / TENSORS), load_file(folder / TENSORS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with safe_open(tmp_path / "peft" / TENSORS, "pt") as file:
        assert file.metadata() == {"format": "pt"}


@named(
    ("settings", "fault"),
    [
        ({"use_dora": True}, "use_dora = True"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = ['lm_head']"),
        ({"bias": "all"}, "bias = 'all'"),
    ],
)
def test_what_vllm_cannot_apply_is_refused_by_name(tmp_path, settings, fault):
    folder = saved(tmp_path / "adapter", target_modules=["o_proj"], **settings)
    with pytest.raises(ValueError, match="vLLM cannot apply what the adapter in") as refused:
        export_adapter(folder, tmp_path / "vllm", "vllm")
    assert fault in str(refused.value)
    assert not (tmp_path / "vllm").exists()


def test_a_rank_beyond_vllms_is_refused(tmp_path):
    model = lora.inject(nn.Sequential(nn.Linear(4, 4)), lora.LoraConfig(r=513))
    lora.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="a rank of 513, where 512 is the most"):
        export_adapter(tmp_path / "adapter", tmp_path / "vllm", "vllm")


def test_an_unknown_reader_is_refused(tmp_path):
    with pytest.raises(ValueError, match="for peft or vllm, not 'onnx'"):
        export_adapter(tmp_path, tmp_path / "out", "onnx")
