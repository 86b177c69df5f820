"""From the data that a command names to examples, telling on the way what was found."""

import json
from collections.abc import Sequence

from minilora.config import RunConfig
from minilora.data.conversations import Conversation, raise_all
from minilora.data.encoding import Example, too_long
from minilora.data.lengths import describe_lengths
from minilora.data.mixture import draw, split
from minilora.data.sources import parse_source, read_source
from minilora.data.token_cache import HashedTokenizer, encode_cached
from minilora.training.distributed import after_first


def gather(sources: Sequence[str], seed: int, eval_share: float = 0.0) -> tuple[list[Conversation], list[Conversation]]:
    """The conversations of all sources, as often as their weights say, and those held out to evaluate on, each once.

    Args:
        sources: NAME or NAME=WEIGHT, as sources.parse_source reads them.

    Raises:
        ValueError: nothing is held out of an eval_share above 0; what reading and splitting raise.
    """
    gathered, held_out = [], []
    for source in map(parse_source, sources):
        read = read_source(source)
        kept, held = split(read, eval_share, seed)
        drawn = draw(kept, source.weight, seed)
        print(
            f"{source.name}: {len(read)} conversations"
            + (f", {len(held)} held out" if eval_share else "")
            + (f", {len(drawn)} an epoch by the weight {source.weight:g}" if source.weight != 1 else "")
        )
        gathered, held_out = gathered + drawn, held_out + held
    if eval_share and not held_out:
        raise ValueError(f"a share of {eval_share} holds out none of {len(gathered)} conversations: raise it")
    return gathered, held_out


def prepare(conversations: list[Conversation], tokenizer: HashedTokenizer, run: RunConfig, drop_long: bool) -> list[Example]:
    """The examples of conversations; their lengths are told before one that is too long is refused or left out.

    Raises:
        ValueError: there are none, the template refuses some, or some are too long and drop_long is not set.
    """
    if not conversations:
        raise ValueError("no conversation is left: raise the weights, or lower the share held out")
    limit = run.training.max_seq_length
    examples = after_first(lambda: encode_cached(conversations, tokenizer, run.assistant_only_loss))
    print(describe_lengths(examples, limit))
    if not drop_long:
        raise_all(too_long(conversations, examples, limit))
    kept = [example for example in examples if len(example.ids) <= limit]
    if not kept:
        raise ValueError(f"all {len(examples)} conversations are longer than {limit} tokens")
    if len(kept) < len(examples):
        print(f"{len(examples) - len(kept)} longer than {limit} left out, {len(kept)} conversations stay")
    return kept


def count_shared(conversations: Sequence[Conversation], others: Sequence[Conversation]) -> int:
    """How many of these conversations have the same messages as one of the others."""
    messages = {json.dumps(other.messages) for other in others}
    return sum(json.dumps(conversation.messages) in messages for conversation in conversations)
