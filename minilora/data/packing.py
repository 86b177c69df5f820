"""Conversations packed into rows of one length, so that hardly any of a batch is padding.

Each token of a row carries the number of its document, by which the model keeps the documents apart: they neither see nor
foretell one another, and each starts at position 0. Loss and gradients are those of the conversations one by one.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence

from minilora.data.encoding import Example


def pack(examples: Sequence[Example], max_seq_length: int) -> list[Example]:
    """Packs whole conversations into rows of at most max_seq_length tokens, as few as best fit finds.

    Source: Ding et al. 2024, "Fewer Truncations Improve Language Modeling".

    Raises:
        ValueError: conversations are longer than a row.
    """
    too_long = sum(len(example.ids) > max_seq_length for example in examples)
    if too_long:
        raise ValueError(
            f"{too_long} of {len(examples)} conversations are longer than a packed row of {max_seq_length} tokens: raise "
            "max_seq_length, or leave them out"
        )
    return [_joined([examples[i] for i in row]) for row in best_fit([len(example.ids) for example in examples], max_seq_length)]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of indices whose lengths add up to no more than the capacity; the longest comes first, and each joins the row that
    it leaves the least room in, or opens one. Source: Johnson et al. 1974 (best fit decreasing)."""
    rows, open_rows, rooms = [], defaultdict(list), []  # all; by the room left; the sizes of room that there are, rising
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        best = bisect_left(rooms, lengths[i])
        if best == len(rooms):
            room, row = capacity, []
            rows.append(row)
        else:
            room = rooms[best]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del rooms[best]
        row.append(i)
        left = room - lengths[i]
        if not open_rows[left]:
            insort(rooms, left)
        open_rows[left].append(row)
    return rows


def _joined(row: list[Example]) -> Example:
    """One example of several; the first token of each follows nothing, and is not learnt."""
    return Example(
        ids=[id_ for example in row for id_ in example.ids],
        mask=[learnt and place > 0 for example in row for place, learnt in enumerate(example.mask)],
        documents=[number for number, example in enumerate(row, start=1) for _ in example.ids],
        source=", ".join(filter(None, (example.source for example in row))),
    )
