"""Chat conversations from JSON Lines files to batches of token ids and labels."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from minilora.kernels.cross_entropy import IGNORE

ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
SHOWN = 20  # faults spelled out before the rest is only counted

Message = dict[str, str]  # {"role": …, "content": …}


class ChatTokenizer(Protocol):
    """What encoding needs of a tokenizer."""

    def encode_chat(self, messages: list[Message]) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, and which of them the assistant is to learn."""


@dataclass(frozen=True)
class Conversation:
    """A conversation and where it came from."""

    messages: list[Message]
    source: str  # "file:line"


@dataclass(frozen=True)
class Example:
    """A conversation as token ids, and which of them are the assistant's."""

    ids: list[int]
    mask: list[bool]
    source: str = field(default="", compare=False)  # "file:line"


def read_conversations(path: Path | str) -> list[Conversation]:
    """Reads a JSON Lines file of conversations in any of three shapes; empty lines are skipped.

        {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
        {"instruction": "…", "input": "…", "output": "…"}                                     (Alpaca; input may be absent)
        {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}   (ShareGPT)

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not text, or lines are broken (no JSON, another shape, an unknown role, an empty text, no assistant);
            file and line of each are named.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} must be a JSON Lines file of conversations, and is no file")
    conversations, faults = [], []
    with open(path, encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    conversations.append(Conversation(_messages(json.loads(line)), f"{path}:{number}"))
                except json.JSONDecodeError as error:
                    faults.append(f"{path}:{number}: no JSON: {error.msg} at character {error.pos + 1}")
                except ValueError as error:
                    faults.append(f"{path}:{number}: {error}")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} must be UTF-8 text: {error}") from None
    _raise_all(faults)
    if not conversations:
        raise ValueError(f"{path} holds no conversation")
    return conversations


def _messages(record: object) -> list[Message]:
    """The messages of one line, checked."""
    if not isinstance(record, dict):
        raise ValueError(f"a line must hold a JSON object, not a {type(record).__name__}")
    if "messages" in record:
        turns = [(_field(turn, "role"), _field(turn, "content")) for turn in _list(record, "messages")]
    elif "conversations" in record:
        turns = [(_field(turn, "from"), _field(turn, "value")) for turn in _list(record, "conversations")]
        turns = [(SHAREGPT_ROLES.get(role, role), text) for role, text in turns]
    elif "instruction" in record:
        question = _field(record, "instruction")
        if record.get("input"):
            question += "\n\n" + _field(record, "input")
        turns = [("user", question), ("assistant", _field(record, "output"))]
    else:
        raise ValueError(
            f'must have "messages", "conversations" or "instruction", and has {", ".join(map(repr, record)) or "no key"}'
        )
    faults = []
    for number, (role, text) in enumerate(turns, start=1):
        if role not in ROLES:
            faults.append(f"turn {number} has the unknown role {role!r}; known are {', '.join(ROLES)}")
        elif not text.strip():
            faults.append(f"turn {number} ({role}) is empty")
        elif any("\ud800" <= character <= "\udfff" for character in text):
            faults.append(f"turn {number} ({role}) holds half a surrogate pair (\\ud800 to \\udfff), which is no character")
    if not any(role == "assistant" for role, _ in turns):
        faults.append("no turn is the assistant's: there is nothing to learn")
    if faults:
        raise ValueError("; ".join(faults))
    return [{"role": role, "content": text} for role, text in turns]


def _list(record: dict, key: str) -> list:
    if not isinstance(record[key], list) or not all(isinstance(turn, dict) for turn in record[key]):
        raise ValueError(f'"{key}" must be a list of objects')
    return record[key]


def _field(record: dict, key: str) -> str:
    if not isinstance(record.get(key), str):
        raise ValueError(f'"{key}" must be a text, not {record.get(key)!r}')
    return record[key]


def _raise_all(faults: list[str]) -> None:
    if faults:
        more = [f"… and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
        raise ValueError("\n".join(faults[:SHOWN] + more))


def encode_conversations(
    conversations: Sequence[Conversation], tokenizer: ChatTokenizer, max_length: int, drop_long: bool = False
) -> list[Example]:
    """Token ids and masks of conversations by the tokenizer's chat template.

    Args:
        max_length: tokens that a conversation may have. None is ever cut: a longer one is an error, or is left out.
        drop_long: leave longer ones out; what is left out can be counted by the length of the result.

    Raises:
        ValueError: the template refuses conversations or they are too long; each is named by its source.
    """
    examples, faults, lengths = [], [], []
    for conversation in conversations:
        try:
            example = Example(*tokenizer.encode_chat(conversation.messages), conversation.source)
        except ValueError as error:
            faults.append(f"{conversation.source}: {error}")
            continue
        if len(example.ids) <= max_length:
            examples.append(example)
        elif not drop_long:
            lengths.append(f"{conversation.source}: {len(example.ids)} tokens")
    if lengths:
        faults.append(
            f"{len(lengths)} of {len(conversations)} conversations are longer than {max_length} tokens, and none is cut: "
            "raise the limit, shorten them, or choose to leave them out"
        )
    _raise_all(faults + lengths)
    return examples


def collate(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """A batch, padded on the right: input_ids and labels, (B, T) int64.

    Padding needs no mask: under causal attention no token sees what follows it, and its labels ask for no loss. Labels are set
    from the examples' masks and never from ids, since a pad id may be a stop id that has to be learnt.
    """
    T = max(len(example.ids) for example in examples)
    input_ids = torch.zeros(len(examples), T, dtype=torch.long)
    labels = torch.full((len(examples), T), IGNORE)
    for row, example in enumerate(examples):
        ids, mask = torch.tensor(example.ids), torch.tensor(example.mask)
        input_ids[row, : len(ids)] = ids
        labels[row, : len(ids)] = ids.where(mask, IGNORE)
    return input_ids, labels


def shuffled_batches(
    examples: Sequence[Example], batch_size: int, seed: int, epoch: int = 0, batch: int = 0
) -> Iterator[list[Example]]:
    """Batches without end: every example once an epoch, shuffled by seed and epoch; an epoch's last batch may be smaller.

    Args:
        epoch, batch: where to begin, both counted from 0.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epoch):
        torch.randperm(len(examples), generator=generator)
    while True:
        order = torch.randperm(len(examples), generator=generator).tolist()
        for start in range(batch * batch_size, len(order), batch_size):
            yield [examples[i] for i in order[start : start + batch_size]]
        batch = 0
