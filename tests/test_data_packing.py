import re
from collections import Counter

import pytest
import torch
from helpers import rms_error, tiny_config, tiny_model
from hypothesis import given
from hypothesis import strategies as st

import minilora as lora
from minilora.data.encoding import Example
from minilora.data.packing import pack
from minilora.phi3.config import LongRope
from minilora.training.loop import accumulate_gradients, total_steps

CONFIGS = {
    "grouped-query": tiny_config(),
    "window": tiny_config(sliding_window=5),
    "longrope": tiny_config(  # documents of up to 12 tokens take the short factors, longer ones the long, in one row
        longrope=LongRope([1.0, 1.2, 1.4, 1.6], [2.0, 4.0, 8.0, 16.0]), original_max_position_embeddings=12, sliding_window=9
    ),
}
lengths = st.lists(st.integers(1, 30), min_size=1, max_size=40)


def examples_of(lengths) -> list[Example]:
    """Of these lengths, with unlike numbers of targets; no two tokens in a row alike."""
    generator, made = torch.Generator().manual_seed(0), []
    for i, length in enumerate(lengths):
        learnt = max(1, (7 * i + 3) % length)
        ids = torch.randint(256, (length,), generator=generator).tolist()
        made.append(Example(ids, [False] * (length - learnt) + [True] * learnt))
    return made


def documents_of(row: Example) -> list[Example]:
    """The documents of a packed row, one by one."""
    found = []
    for number in range(1, max(row.documents) + 1):
        places = [i for i, document in enumerate(row.documents) if document == number]
        assert places == list(range(places[0], places[-1] + 1))
        found.append(Example([row.ids[i] for i in places], [row.mask[i] for i in places]))
    return found


def without_first_target(example: Example) -> Example:
    return Example(example.ids, [False, *example.mask[1:]])


@given(lengths, st.integers(30, 64))
def test_every_conversation_lies_whole_in_just_one_row(lengths, max_seq_length):
    examples = examples_of(lengths)
    rows = pack(examples, max_seq_length)
    assert all(len(row.ids) == len(row.mask) == len(row.documents) <= max_seq_length for row in rows)
    found = [document for row in rows for document in documents_of(row)]
    expected = [without_first_target(example) for example in examples]
    assert Counter(map(repr, found)) == Counter(map(repr, expected))


@given(lengths, st.integers(30, 64))
def test_rows_are_as_few_as_best_fit_promises(lengths, max_seq_length):
    """Best fit decreasing takes at most 11/9 of the fewest rows and 4 more (Johnson et al. 1974)."""
    rows, least = pack(examples_of(lengths), max_seq_length), -(-sum(lengths) // max_seq_length)
    assert len(rows) <= 11 / 9 * max(least, sum(2 * length > max_seq_length for length in lengths)) + 4
    two = sorted(len(row.ids) for row in rows)[:2]
    assert len(two) < 2 or sum(two) > max_seq_length  # any two rows could not have been one


def test_a_conversation_joins_the_row_that_it_fills_best():
    rows = pack(examples_of([7, 5, 3, 6, 4]), max_seq_length=10)
    assert [[len(document.ids) for document in documents_of(row)] for row in rows] == [[7, 3], [6, 4], [5]]


def test_conversations_longer_than_a_row_are_refused():
    with pytest.raises(ValueError, match=re.escape("2 of 3 conversations are longer than a packed row of 8 tokens")):
        pack(examples_of([9, 8, 20]), 8)


def adapted(config):
    """A tiny Phi-3 in training, with an adapter that is past its start."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = lora.inject(tiny_model(config), lora.LoraConfig(r=4, lora_alpha=8))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, 0.0, 0.1)
    lora.mark_only_lora_as_trainable(model)
    return model.train()


def loss_and_gradients(model, batches):
    model.zero_grad()
    loss, tokens = accumulate_gradients(model, batches)
    return loss, tokens, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
def test_loss_and_gradients_are_those_of_the_conversations_unpacked(config, dtype, tolerance):
    model, examples = adapted(config).to(dtype), examples_of([3, 17, 8, 1, 24, 12, 13, 5, 9, 2])
    rows = pack(examples, 32)
    assert len(rows) < len(examples) / 2
    loss, tokens, gradients = loss_and_gradients(model, [rows[:2], rows[2:]])
    expected_loss, expected_tokens, expected = loss_and_gradients(model, [[example] for example in examples if example.ids[1:]])
    assert loss == pytest.approx(expected_loss, rel=1e-5 if dtype == torch.float32 else 1e-11)
    assert tokens == expected_tokens + 1  # of the conversation of one token, which has no target
    for name, gradient in gradients.items():
        assert rms_error(gradient, expected[name]) < tolerance, name


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_evaluation_of_packed_rows_is_that_of_the_conversations(config):
    model, examples = adapted(config), examples_of([3, 17, 8, 24, 12, 13, 5, 9, 2])
    packed, plain = (lora.evaluate(model, data, batch_size=3, progress=False) for data in (pack(examples, 32), examples))
    assert packed.tokens == plain.tokens
    assert packed.loss == pytest.approx(plain.loss, rel=1e-5)


def test_a_packed_run_takes_the_steps_of_its_rows_and_sees_every_token_once():
    examples = examples_of([3, 17, 8, 24, 12, 13, 5, 9, 2])
    config = lora.TrainConfig(packing=True, max_seq_length=32, per_device_train_batch_size=2, num_train_epochs=2)
    result = lora.train(adapted(tiny_config()), examples, config, progress=False)
    assert result.steps == total_steps(len(pack(examples, 32)), config) == 4
    assert result.tokens == 2 * sum(len(example.ids) for example in examples)


def test_a_conversation_that_no_row_holds_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="longer than a packed row of 8 tokens"):
        lora.train(adapted(tiny_config()), examples_of([9]), lora.TrainConfig(packing=True, max_seq_length=8), None, tmp_path)
    assert not list(tmp_path.iterdir())
