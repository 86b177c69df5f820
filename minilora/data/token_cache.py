"""Token ids and masks on the disk, so that the same conversations are tokenised once, however many runs read them.

A file is named by the hash of all that its tokens follow from: the messages of the conversations in their order, and the
tokenizer. Nothing else can be stale: where conversations lie, and whether all tokens are learnt, is told afterwards.

On two busy CPU cores 20,000 questions of 135 tokens took 7.7 to 11 s to encode one by one by the tokenizer of Phi-3-mini, 5.0 to
6.0 s in threads, and 0.34 to 0.48 s to read back, a quarter of that for the hash of the messages.
"""

import gc
import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from minilora.data.conversations import Conversation
from minilora.data.encoding import ChatTokenizer, Example, encode_conversations
from minilora.files import cache_folder, write_file

FORMAT = "1"  # of the files
LIMIT = 4 << 30  # bytes of all files; 5 a token


class HashedTokenizer(ChatTokenizer, Protocol):
    """A tokenizer that tells others from itself."""

    digest: str  # the same for those alone that encode alike


def encode_cached(
    conversations: Sequence[Conversation], tokenizer: HashedTokenizer, assistant_only_loss: bool = True
) -> list[Example]:
    """What encode_conversations gives of conversations of any length, read from the cache or left there, and told.

    Raises:
        ValueError: the template refuses conversations, of which nothing is kept.
    """
    path = cache_folder() / "tokens" / f"{_key(conversations, tokenizer)}.safetensors"
    start, tokens = time.perf_counter(), _read(path)
    if tokens:
        examples = _examples(tokens, conversations)
        print(f"tokens from cache {path} in {time.perf_counter() - start:.1f} s")
    else:
        examples = encode_conversations(conversations, tokenizer, sys.maxsize)
        print(f"tokenised {len(examples):,} conversations in {time.perf_counter() - start:.1f} s, {_keep(examples, path)}")
    return examples if assistant_only_loss else [replace(example, mask=[True] * len(example.ids)) for example in examples]


def _key(conversations: Sequence[Conversation], tokenizer: HashedTokenizer) -> str:
    digest = sha256(f"{FORMAT} {tokenizer.digest}".encode())
    for conversation in conversations:
        digest.update(json.dumps(conversation.messages).encode())
    return digest.hexdigest()


def _keep(examples: Sequence[Example], path: Path) -> str:
    """Writes a file, and tells what became of it."""
    tokens = {
        "ids": np.fromiter(chain.from_iterable(example.ids for example in examples), np.int32),
        "mask": np.fromiter(chain.from_iterable(example.mask for example in examples), np.bool_),
        "offsets": np.fromiter(accumulate((len(example.ids) for example in examples), initial=0), np.int64),
    }
    try:
        write_file(path, save(tokens, {"sha256": _digest(path.stem, tokens)}))
    except OSError as error:
        return f"not kept: {error}"
    with suppress(OSError):  # another process may be at it too
        _remove_oldest(path.parent)
    return f"kept as {path}"


def _remove_oldest(folder: Path) -> None:
    """Removes files beyond LIMIT, what killed programs left among them."""
    left = LIMIT
    for file in sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime, reverse=True):
        left -= file.stat().st_size
        if left < 0:
            file.unlink()


def _read(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a file, if there is one and it is whole, and of that name."""
    try:
        with safe_open(path, framework="numpy") as file:
            tokens, told = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    return tokens if told == {"sha256": _digest(path.stem, tokens)} else None


def _digest(key: str, tokens: dict[str, np.ndarray]) -> str:
    digest = sha256(key.encode())
    for name in sorted(tokens):
        digest.update(name.encode())
        digest.update(tokens[name])
    return digest.hexdigest()


def _examples(tokens: dict[str, np.ndarray], conversations: Sequence[Conversation]) -> list[Example]:
    """Examples whose equal ids are one object: lists take 8 bytes a token so, where an int of its own for each takes 28 more."""
    shared = np.arange(tokens["ids"].max() + 1).astype(object)
    ids, mask, offsets = shared[tokens["ids"]].tolist(), tokens["mask"].tolist(), tokens["offsets"].tolist()
    places = zip(conversations, pairwise(offsets), strict=True)
    gc.disable()  # its collections would walk through all lists so far, again and again: half of the time
    try:
        return [Example(ids[start:end], mask[start:end], source=conversation.source) for conversation, (start, end) in places]
    finally:
        gc.enable()
