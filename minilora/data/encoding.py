"""Conversations as token ids, what of them is learnt, and batches of both."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.pool import ThreadPool
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from minilora.data.conversations import Conversation, Message, raise_all
from minilora.kernels.cross_entropy import IGNORE
from minilora.training.distributed import rank

CHUNK = 64  # conversations that a thread takes at a time


class ChatTokenizer(Protocol):
    """What encoding needs of a tokenizer."""

    def encode_chat(self, messages: list[Message]) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, and which of them are the assistant's; called in several threads at once."""


@dataclass(frozen=True)
class Example:
    """A conversation as token ids, and which of them are to be learnt; or a row of several, made by minilora.data.packing."""

    ids: list[int]
    mask: list[bool]
    documents: list[int] | None = None  # of a packed row: for each token the number of its conversation, 1, 2, 3, …
    source: str = field(default="", compare=False)  # "file:line"


def encode_conversations(
    conversations: Sequence[Conversation],
    tokenizer: ChatTokenizer,
    max_length: int,
    drop_long: bool = False,
    assistant_only_loss: bool = True,
) -> list[Example]:
    """Token ids and masks of conversations by the tokenizer's chat template.

    Args:
        max_length: tokens that a conversation may have. None is ever cut: a longer one is an error, or is left out.
        drop_long: leave longer ones out; what is left out can be counted by the length of the result.
        assistant_only_loss: learn the assistant's turns with their end tokens; otherwise every token.

    Raises:
        ValueError: the template refuses conversations or they are too long; each is named by its source.
    """
    # Threads, since the tokenizers library lets go of Python's lock. Two of them took half the time of one for questions of
    # 135 tokens; two processes took 4 s of a core each to import torch, in which a core encodes some 15,000.
    taken, examples, faults = [], [], []
    with ThreadPool() as pool:  # a thread for each core
        found = pool.imap(partial(_encoded, tokenizer), conversations, CHUNK)
        bar = tqdm(found, "tokenise", len(conversations), leave=False, unit="conversation", delay=1, disable=rank() > 0)
        for conversation, encoded in zip(conversations, bar, strict=True):
            if isinstance(encoded, str):
                faults.append(f"{conversation.source}: {encoded}")
            else:
                taken.append(conversation)
                ids, mask = encoded
                learnt = mask if assistant_only_loss else [True] * len(ids)
                examples.append(Example(ids, learnt, source=conversation.source))
    if not drop_long:
        faults += too_long(taken, examples, max_length)
    raise_all(faults)
    return [example for example in examples if len(example.ids) <= max_length]


def _encoded(tokenizer: ChatTokenizer, conversation: Conversation) -> tuple[list[int], list[bool]] | str:
    """The ids and the mask of a conversation, or why the template refuses it."""
    try:
        return tokenizer.encode_chat(conversation.messages)
    except ValueError as error:
        return str(error)


def too_long(conversations: Sequence[Conversation], examples: Sequence[Example], max_length: int) -> list[str]:
    """The faults of the conversations that have more than max_length tokens: how many, and each with its source."""
    lengths = [(conversation.source, len(example.ids)) for conversation, example in zip(conversations, examples, strict=True)]
    found = [f"{source}: {length} tokens" for source, length in lengths if length > max_length]
    count = f"{len(found)} of {len(examples)} conversations are longer than {max_length} tokens, and none is cut: "
    return [count + "raise the limit, shorten them, or leave them out (--drop-long)", *found] if found else []


def count_targets(examples: Sequence[Example]) -> int:
    """The tokens that a loss is on: those learnt, but a row's first, which nothing foretells."""
    return sum(sum(example.mask[1:]) for example in examples)


def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
    """A batch, padded on the right: input_ids and labels, and the attention_mask of packed rows, each (B, T) int64.

    Padding needs no mask: under causal attention no token sees what follows it, and its labels ask for no loss. Packed rows do,
    to keep their documents apart. Labels are set from the examples' masks and never from ids, since a pad id may be a stop id
    that has to be learnt.
    """
    shape = len(examples), max(len(example.ids) for example in examples)
    batch = {"input_ids": torch.zeros(shape, dtype=torch.long), "labels": torch.full(shape, IGNORE)}
    if any(example.documents for example in examples):
        batch["attention_mask"] = torch.zeros(shape, dtype=torch.long)
    for row, example in enumerate(examples):
        T, ids = len(example.ids), torch.tensor(example.ids)
        batch["input_ids"][row, :T] = ids
        batch["labels"][row, :T] = ids.where(torch.tensor(example.mask), IGNORE)
        if "attention_mask" in batch:
            batch["attention_mask"][row, :T] = torch.tensor(example.documents or 1)
    return batch


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
