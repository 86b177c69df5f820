import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.data.encoding import Example, collate, shuffled_batches
from minilora.data.lengths import BARS, WIDTH, describe_lengths, describe_padding, histogram, padding
from minilora.data.packing import pack
from minilora.training.config import TrainConfig


def examples_of(lengths):
    return [Example([1] * length, [False] * (length - 1) + [True]) for length in lengths]


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60))
def test_every_length_is_counted_in_the_bar_of_its_range(lengths):
    lines = histogram(lengths).splitlines()
    assert len(lines) <= BARS
    found = [re.fullmatch(r" *([\d,]+) to +([\d,]+) tokens  ([█▏]*) +([\d,]+)", line).groups() for line in lines]
    most = max(int(count.replace(",", "")) for *_, count in found)
    for low, high, bar, count in found:
        low, high, count = (int(number.replace(",", "")) for number in (low, high, count))
        assert count == sum(low <= length <= high for length in lengths)
        assert len(bar) == (max(1, round(count / most * WIDTH)) if count else 0)
    assert sum(int(count.replace(",", "")) for *_, count in found) == len(lengths)


def test_the_bars_of_a_histogram_stand_below_one_another():
    assert histogram([1, 2, 30, 900, 901, 1150]).splitlines() == [
        f"    1 to   100 tokens  {'█' * 40}  3",
        *(f"{low:5,} to {low + 99:5,} tokens  {'':40}  0" for low in range(101, 801, 100)),
        f"  801 to   900 tokens  {'█' * 13 + ' ' * 27}  1",
        f"  901 to 1,000 tokens  {'█' * 13 + ' ' * 27}  1",
        f"1,001 to 1,100 tokens  {'':40}  0",
        f"1,101 to 1,200 tokens  {'█' * 13 + ' ' * 27}  1",
    ]


def test_the_report_counts_tokens_and_what_is_too_long():
    text = describe_lengths(examples_of([10, 20, 30, 2000]), max_seq_length=100)
    assert "4 conversations of 10 to 2,000 tokens, half of them of at most 25; 2,060 tokens in all, 4 of them learnt" in text
    assert "1 longer than max_seq_length 100 (25.0%)" in text


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 5), st.integers(0, 9))
def test_padding_is_what_the_batches_of_the_first_epoch_are_padded_with(lengths, size, seed):
    examples = examples_of(lengths)
    batches, left = shuffled_batches(examples, size, seed), len(examples)
    cells = 0
    while left > 0:
        batch = next(batches)
        cells, left = cells + collate(batch)["input_ids"].numel(), left - len(batch)
    assert padding(lengths, size, seed) == pytest.approx(1 - sum(lengths) / cells)


@pytest.mark.parametrize("packing", [False, True])
def test_padding_is_told_before_and_after_packing(packing):
    examples = examples_of([(7 * i) % 61 + 1 for i in range(60)])
    config = TrainConfig(per_device_train_batch_size=2, max_seq_length=64, packing=packing)
    rows = [len(row.ids) for row in pack(examples, 64)]
    before, after = padding([len(example.ids) for example in examples], 2, 0), padding(rows, 2, 0)
    assert before > 2 * after
    assert describe_padding(examples, config) == (
        f"padding in batches of 2: {before:.1%} unpacked, {after:.1%} packed into rows of at most 64 tokens, "
        f"{len(rows)} of them; packing is {'on' if packing else 'off'}"
    )
