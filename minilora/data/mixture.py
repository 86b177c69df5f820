"""Which conversations are trained on, and how often: some held out to evaluate on, and sources weighed against one another."""

import json
import random
from collections.abc import Sequence
from hashlib import sha256

from minilora.data.conversations import Conversation


def split(conversations: Sequence[Conversation], eval_share: float, seed: int) -> tuple[list[Conversation], list[Conversation]]:
    """Conversations to train on, and those held out to evaluate on, about eval_share of all.

    The side of a conversation follows from its messages, the share and the seed alone: two of the same messages are never on
    both sides, wherever they come from, and data that are added later move none.

    Raises:
        ValueError: eval_share is not in [0, 1).
    """
    if not 0 <= eval_share < 1:
        raise ValueError(f"the share held out to evaluate on must lie in [0, 1), not {eval_share}")
    if not eval_share:
        return list(conversations), []
    sides = [], []
    for conversation in conversations:
        digest = sha256(json.dumps([seed, conversation.messages], sort_keys=True).encode()).digest()
        sides[int.from_bytes(digest[:8]) < eval_share * 2**64].append(conversation)
    return sides


def draw(conversations: Sequence[Conversation], weight: float, seed: int) -> list[Conversation]:
    """The conversations as an epoch holds them: at weight 1 each once, at 2 each twice, at 0.3 three tenths drawn by seed.

    Every epoch holds the same ones; what is left of a weight above 1 is drawn likewise.
    """
    times, part = divmod(weight, 1)
    drawn = random.Random(seed).sample(range(len(conversations)), round(part * len(conversations)))
    return list(conversations) * int(times) + [conversations[i] for i in sorted(drawn)]
