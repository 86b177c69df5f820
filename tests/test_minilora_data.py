import json
import re
from collections import Counter
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minilora import phi3
from minilora.data import (
    SHOWN,
    Conversation,
    Example,
    collate,
    encode_conversations,
    read_conversations,
    shuffled_batches,
)
from minilora.kernels.cross_entropy import IGNORE

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}
HUMAN = {"from": "human", "value": "hi"}
GPT = {"from": "gpt", "value": "hello"}
GOOD = {"messages": [USER, ASSISTANT]}


def lines(tmp_path, *records):
    """A file with a line for each record; a text stands as it is."""
    path = tmp_path / "chat.jsonl"
    texts = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint):
    return phi3.load_tokenizer(tiny_checkpoint)


def talk(question, answer, source="chat.jsonl:1"):
    return Conversation([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], source)


# Reading


def test_the_three_shapes_become_the_same_conversations(tmp_path):
    system = {"role": "system", "content": "be brief"}
    path = lines(
        tmp_path,
        {"messages": [system, USER, ASSISTANT, USER, ASSISTANT]},
        {"instruction": "add", "input": "1 2", "output": "3"},
        {"instruction": "add", "input": "", "output": "3"},
        {"instruction": "add", "output": "3"},
        {"conversations": [{"from": "system", "value": "be brief"}, HUMAN, GPT]},
        {"conversations": [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "hello"}]},
    )
    add = {"role": "user", "content": "add"}
    three = {"role": "assistant", "content": "3"}
    assert [conversation.messages for conversation in read_conversations(path)] == [
        [system, USER, ASSISTANT, USER, ASSISTANT],
        [{"role": "user", "content": "add\n\n1 2"}, three],
        [add, three],
        [add, three],
        [system, USER, ASSISTANT],
        [USER, ASSISTANT],
    ]


def test_empty_lines_are_skipped_and_counted(tmp_path):
    path = lines(tmp_path, "", GOOD, "   ", "", GOOD)
    assert [conversation.source for conversation in read_conversations(path)] == [f"{path}:2", f"{path}:5"]


def test_texts_keep_every_character(tmp_path):
    text = "  naïve 日本 🙂\n\ttab\u2028 line\r\n "
    for ascii_only in (True, False):
        path = lines(tmp_path, json.dumps({"messages": [USER, {"role": "assistant", "content": text}]}, ensure_ascii=ascii_only))
        assert read_conversations(path)[0].messages[1]["content"] == text


TOOL = {"role": "tool", "content": "x"}
FAULTS = {
    "no JSON": ("{", "Expecting property name"),
    "no object": ([GOOD], "a line must hold a JSON object, not a list"),
    "another shape": ({"prompt": ""}, """must have "messages", "conversations" or "instruction", and has 'prompt'"""),
    "no key": ({}, "and has no key"),
    "no list": ({"messages": USER}, '"messages" must be a list of objects'),
    "no objects": ({"messages": ["hi"]}, '"messages" must be a list of objects'),
    "no list of turns": ({"conversations": None}, '"conversations" must be a list of objects'),
    "unknown role": ({"messages": [TOOL, ASSISTANT]}, "turn 1 has the unknown role 'tool'; known are system, user, assistant"),
    "unknown speaker": ({"conversations": [{"from": "bard", "value": "x"}, GPT]}, "turn 1 has the unknown role 'bard'"),
    "no role": ({"messages": [{"content": "x"}, ASSISTANT]}, '"role" must be a text, not None'),
    "no content": ({"messages": [USER, {"role": "assistant", "content": None}]}, '"content" must be a text, not None'),
    "content in parts": ({"messages": [{"role": "user", "content": [{"type": "text"}]}, ASSISTANT]}, '"content" must be a text'),
    "empty text": ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "turn 2 (assistant) is empty"),
    "no assistant": ({"messages": [USER, USER]}, "no turn is the assistant's: there is nothing to learn"),
    "no turn": ({"messages": []}, "no turn is the assistant's"),
    "no output": ({"instruction": "add"}, '"output" must be a text, not None'),
    "empty output": ({"instruction": "add", "output": ""}, "turn 2 (assistant) is empty"),
    "input no text": ({"instruction": "add", "input": [1], "output": "3"}, '"input" must be a text, not [1]'),
    "half a surrogate pair": ({"instruction": "\ud800", "output": "x"}, "turn 1 (user)"),  # no tokenizer takes it
}  # fmt: skip


