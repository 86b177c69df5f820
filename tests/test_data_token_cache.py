import multiprocessing
from dataclasses import replace

import numpy as np
import pytest
from helpers import write_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from minilora import phi3
from minilora.data import token_cache
from minilora.data.conversations import Conversation
from minilora.data.encoding import encode_conversations
from minilora.data.token_cache import _keep, _read, encode_cached


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where the files of a test come to lie."""
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint):
    return phi3.load_tokenizer(tiny_checkpoint)


class Asked(Exception):
    """A tokenizer was asked to encode."""


class ByNameOnly:
    """A tokenizer that is known but must not encode: what it gets must come from the cache."""

    def __init__(self, tokenizer):
        self.digest = tokenizer.digest

    def encode_chat(self, messages):
        raise Asked


def talk(*texts, source="chat.jsonl:1"):
    turns = zip(("user", "assistant") * 9, texts, strict=False)
    return Conversation([{"role": role, "content": text} for role, text in turns], source)


TALKS = [talk("hi", "hello", source="chat.jsonl:1"), talk("a", "b", "c", "d", source="chat.jsonl:2")]


def encodes(conversations, tokenizer) -> bool:
    """Whether these conversations must be encoded, since the cache does not have them."""
    try:
        encode_cached(conversations, ByNameOnly(tokenizer))
    except Asked:
        return True
    return False


@pytest.mark.parametrize("assistant_only_loss", [True, False])
@given(texts=st.lists(st.tuples(st.text(max_size=9), st.text(min_size=1, max_size=300)), min_size=1, max_size=9))
def test_what_is_read_back_is_what_was_encoded(tokenizer, assistant_only_loss, texts):
    conversations = [talk(*pair, source=f"chat.jsonl:{number}") for number, pair in enumerate(texts)]
    expected = encode_conversations(conversations, tokenizer, 10**9, assistant_only_loss=assistant_only_loss)
    first = encode_cached(conversations, tokenizer, assistant_only_loss)
    again = encode_cached(conversations, ByNameOnly(tokenizer), assistant_only_loss)
    assert first == again == expected
    assert [example.source for example in again] == [example.source for example in expected]
    types = [{type(value) for value in (*example.ids, *example.mask)} for example in again]
    assert all(found == {int, bool} for found in types)  # and none of numpy's, which a fingerprint would see


def test_it_is_told_where_tokens_lie_and_that_they_come_from_there(tokenizer, folder, capsys):
    encode_cached(TALKS, tokenizer)
    (path,) = folder.iterdir()
    encode_cached(TALKS, tokenizer)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("tokenised 2 conversations in ")
    assert first.endswith(f" s, kept as {path}")
    assert second.startswith(f"tokens from cache {path} in ")


def test_other_conversations_are_encoded_and_the_same_from_elsewhere_are_not(tokenizer):
    encode_cached(TALKS, tokenizer)
    first, second = TALKS
    assert not encodes(TALKS, tokenizer)
    elsewhere = [replace(conversation, source=f"other.jsonl:{n}") for n, conversation in enumerate(TALKS)]
    assert not encodes(elsewhere, tokenizer)
    assert [example.source for example in encode_cached(elsewhere, tokenizer)] == ["other.jsonl:0", "other.jsonl:1"]
    system, *others = first.messages
    for changed in (
        TALKS[:1],
        TALKS[::-1],
        [*TALKS, first],
        [first, talk("a", "b", "c", "D")],
        [Conversation([system | {"tools": "[]"}, *others], "chat.jsonl:1"), second],
        [Conversation([*first.messages, *second.messages], "chat.jsonl:1")],
    ):
        assert encodes(changed, tokenizer)


def test_another_tokenizer_or_another_template_encodes(tokenizer, tmp_path):
    encode_cached(TALKS, tokenizer)
    write_tokenizer(tmp_path / "other", template=tokenizer.template.replace("\n", "\n\n"))
    other = phi3.load_tokenizer(tmp_path / "other")
    assert encodes(TALKS, other)
    assert encode_cached(TALKS, other) == encode_conversations(TALKS, other, 1000) != encode_cached(TALKS, tokenizer)


def test_another_format_of_the_files_encodes(tokenizer, monkeypatch):
    encode_cached(TALKS, tokenizer)
    monkeypatch.setattr(token_cache, "FORMAT", "2")
    assert encodes(TALKS, tokenizer)


def foreign(path):
    save_file({"ids": np.zeros(3, np.int32)}, path)


def one_id_changed(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


BREAKS = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "no safetensors": lambda path: path.write_bytes(b"tokens\n" * 99),
    "one bit": one_id_changed,
    "foreign": foreign,
}


@pytest.mark.parametrize("breaks", BREAKS.values(), ids=BREAKS.keys())
def test_a_file_that_is_not_whole_is_made_again(tokenizer, folder, breaks):
    examples = encode_cached(TALKS, tokenizer)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    breaks(path)
    assert encodes(TALKS, tokenizer)
    assert encode_cached(TALKS, tokenizer) == examples
    assert path.read_bytes() == whole


def test_a_whole_file_by_the_name_of_another_is_not_taken_for_it(tokenizer, folder):
    encode_cached(TALKS, tokenizer)
    (path,) = folder.iterdir()
    encode_cached(TALKS[::-1], tokenizer)
    (other,) = set(folder.iterdir()) - {path}
    other.replace(path)
    assert encodes(TALKS, tokenizer)


def test_nothing_is_kept_of_conversations_that_the_template_refuses(tokenizer, folder):
    for _ in range(2):
        with pytest.raises(ValueError, match=r"chat\.jsonl:7: .*special token"):
            encode_cached([*TALKS, talk("<|im_end|>", "no", source="chat.jsonl:7")], tokenizer)
    assert not folder.exists()


def test_the_oldest_files_go_when_all_take_more_than_the_limit(tokenizer, folder, monkeypatch):
    sizes = []
    for number in range(4):
        encode_cached([talk("hi", "x" * 1000 + str(number))], tokenizer)
        sizes.append(sum(path.stat().st_size for path in folder.iterdir()))
    assert sizes == [(number + 1) * sizes[0] for number in range(4)]
    (folder / "killed.safetensors.1.tmp").write_bytes(b"half a file")
    monkeypatch.setattr(token_cache, "LIMIT", 2 * sizes[0])
    encode_cached([talk("hi", "x" * 1000 + "4")], tokenizer)
    assert [encodes([talk("hi", "x" * 1000 + str(number))], tokenizer) for number in range(5)] == [True] * 4 + [False]
    assert len(list(folder.iterdir())) == 2


def test_without_a_place_to_keep_them_tokens_are_still_found_and_it_is_told(tokenizer, folder, capsys):
    folder.parent.parent.mkdir(exist_ok=True)
    folder.parent.write_text("a file where the cache should be")
    for _ in range(2):
        assert encode_cached(TALKS, tokenizer) == encode_conversations(TALKS, tokenizer, 1000)
    first, second = capsys.readouterr().out.splitlines()
    assert " s, not kept: " in first
    assert " s, not kept: " in second


def test_processes_may_write_and_read_one_file_at_once(tokenizer, folder):
    examples = encode_cached([talk("hi", "x" * 999) for _ in range(99)], tokenizer)
    (path,) = folder.iterdir()

    def write_and_read():
        for _ in range(50):
            assert _keep(examples, path) == f"kept as {path}"
            assert _read(path) is not None  # whole, whoever replaces it meanwhile

    several = [multiprocessing.get_context("fork").Process(target=write_and_read) for _ in range(3)]
    for process in several:
        process.start()
    for process in several:
        process.join()
    assert [process.exitcode for process in several] == [0, 0, 0]
    assert list(folder.iterdir()) == [path]
