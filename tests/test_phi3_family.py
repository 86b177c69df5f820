"""Every published variant against transformers: its true config, with two layers, two heads and a small vocabulary.

Heads are of their true size, so that the rotary tables, the windows and their lengths are those of the checkpoint.
`python -m benchmarks family` makes a table of these tests, by the words that it looks for in their names.
"""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers import as_transformers_has_it, largest_difference, load_in_transformers, rms_error, tiny_model
from safetensors.torch import load_file

import minilora as lora
from minilora import phi3
from minilora.phi3.cache import KVCache
from minilora.phi3.config import LongRope
from minilora.phi3.generation import generate_ids

FACTS = {  # hidden, MLP, layers, heads, key heads, head size, vocabulary, θ, longest, original, window, rotary dimensions, tied
    "phi-3-mini-4k": (3072, 8192, 32, 32, 32, 96, 32064, 1e4, 4096, 4096, 2047, 96, False),
    "phi-3-mini-128k": (3072, 8192, 32, 32, 32, 96, 32064, 1e4, 131072, 4096, 262144, 96, False),
    "phi-3.5-mini": (3072, 8192, 32, 32, 32, 96, 32064, 1e4, 131072, 4096, 262144, 96, False),
    "phi-3-medium-4k": (5120, 17920, 40, 40, 10, 128, 32064, 1e4, 4096, 4096, 2047, 128, False),
    "phi-3-medium-128k": (5120, 17920, 40, 40, 10, 128, 32064, 1e4, 131072, 4096, 131072, 128, False),
    "phi-4": (5120, 17920, 40, 40, 10, 128, 100352, 25e4, 16384, 16384, None, 128, False),
    "phi-4-reasoning": (5120, 17920, 40, 40, 10, 128, 100352, 5e5, 32768, 32768, None, 128, False),
    "phi-4-mini": (3072, 8192, 32, 24, 8, 128, 200064, 1e4, 131072, 4096, 262144, 96, True),
}
PARAMETERS = {"phi-3-mini-4k": 3_821_079_552, "phi-4-mini": 3_836_021_760}  # as published
every_variant = pytest.mark.parametrize("variant", FACTS)


def published(folder: Path, variant: str) -> dict:
    """A variant's config.json; where only a sister's is among the test data, that one with the fields that differ."""

    def of(name, **fields):
        return json.loads((folder / "configs" / f"{name}.json").read_text(encoding="utf-8")) | fields

    early = of("Phi-3-vision-128k-instruct.text", eos_token_id=32000)  # the factors of its time, spelled "su"
    wide = (
        early["rope_scaling"]
        | {  # for heads of 128 dimensions; the published numbers are not among the test data
            name: early["rope_scaling"][name] + early["rope_scaling"][name][-1:] * 16 for name in ("short_factor", "long_factor")
        }
    )
    length = {"max_position_embeddings": 131072, "sliding_window": 131072}
    return {
        "phi-3-mini-4k": of("Phi-3-mini-4k-instruct"),
        "phi-3-mini-128k": early | {"sliding_window": 262144},
        "phi-3.5-mini": of("Phi-3.5-mini-instruct"),
        "phi-3-medium-4k": of("Phi-3-medium-4k-instruct"),
        "phi-3-medium-128k": of("Phi-3-medium-4k-instruct", rope_scaling=wide, **length),
        "phi-4": of("phi-4"),
        "phi-4-reasoning": of("phi-4", rope_theta=500000, max_position_embeddings=32768, original_max_position_embeddings=32768),
        "phi-4-mini": of("Phi-4-mini-instruct"),
    }[variant]


def read(folder: Path, variant: str, beside: Path) -> phi3.Phi3Config:
    path = beside / f"{variant}.json"
    path.write_text(json.dumps(published(folder, variant)), encoding="utf-8")
    return phi3.Phi3Config.read(path)


class Pair(NamedTuple):
    """A narrow model of a variant, and what transformers makes of its checkpoint."""

    folder: Path
    ours: phi3.Phi3ForCausalLM
    theirs: object
    edge: int  # tokens where something changes: the factors or the window; any number where nothing does
    ids: torch.Tensor  # (1, edge + 4)
    alone: dict  # tokens at the start of ids → transformers' logits of them alone

    def expected(self, length: int) -> torch.Tensor:
        if length not in self.alone:
            with torch.no_grad():
                self.alone[length] = self.theirs(self.ids[:, :length]).logits
        return self.alone[length]


