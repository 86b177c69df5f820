"""Batches as text: what the model reads, what of it is learnt, and where the documents of a packed row begin."""

import re
from collections.abc import Callable, Sequence
from itertools import groupby

from minilora.data.encoding import Example

LEARNT = {True: ("\033[32m", "\033[0m"), False: ("⟦", "⟧")}  # what opens and closes a learnt piece, on a terminal and elsewhere
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline: data must not steer the terminal


def show_batch(batch: Sequence[Example], decode: Callable[[list[int]], str], colour: bool) -> str:
    """The rows of a batch, each below a line of figures; learnt pieces stand in green, or in ⟦ ⟧ without colour.

    Args:
        decode: ids to text with their special tokens.
    """
    return "\n".join(_show_row(number, row, decode, colour) for number, row in enumerate(batch, start=1))


def _show_row(number: int, row: Example, decode: Callable[[list[int]], str], colour: bool) -> str:
    lines = [f"── row {number}: {len(row.ids)} tokens, {sum(row.mask)} learnt ".ljust(78, "─")]
    start = 0
    for document, places in groupby(row.documents or [0] * len(row.ids)):
        end = start + len(list(places))
        if row.documents:
            lines.append(f"── document {document}: {end - start} tokens ──")
        lines.append(_show_document(row.ids[start:end], row.mask[start:end], decode, colour))
        start = end
    return "\n".join(lines)


def _show_document(ids: list[int], mask: list[bool], decode: Callable[[list[int]], str], colour: bool) -> str:
    opening, closing = LEARNT[colour]
    shown, start, before = "", 0, ""
    for learnt, places in groupby(mask):
        start += len(list(places))
        text = decode(ids[:start])  # from the document's start: a decoder may write its first token otherwise
        piece = CONTROL.sub("\N{REPLACEMENT CHARACTER}", text[len(before) :])
        shown, before = shown + (f"{opening}{piece}{closing}" if learnt else piece), text
    return shown
