"""Chat conversations from JSON Lines and Parquet files, checked line by line."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
SHOWN = 20  # faults spelled out before the rest is only counted

Message = dict[str, str]  # {"role": …, "content": …}, and "tools", a JSON text, where the system message has some


@dataclass(frozen=True)
class Conversation:
    """A conversation and where it came from."""

    messages: list[Message]
    source: str  # "file:line"


def read_conversations(path: Path | str) -> list[Conversation]:
    """Reads a file of conversations in any of three shapes, from JSON Lines, or from Parquet by its ending .parquet.

        {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
        {"instruction": "…", "input": "…", "output": "…"}                                     (Alpaca; input may be absent)
        {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}   (ShareGPT)

    A line of any shape may have "tools", a list of objects or its JSON text: they become part of the system message, where
    Phi-4-mini's template looks for them, and what a tool answers is a turn of the role tool. Empty lines are skipped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is neither, or lines are broken (no JSON, another shape, an unknown role, an empty text, no assistant);
            file and line of each are named.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} must be a JSON Lines or Parquet file of conversations, and is no file")
    conversations, faults = [], []
    for number, row in _parquet_rows(path) if Path(path).suffix == ".parquet" else _lines(path):
        try:
            messages = _messages(json.loads(row) if isinstance(row, str) else row)
            conversations.append(Conversation(messages, f"{path}:{number}"))
        except json.JSONDecodeError as error:
            faults.append(f"{path}:{number}: no JSON: {error.msg} at character {error.pos + 1}")
        except ValueError as error:
            faults.append(f"{path}:{number}: {error}")
    raise_all(faults)
    if not conversations:
        raise ValueError(f"{path} holds no conversation")
    return conversations


def _lines(path: Path | str) -> Iterator[tuple[int, str]]:
    """The lines of a text file that are not empty, numbered from 1."""
    with open(path, encoding="utf-8") as lines:
        try:
            yield from ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} must be UTF-8 text: {error}") from None


def _parquet_rows(path: Path | str) -> Iterator[tuple[int, dict]]:
    """The rows of a Parquet file, numbered from 1, a batch in memory at a time."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f"{path} is read with the package pyarrow: pip install 'minilora[parquet]'") from None
    try:
        batches = ParquetFile(path).iter_batches()
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except (ArrowException, ValueError, OSError) as error:
        raise ValueError(f"{path} must be a Parquet file: {error}") from None


def _messages(record: object) -> list[Message]:
    """The messages of one line, checked."""
    if not isinstance(record, dict):
        raise ValueError(f"a line must hold a JSON object, not a {type(record).__name__}")
    messages, faults = _turns(record), []
    for number, message in enumerate(messages, start=1):
        role, text = message["role"], message["content"]
        if role not in ROLES:
            faults.append(f"turn {number} has the unknown role {role!r}; known are {', '.join(ROLES)}")
        elif not text.strip() and "tools" not in message:
            faults.append(f"turn {number} ({role}) is empty")
        elif not all(_is_unicode(text) for text in message.values()):
            faults.append(f"turn {number} ({role}) holds half a surrogate pair (\\ud800 to \\udfff), which is no character")
    if not any(message["role"] == "assistant" for message in messages):
        faults.append("no turn is the assistant's: there is nothing to learn")
    if faults:
        raise ValueError("; ".join(faults))
    return messages


def _turns(record: dict) -> list[Message]:
    """The messages of a line of any of the shapes, its tools in the system message."""
    if "messages" in record:
        messages = [_message(turn, "role", "content") for turn in _list(record, "messages")]
    elif "conversations" in record:
        messages = [_message(turn, "from", "value") for turn in _list(record, "conversations")]
    elif "instruction" in record:
        question = _field(record, "instruction")
        if record.get("input"):
            question += "\n\n" + _field(record, "input")
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": _field(record, "output")}]
    else:
        raise ValueError(
            f'must have "messages", "conversations" or "instruction", and has {", ".join(map(repr, record)) or "no key"}'
        )
    if not record.get("tools"):
        return messages
    opening = [] if messages and messages[0]["role"] == "system" else [{"role": "system", "content": ""}]
    system, *others = opening + messages
    if "tools" in system:
        raise ValueError('"tools" must stand beside the messages or in the system message, not in both')
    return [system | {"tools": _tools(record)}, *others]


def _message(turn: dict, role: str, content: str) -> Message:
    if turn.get("tool_calls"):
        raise ValueError('"tool_calls" is written by no template of the family: write the call into the content of its turn')
    message = {"role": SHAREGPT_ROLES.get(_field(turn, role), turn[role]), "content": _field(turn, content)}
    return message | ({"tools": _tools(turn)} if turn.get("tools") else {})


def _tools(holder: dict) -> str:
    """Tools as JSON text; a text is taken as it is written."""
    tools = holder["tools"]
    if isinstance(tools, str):
        return tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError('"tools" must be a list of objects, or its JSON text')
    return json.dumps(tools, ensure_ascii=False)


def _list(record: dict, key: str) -> list:
    if not isinstance(record[key], list) or not all(isinstance(turn, dict) for turn in record[key]):
        raise ValueError(f'"{key}" must be a list of objects')
    return record[key]


def _field(record: dict, key: str) -> str:
    if not isinstance(record.get(key), str):
        raise ValueError(f'"{key}" must be a text, not {record.get(key)!r}')
    return record[key]


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def raise_all(faults: list[str]) -> None:
    """A ValueError of all faults, the first of them spelled out, if there are any."""
    if faults:
        more = [f"… and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
        raise ValueError("\n".join(faults[:SHOWN] + more))