@pytest.fixture(scope="module", params=FACTS)
def pair(request, shared, tmp_path_factory) -> Pair:
    folder = tmp_path_factory.mktemp("family")
    config = read(shared, request.param, folder)
    grouped = config.num_key_value_heads < config.num_attention_heads
    ours = tiny_model(
        dataclasses.replace(
            config, vocab_size=64, hidden_size=2 * config.head_dim, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1 if grouped else 2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip
    with torch.no_grad():
        for layer in ours.model.layers:
            layer.self_attn.qkv_proj.weight *= 3  # attention that is sharp, so that a wrong angle shows
    phi3.save(ours, folder / "model")
    edge = config.original_max_position_embeddings if config.longrope else config.sliding_window or 300
    ids = torch.randint(3, 64, (1, edge + 4), generator=torch.Generator().manual_seed(1))
    return Pair(folder / "model", ours, load_in_transformers(folder / "model", attention="sdpa"), edge, ids, {})


@every_variant
def test_the_config_is_read_as_published_and_written_as_transformers_reads_it(variant, shared, tmp_path):
    import transformers

    config = read(shared, variant, tmp_path)
    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "vocab_size", "rope_theta", "max_position_embeddings", "original_max_position_embeddings", "sliding_window",
        "rotary_dim", "tie_word_embeddings",
    )  # fmt: skip
    assert tuple(getattr(config, name) for name in names) == FACTS[variant]
    config.write(tmp_path / "config.json", "bfloat16")
    theirs = transformers.Phi3Config.from_pretrained(tmp_path)
    fields, rope = as_transformers_has_it(config)
    assert {name: getattr(theirs, name) for name in fields} == fields
    assert {name: value for name, value in theirs.rope_parameters.items() if name != "type"} == rope
    assert isinstance(config.longrope, LongRope) == (rope["rope_type"] == "longrope")
    with torch.device("meta"):
        model = phi3.Phi3ForCausalLM(config)
    if variant in PARAMETERS:
        assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[variant]


def test_logits_before_at_and_after_the_edge(pair):
    for length in (pair.edge - 1, pair.edge, pair.edge + 1):
        with torch.no_grad():
            logits = pair.ours(pair.ids[:, :length])
        assert largest_difference(logits, pair.expected(length)) < 5e-6, length


def test_logits_of_a_left_padded_batch(pair):
    """transformers takes one table for a whole batch, so that a row's logits depend on the others: ours are those alone."""
    lengths = [pair.edge + 1, pair.edge]
    ids, is_token = torch.zeros(2, 2, pair.edge + 1, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, -length:], is_token[row, -length:] = pair.ids[0, :length], 1
    with torch.no_grad():
        logits = pair.ours(ids, attention_mask=is_token)
    for row, length in enumerate(lengths):
        assert largest_difference(logits[row, -length:], pair.expected(length)[0]) < 5e-6, length


def test_logits_of_packed_documents(pair):
    lengths = [40, pair.edge + 1, 1]
    ids = torch.cat([pair.ids[:, :length] for length in lengths], dim=1)
    documents = torch.cat([torch.full((1, length), number) for number, length in enumerate(lengths, start=1)], dim=1)
    with torch.no_grad():
        logits = pair.ours(ids, attention_mask=documents)
    for document, length in zip(logits.split(lengths, dim=1), lengths, strict=True):
        assert largest_difference(document, pair.expected(length)) < 5e-6, length


def test_logits_in_bfloat16(pair):
    ours, theirs = phi3.load(pair.folder, torch.bfloat16), load_in_transformers(pair.folder, torch.bfloat16, "sdpa")
    exact = phi3.load(pair.folder, torch.float64)
    exact.load_state_dict(ours.state_dict())  # the same rounded weights
    with torch.no_grad():
        expected, actual = exact(pair.ids), ours(pair.ids)
        assert rms_error(actual, expected) < 1.05 * rms_error(theirs(pair.ids).logits, expected) < 0.1


def adapted(pair, dtype):
    """Our model and transformers' with PEFT, with the same random adapters, in float32, on the four projections; and those,
    ours and theirs, by our names."""
    import peft

    targets = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    ours, theirs = phi3.load(pair.folder, dtype), load_in_transformers(pair.folder, dtype, "sdpa")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        lora.inject(ours, lora.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
        theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
        for name, parameter in ours.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    lora.mark_only_lora_as_trainable(ours)
    in_theirs = {name: parameter for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    pairs = {}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            pairs[name] = parameter, in_theirs.pop(f"base_model.model.{name}.default.weight")
            pairs[name][1].data.copy_(parameter.data)
    assert not in_theirs
    assert len(pairs) == 16
    return ours, theirs, pairs


def test_gradients_of_the_adapters(pair):
    ours, theirs, pairs = adapted(pair, torch.float32)
    ids = pair.ids[:, : pair.edge + 1]
    loss, expected = ours(ids, ids), theirs(ids, labels=ids).loss
    assert rms_error(loss, expected) < 1e-6
    loss.backward()
    expected.backward()
    for name, (mine, yours) in pairs.items():
        assert largest_difference(mine.grad, yours.grad) < 2e-5, name


def test_gradients_of_the_adapters_in_bfloat16(pair):
    ours, theirs, pairs = adapted(pair, torch.bfloat16)
    exact = lora.inject(phi3.load(pair.folder, torch.float64), ours.lora_config, torch.float64)
    exact.load_state_dict(ours.state_dict())  # the same rounded weights
    ids = pair.ids[:, :128]
    for loss in (ours(ids, ids), theirs(ids, labels=ids).loss, exact(ids, ids)):
        loss.backward()
    reference = {name: exact.get_parameter(name).grad for name in pairs}
    # Of sixteen tensors, each rounded in its own order, ours are nearer in some and theirs in others, by up to 16 %.
    errors = torch.tensor([[rms_error(p.grad, reference[name]) for p in both] for name, both in pairs.items()]).mean(dim=0)
    assert errors[0] < 1.1 * errors[1] < 0.1


@pytest.mark.parametrize("steps", [1, 7], ids=["token by token", "in pieces"])
def test_the_cache_gives_what_one_pass_gives(pair, steps):
    """Across the window; up to where LongRoPE changes its factors."""
    length = pair.edge if pair.ours.config.longrope else pair.edge + 1
    cache = KVCache(pair.ours.config, 1, length, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        pieces = [pair.ids[:, : pair.edge - 9], *pair.ids[:, pair.edge - 9 : length].split(steps, dim=1)]
        logits = torch.cat([pair.ours(piece, cache=cache) for piece in pieces], dim=1)
    assert largest_difference(logits, pair.expected(length)) < 5e-6


def test_the_cache_answers_as_transformers_across_the_edge(pair):
    prompt = pair.ids[:, : pair.edge - 4]
    expected = pair.theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=10, eos_token_id=None, pad_token_id=0
    )
    steps = generate_ids(pair.ours, prompt.tolist(), frozenset(), phi3.Sampling(max_new_tokens=10))
    assert [id_ for (id_,) in steps] == expected[0, pair.edge - 4 :].tolist()


def test_what_is_saved_loads_bit_for_bit_and_holds_a_tied_head_once(pair):
    loaded, expected = phi3.load(pair.folder).state_dict(), pair.ours.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert phi3.load(pair.folder).config == pair.ours.config
    assert ("lm_head.weight" in load_file(pair.folder / "model.safetensors")) != pair.ours.config.tie_word_embeddings


def test_a_merged_model_is_saved_as_transformers_reads_it(pair, tmp_path):
    ours, *_ = adapted(pair, torch.float32)
    ids = pair.ids[:, :64]
    with torch.no_grad():
        unmerged = ours(ids)
        lora.merge(ours)
        phi3.save(ours, tmp_path / "merged")
        expected = load_in_transformers(tmp_path / "merged", attention="sdpa")(ids).logits
        assert largest_difference(ours(ids), expected) < 5e-6
        assert largest_difference(ours(ids), unmerged) < 1e-5
    assert largest_difference(unmerged, pair.expected(64)) > 1e-3  # the adapters count
