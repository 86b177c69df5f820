"""How long the conversations are, as text to read before training: a histogram, what is too long, and how much is padding."""

import math
from collections.abc import Sequence
from itertools import islice
from statistics import median

from minilora.data.encoding import Example, shuffled_batches
from minilora.data.packing import best_fit
from minilora.training.config import TrainConfig

BARS = 12  # of a histogram at most
WIDTH = 40  # characters of its longest bar


def describe_lengths(examples: Sequence[Example], max_seq_length: int) -> str:
    """A histogram of tokens, their sums, and how many conversations are longer than max_seq_length."""
    lengths, learnt = [len(example.ids) for example in examples], sum(sum(example.mask) for example in examples)
    long = sum(length > max_seq_length for length in lengths)
    return (
        f"{histogram(lengths)}\n"
        f"{len(lengths):,} conversations of {min(lengths):,} to {max(lengths):,} tokens, half of them of at most "
        f"{median(lengths):,.0f}; {sum(lengths):,} tokens in all, {learnt:,} of them learnt\n"
        f"{long:,} longer than max_seq_length {max_seq_length:,} ({long / len(lengths):.1%})"
    )


def describe_padding(examples: Sequence[Example], config: TrainConfig) -> str:
    """The share of padding in a run's batches, packed and not."""
    lengths, size, seed = [len(example.ids) for example in examples], config.per_device_train_batch_size, config.seed
    rows = [sum(lengths[i] for i in row) for row in best_fit(lengths, config.max_seq_length)]
    return (
        f"padding in batches of {size}: {padding(lengths, size, seed):.1%} unpacked, {padding(rows, size, seed):.1%} packed into "
        f"rows of at most {config.max_seq_length:,} tokens, {len(rows):,} of them; packing is {'on' if config.packing else 'off'}"
    )


def padding(lengths: Sequence[int], batch_size: int, seed: int) -> float:
    """The share of padding in all tokens of the first epoch, when rows of these lengths are batched as training does."""
    batches = islice(shuffled_batches(lengths, batch_size, seed), math.ceil(len(lengths) / batch_size))
    return 1 - sum(lengths) / sum(len(batch) * max(batch) for batch in batches)


def histogram(lengths: Sequence[int]) -> str:
    """Counts of lengths as bars of text, in steps of 1, 2 or 5 times a power of ten."""
    steps = (digit * 10**power for power in range(20) for digit in (1, 2, 5))
    step = next(step for step in steps if max(lengths) <= step * BARS)
    counts = [0] * math.ceil(max(lengths) / step)
    for length in lengths:
        counts[(length - 1) // step] += 1
    edge = len(f"{len(counts) * step:,}")
    return "\n".join(
        f"{i * step + 1:{edge},} to {(i + 1) * step:{edge},} tokens  {_bar(count / max(counts)):{WIDTH}}  {count:,}"
        for i, count in enumerate(counts)
    )


def _bar(share: float) -> str:
    return "█" * round(share * WIDTH) or ("▏" if share else "")
