"""Fixtures that several tests share. Whatever a fixture of session scope hands out is read only."""

from pathlib import Path

import hypothesis
import pytest
import torch
from helpers import tiny_config, tiny_model, write_tokenizer

from minilora import phi3
from minilora.files import cache_folder

# The same examples every run, so that a red test is red for everybody.
hypothesis.settings.register_profile("minilora", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("minilora")

# The tensors are tiny: on two busy cores a second thread made test_phi3_model.py five times slower (50 s for 10 s).
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def users_cache(tmp_path_factory):
    """The user's cache folder, for the demo's weights alone: whatever else the tests cache goes into a folder of theirs."""
    users = cache_folder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINILORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield users


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of test data beside the repository."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the test data is not there: {folder}")
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory) -> Path:
    """A folder with tokenizer.json and tokenizer_config.json: bytes, ChatML's special tokens and its template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory, tiny_tokenizer) -> Path:
    """A checkpoint folder: a random Phi-3 (hidden 32, 2 layers, grouped-query) in float32 and the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    phi3.save(tiny_model(tiny_config()), folder)
    phi3.copy_tokenizer(tiny_tokenizer, folder)
    return folder
