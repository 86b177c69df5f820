"""One step to measure, and what all libraries are given for it: a checkpoint, a batch, and the adapters' start."""

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import minilora as lora
from benchmarks.peers.environments import cache_folder
from benchmarks.peers.side import TARGETS, layer_paths, read_config
from minilora import phi3
from tests.helpers import tiny_config

SMALL = phi3.Phi3Config(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True,
)  # fmt: skip
NARROW = dataclasses.replace(SMALL, vocab_size=8192, eos_token_id=None, pad_token_id=None)  # a head in proportion to few layers
MODELS = {
    "small": SMALL,  # 134,515,008 parameters: the shape of SmolLM2-135M
    "slice": phi3.Phi3Config(num_hidden_layers=2, original_max_position_embeddings=4096),  # of Phi-3-mini's true widths
    "tiny": tiny_config(original_max_position_embeddings=1024),
} | {f"{n} layers": dataclasses.replace(NARROW, num_hidden_layers=n) for n in (4, 8)}
ALPHA, SEED = 32, 0


@dataclass(frozen=True)
class Case:
    """A model of MODELS, and the settings of one step of it."""

    model: str
    tokens: int = 256  # of each sequence
    dropout: float = 0.0
    threads: int = 2
    r: int = 16
    batch: int = 2

    def __str__(self) -> str:
        dropout = f", dropout {self.dropout}" if self.dropout else ""
        return f"{self.model}, {self.batch} × {self.tokens} tokens, r {self.r}{dropout}, {self.threads} threads"


def write_checkpoint(model: str) -> Path:
    """The folder of a random checkpoint in float32, which stays in the cache; norm weights are random too."""
    config = MODELS[model]
    folder = cache_folder() / "weights" / hashlib.sha256(repr(config).encode()).hexdigest()[:16]
    if not folder.exists():
        generator = torch.Generator().manual_seed(SEED)
        with torch.device("meta"):
            made = phi3.Phi3ForCausalLM(config)
        made.to_empty(device="cpu").tie_weights()
        for name, parameter in made.named_parameters():
            mean, spread = (1.0, 0.1) if name.endswith("norm.weight") else (0.0, 0.02)
            torch.nn.init.normal_(parameter, mean, spread, generator=generator)
        phi3.save(made, folder)
    return folder


def make(case: Case) -> tuple[phi3.Phi3ForCausalLM, Tensor]:
    """Our model of a case in training mode, its base frozen, with adapters on all projections; and ids (B, T)."""
    torch.manual_seed(SEED)
    model = phi3.load(write_checkpoint(case.model)).train()
    lora.inject(model, lora.LoraConfig(case.r, ALPHA, case.dropout, target_modules=list(TARGETS)))
    lora.mark_only_lora_as_trainable(model)
    return model, torch.randint(3, MODELS[case.model].vocab_size, (case.batch, case.tokens))


def write_start(case: Case, folder: Path) -> Path:
    """A file with input_ids (B, T), and A and B of every projection, neither zero, by their paths."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.device("meta"):
        meta = phi3.Phi3ForCausalLM(MODELS[case.model])
    config = read_config(write_checkpoint(case.model))
    start = {"input_ids": torch.randint(3, config["vocab_size"], (case.batch, case.tokens), generator=generator)}
    for path in (path for paths in layer_paths(config) for path in paths.values()):
        N, K = meta.get_submodule(path).weight.shape
        start[f"{path}.lora_A"] = torch.randn(case.r, K, generator=generator) / K**0.5
        start[f"{path}.lora_B"] = torch.randn(N, case.r, generator=generator) * 0.01
    file = folder / "start.safetensors"
    save_file(start, file)
    return file
