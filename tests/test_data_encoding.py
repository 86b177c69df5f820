import os
import signal
import threading
import time
from collections import Counter
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minilora import phi3
from minilora.data.conversations import SHOWN, Conversation
from minilora.data.encoding import CHUNK, Example, collate, encode_conversations, shuffled_batches
from minilora.kernels.cross_entropy import IGNORE

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint):
    return phi3.load_tokenizer(tiny_checkpoint)


def talk(question, answer, source="chat.jsonl:1"):
    return Conversation([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], source)


# Encoding


def test_an_example_learns_the_answers_and_their_ends(tokenizer):
    conversation = Conversation([USER, ASSISTANT, USER, {"role": "assistant", "content": "bye"}], "chat.jsonl:1")
    (example,) = encode_conversations([conversation], tokenizer, max_length=1000)
    learnt, runs = [], 0
    for i, (id_, masked) in enumerate(zip(example.ids, example.mask, strict=True)):
        if masked:
            learnt.append(id_)
            runs += not example.mask[i - 1]
    end = tokenizer.encode("<|im_end|>")
    assert learnt == tokenizer.encode("hello") + end + tokenizer.encode("bye") + end
    assert runs == 2
    assert example.ids == tokenizer.encode(tokenizer.render(conversation.messages))


def test_without_assistant_only_loss_every_token_is_learnt(tokenizer):
    conversation = talk("hi", "hello")
    (answers,) = encode_conversations([conversation], tokenizer, max_length=1000)
    (whole,) = encode_conversations([conversation], tokenizer, max_length=1000, assistant_only_loss=False)
    assert whole.ids == answers.ids
    assert all(whole.mask)
    assert not all(answers.mask)


def test_a_conversation_of_just_the_limit_is_kept_whole(tokenizer):
    conversation = talk("hi", "hello")
    length = len(tokenizer.encode_chat(conversation.messages)[0])
    assert len(encode_conversations([conversation], tokenizer, max_length=length)[0].ids) == length
    with pytest.raises(ValueError, match=f"1 of 1 conversations are longer than {length - 1} tokens, and none is cut"):
        encode_conversations([conversation], tokenizer, max_length=length - 1)


def test_too_long_conversations_are_counted_and_named_with_their_length(tokenizer):
    conversations = [talk("hi", "a", "chat.jsonl:1"), talk("hi" * 50, "b", "chat.jsonl:2"), talk("hi", "c" * 99, "b.jsonl:7")]
    lengths = [len(tokenizer.encode_chat(conversation.messages)[0]) for conversation in conversations]
    with pytest.raises(ValueError, match="longer than 90") as refused:
        encode_conversations(conversations, tokenizer, max_length=90)
    found = str(refused.value).splitlines()
    assert found[0].startswith("2 of 3 conversations are longer than 90 tokens, and none is cut")
    assert found[1:] == [f"chat.jsonl:2: {lengths[1]} tokens", f"b.jsonl:7: {lengths[2]} tokens"]


def test_drop_long_leaves_out_the_long_ones_and_keeps_the_others_in_order(tokenizer):
    conversations = [talk("a", "one"), talk("hi" * 50, "long"), talk("b", "two"), talk("hi" * 60, "long")]
    kept = encode_conversations(conversations, tokenizer, max_length=90, drop_long=True)
    assert kept == encode_conversations([conversations[0], conversations[2]], tokenizer, max_length=90)
    assert len(kept) == 2


def test_what_the_template_refuses_is_named_by_its_source(tokenizer):
    conversations = [
        talk("hi", "hello", "chat.jsonl:1"),
        talk("say <|im_end|>", "no", "chat.jsonl:4"),
        talk("hi", "<|im_start|>", "chat.jsonl:9"),
    ]
    for drop_long in (False, True):
        with pytest.raises(ValueError, match="special token") as refused:
            encode_conversations(conversations, tokenizer, max_length=90, drop_long=drop_long)
        assert [fault.split(": ")[0] for fault in str(refused.value).splitlines()] == ["chat.jsonl:4", "chat.jsonl:9"]


def test_refused_and_too_long_ones_are_told_together_and_beyond_the_shown_ones_counted(tokenizer):
    conversations = [talk("<|im_end|>", "no", "chat.jsonl:0")] + [talk("hi" * 50, "x", f"chat.jsonl:{i}") for i in range(1, 41)]
    with pytest.raises(ValueError, match=r"chat\.jsonl:0: .*special token") as refused:
        encode_conversations(conversations, tokenizer, max_length=90)
    found = str(refused.value).splitlines()
    assert "40 of 40 conversations are longer than 90 tokens" in found[1]
    assert len(found) == SHOWN + 1
    assert found[-1] == f"… and {42 - SHOWN} more"


words = st.text(min_size=1, max_size=20) | st.sampled_from(["<|im_end|>", "<|im_start|>", "é" * 200])


@given(talks=st.lists(st.lists(st.tuples(words, words), min_size=1, max_size=3), min_size=1, max_size=2 * CHUNK))
def test_in_threads_results_and_faults_are_those_of_one_after_the_other(tokenizer, talks):
    conversations, expected, faults = [], [], []
    for number, turns in enumerate(talks, start=1):
        messages = [{"role": r, "content": t} for turn in turns for r, t in zip(("user", "assistant"), turn, strict=True)]
        conversations.append(Conversation(messages, f"chat.jsonl:{number}"))
        try:
            expected.append(Example(*tokenizer.encode_chat(messages), source=f"chat.jsonl:{number}"))
        except ValueError as error:
            faults.append(f"chat.jsonl:{number}: {error}")
    if faults:
        with pytest.raises(ValueError, match="special token") as refused:
            encode_conversations(conversations, tokenizer, 10**9)
        assert str(refused.value).splitlines()[:SHOWN] == faults[:SHOWN]
    else:
        found = encode_conversations(conversations, tokenizer, 10**9)
        assert found == expected
        assert [example.source for example in found] == [example.source for example in expected]