@pytest.mark.parametrize(("record", "message"), FAULTS.values(), ids=FAULTS)
def test_a_broken_line_is_refused_with_file_and_line(tmp_path, record, message):
    path = lines(tmp_path, GOOD, record, GOOD)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}:2: ')}.*{re.escape(message)}"):
        read_conversations(path)


def test_all_faults_of_a_file_come_at_once(tmp_path):
    records = [record for record, _ in FAULTS.values()][:SHOWN]
    path = lines(tmp_path, GOOD, *records)
    with pytest.raises(ValueError, match=re.escape(str(path))) as refused:
        read_conversations(path)
    found = str(refused.value).splitlines()
    assert [fault.split(": ")[0] for fault in found] == [f"{path}:{number}" for number in range(2, 2 + len(records))]


def test_all_faults_of_a_line_come_at_once(tmp_path):
    path = lines(tmp_path, {"messages": [TOOL, {"role": "user", "content": ""}]})
    with pytest.raises(ValueError, match=r"turn 1 has the unknown role .*; turn 2 \(user\) is empty; no turn is the assistant's"):
        read_conversations(path)


@pytest.mark.parametrize("count", [SHOWN, SHOWN + 1, SHOWN + 30])
def test_faults_beyond_the_shown_ones_are_counted(tmp_path, count):
    path = lines(tmp_path, *["{"] * count)
    with pytest.raises(ValueError, match=re.escape(f"{path}:1: ")) as refused:
        read_conversations(path)
    found = str(refused.value).splitlines()
    assert found[SHOWN - 1].startswith(f"{path}:{SHOWN}: ")
    assert found[SHOWN:] == ([f"… and {count - SHOWN} more"] if count > SHOWN else [])


@pytest.mark.parametrize("content", ["", "\n", "  \n\n"])
def test_a_file_without_conversation_is_refused(tmp_path, content):
    path = tmp_path / "chat.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} holds no conversation"):
        read_conversations(path)


@pytest.mark.parametrize(("encoding", "more"), [("utf-16", b""), ("utf-8", b"\xe9\n")])
def test_a_file_that_is_no_utf8_is_refused_by_name(tmp_path, encoding, more):
    path = tmp_path / "chat.jsonl"
    path.write_bytes((json.dumps(GOOD) + "\n").encode(encoding) + more)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} must be UTF-8 text"):
        read_conversations(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl"):
        read_conversations(tmp_path / "absent.jsonl")


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
    assert "40 of 41 conversations are longer than 90 tokens" in found[1]
    assert len(found) == SHOWN + 1
    assert found[-1] == f"… and {42 - SHOWN} more"


# Batches

tokens = st.lists(st.tuples(st.integers(0, 300), st.booleans()), min_size=1, max_size=12)
batches = st.lists(tokens.map(lambda pairs: Example(*map(list, zip(*pairs, strict=True)))), min_size=1, max_size=5)


@given(examples=batches)
def test_a_batch_holds_every_example_and_learns_by_the_masks_alone(examples):
    input_ids, labels = collate(examples)
    assert input_ids.shape == labels.shape == (len(examples), max(len(example.ids) for example in examples))
    assert input_ids.dtype == labels.dtype == torch.int64
    for row, example in enumerate(examples):
        n = len(example.ids)
        assert input_ids[row, :n].tolist() == example.ids
        # Whatever the id, be it the padding's own: the mask decides.
        assert labels[row, :n].tolist() == [id_ if on else IGNORE for id_, on in zip(example.ids, example.mask, strict=True)]
        assert (labels[row, n:] == IGNORE).all()
        assert ((input_ids[row, n:] >= 0) & (input_ids[row, n:] < 1)).all()  # an id that any vocabulary has


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
