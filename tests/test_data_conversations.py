import json
import re
import sys

import pyarrow
import pyarrow.parquet
import pytest

from minilora.data.conversations import SHOWN, read_conversations

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}
HUMAN = {"from": "human", "value": "hi"}
GPT = {"from": "gpt", "value": "hello"}
GOOD = {"messages": [USER, ASSISTANT]}
TOOLS = [{"name": "clock", "description": "tells the time, naïvely"}]


def lines(tmp_path, *records):
    """A file with a line for each record; a text stands as it is."""
    path = tmp_path / "chat.jsonl"
    texts = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


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


WIZARD = {"role": "wizard", "content": "x"}
FAULTS = {
    "no JSON": ("{", "Expecting property name"),
    "no object": ([GOOD], "a line must hold a JSON object, not a list"),
    "another shape": ({"prompt": ""}, """must have "messages", "conversations" or "instruction", and has 'prompt'"""),
    "no key": ({}, "and has no key"),
    "no list": ({"messages": USER}, '"messages" must be a list of objects'),
    "no objects": ({"messages": ["hi"]}, '"messages" must be a list of objects'),
    "no list of turns": ({"conversations": None}, '"conversations" must be a list of objects'),
    "unknown role": ({"messages": [WIZARD, ASSISTANT]}, "the unknown role 'wizard'; known are system, user, assistant, tool"),
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
    path = lines(tmp_path, {"messages": [WIZARD, {"role": "user", "content": ""}]})
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


# Tools


def test_tools_beside_the_messages_become_part_of_the_system_message(tmp_path):
    system, tool = {"role": "system", "content": "be brief"}, {"role": "tool", "content": "noon"}
    text = json.dumps(TOOLS, ensure_ascii=False)
    path = lines(
        tmp_path,
        {"messages": [system, USER, ASSISTANT, tool, ASSISTANT], "tools": TOOLS},
        {"messages": [system | {"tools": TOOLS}, USER, ASSISTANT]},
        {"messages": [system | {"tools": "as it is"}, USER, ASSISTANT], "tools": []},
        {"messages": [USER, ASSISTANT], "tools": "as it is"},
        {"conversations": [HUMAN, GPT, {"from": "tool", "value": "noon"}, GPT], "tools": None},
    )
    assert [conversation.messages for conversation in read_conversations(path)] == [
        [system | {"tools": text}, USER, ASSISTANT, tool, ASSISTANT],
        [system | {"tools": text}, USER, ASSISTANT],
        [system | {"tools": "as it is"}, USER, ASSISTANT],
        [{"role": "system", "content": "", "tools": "as it is"}, USER, ASSISTANT],
        [USER, ASSISTANT, {"role": "tool", "content": "noon"}, ASSISTANT],
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (GOOD | {"tools": ["clock"]}, '"tools" must be a list of objects, or its JSON text'),
        (GOOD | {"tools": 3}, '"tools" must be a list of objects, or its JSON text'),
        ({"messages": [{"role": "system", "content": "", "tools": TOOLS}, *GOOD["messages"]], "tools": TOOLS}, "not in both"),
        ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{}]}]}, '"tool_calls" is written by no'),
    ],
)
def test_tools_that_no_template_can_write_are_refused(tmp_path, record, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_conversations(lines(tmp_path, record))


# Parquet


def parquet(tmp_path, records, name="chat.parquet"):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / name, row_group_size=2)
    return tmp_path / name


@pytest.mark.parametrize(
    "records",
    [
        [{"messages": [USER, ASSISTANT], "id": 1}, {"messages": [USER, ASSISTANT, USER, ASSISTANT], "id": 2}] * 3,
        [{"instruction": "add", "input": "1 2", "output": "3"}, {"instruction": "add", "input": None, "output": "3"}],
        [{"conversations": [HUMAN, GPT]}],
        [{"messages": [{"role": "system", "content": "x"}, USER, ASSISTANT], "tools": TOOLS}],
    ],
)
def test_rows_of_parquet_are_read_as_lines_of_json(tmp_path, records):
    path = parquet(tmp_path, records)
    found, expected = read_conversations(path), read_conversations(lines(tmp_path, *records))
    assert [conversation.messages for conversation in found] == [conversation.messages for conversation in expected]
    assert [conversation.source for conversation in found] == [f"{path}:{number}" for number in range(1, len(records) + 1)]


def test_broken_rows_of_parquet_are_named(tmp_path):
    path = parquet(tmp_path, [GOOD, {"messages": [USER]}, {"messages": None}])
    with pytest.raises(ValueError, match=re.escape(f"{path}:2: no turn is the assistant's")) as refused:
        read_conversations(path)
    assert str(refused.value).splitlines()[1] == f'{path}:3: "messages" must be a list of objects'


@pytest.mark.parametrize("spoil", [lambda data: b"", lambda data: b"{}", lambda data: data[:-9], lambda data: data[:4] * 99])
def test_what_is_no_parquet_is_refused_by_name(tmp_path, spoil):
    path = parquet(tmp_path, [GOOD])
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=re.escape(f"{path} must be a Parquet file: ")):
        read_conversations(path)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    path = parquet(tmp_path, [GOOD])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=re.escape("is read with the package pyarrow: pip install 'minilora[parquet]'")):
        read_conversations(path)