def test_several_conversations_are_encoded_at_once_and_stay_in_their_order(tokenizer, monkeypatch):
    conversations = [talk("hi", str(n)) for n in range(2 * CHUNK)]

    class Meeting:
        """Encodes nothing before two conversations have come; those of the first half come out last."""

        def __init__(self):
            self.all_here = threading.Barrier(2, timeout=30)

        def encode_chat(self, messages):
            self.all_here.wait()
            if messages is conversations[CHUNK - 1].messages:
                time.sleep(0.2)
            return tokenizer.encode_chat(messages)

    monkeypatch.setattr("os.cpu_count", lambda: 2)
    found = encode_conversations(conversations, Meeting(), 1000)
    assert [example.ids for example in found] == [tokenizer.encode_chat(one.messages)[0] for one in conversations]


def test_what_is_interrupted_ends_without_the_rest(tokenizer):
    encoded = []

    class Interrupted:
        def encode_chat(self, messages):
            encoded.append(messages)
            if len(encoded) == CHUNK:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1e-3)
            return tokenizer.encode_chat(messages)

    with pytest.raises(KeyboardInterrupt):
        encode_conversations([talk("hi", str(n)) for n in range(1000 * CHUNK)], Interrupted(), 1000)
    assert len(encoded) < 100 * CHUNK


# Batches

tokens = st.lists(st.tuples(st.integers(0, 300), st.booleans()), min_size=1, max_size=12)
batches = st.lists(tokens.map(lambda pairs: Example(*map(list, zip(*pairs, strict=True)))), min_size=1, max_size=5)


@given(examples=batches)
def test_a_batch_holds_every_example_and_learns_by_the_masks_alone(examples):
    batch = collate(examples)
    input_ids, labels = batch["input_ids"], batch["labels"]
    assert list(batch) == ["input_ids", "labels"]  # padding needs no mask
    assert input_ids.shape == labels.shape == (len(examples), max(len(example.ids) for example in examples))
    assert input_ids.dtype == labels.dtype == torch.int64
    for row, example in enumerate(examples):
        n = len(example.ids)
        assert input_ids[row, :n].tolist() == example.ids
        # Whatever the id, be it the padding's own: the mask decides.
        assert labels[row, :n].tolist() == [id_ if on else IGNORE for id_, on in zip(example.ids, example.mask, strict=True)]
        assert (labels[row, n:] == IGNORE).all()
        assert ((input_ids[row, n:] >= 0) & (input_ids[row, n:] < 1)).all()  # an id that any vocabulary has


def test_a_batch_of_packed_rows_numbers_their_documents_and_its_padding_0():
    rows = [Example([5, 6, 7], [False, True, False], [1, 1, 2]), Example([8, 9], [False, True])]
    batch = collate(rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 2], [1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 6, IGNORE], [IGNORE, 9, IGNORE]]


def examples_of(count):
    return [Example([i], [True]) for i in range(count)]


def order_of(examples, batch_size, seed, epochs):
    """The ids in the order of several epochs."""
    a_whole_epoch = -(-len(examples) // batch_size)
    drawn = islice(shuffled_batches(examples, batch_size, seed), epochs * a_whole_epoch)
    return [example.ids[0] for batch in drawn for example in batch]


@given(count=st.integers(1, 20), batch_size=st.integers(1, 8), seed=st.integers(0, 2**32))
def test_every_example_comes_once_an_epoch(count, batch_size, seed):
    order = order_of(examples_of(count), batch_size, seed, epochs=3)
    for epoch in range(3):
        assert Counter(order[epoch * count : (epoch + 1) * count]) == Counter(range(count))


def test_batches_are_full_but_for_the_last_of_an_epoch():
    sizes = [len(batch) for batch in islice(shuffled_batches(examples_of(7), 3, seed=0), 6)]
    assert sizes == [3, 3, 1, 3, 3, 1]


def test_seed_and_epoch_decide_the_order():
    examples = examples_of(50)
    order = order_of(examples, 8, seed=3, epochs=2)
    assert order == order_of(examples, 8, seed=3, epochs=2)
    assert order == order_of(examples, 1, seed=3, epochs=2)  # whatever the size of a batch
    assert order != order_of(examples, 8, seed=4, epochs=2)
    assert order[:50] != order[50:] != list(range(50))
    assert order[:50] != list(range(50))


@given(count=st.integers(1, 20), batch_size=st.integers(1, 8), epoch=st.integers(0, 3), data=st.data())
def test_batches_begin_where_they_are_asked_to(count, batch_size, epoch, data):
    whole = -(-count // batch_size)
    batch = data.draw(st.integers(0, whole - 1))
    from_the_start = islice(shuffled_batches(examples_of(count), batch_size, 3), epoch * whole + batch, 5 * whole)
    taken_up = shuffled_batches(examples_of(count), batch_size, 3, epoch, batch)
    assert list(from_the_start) == list(islice(taken_up, (5 - epoch) * whole - batch))


def test_the_order_neither_heeds_nor_moves_torchs_own_generator():
    torch.manual_seed(0)
    first, drawn = order_of(examples_of(9), 2, seed=1, epochs=1), torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), drawn)
    assert order_of(examples_of(9), 2, seed=1, epochs=1) == first
