"""What is held to loralib, PEFT and transformers: a table of test results, room × library.

A test counts for the room that its file tests and for every library whose name is in its own: "computes_as_loralib_does".
"""

import re
from collections import Counter

from benchmarks import protocol

LIBRARIES = ("loralib", "peft", "transformers")


def main() -> None:
    """Runs the tests of the LoRA library and of training, keeps the counts as JSON and as Markdown, and prints them."""
    files = [file for stem in ("adapters_*", "loralib", "training_*") for file in protocol.ROOT.glob(f"tests/test_{stem}.py")]
    rows = read_report(protocol.run_tests(*(str(file.relative_to(protocol.ROOT)) for file in sorted(files))))
    protocol.write("parity", rows)
    protocol.write_table("parity", table(rows))


def read_report(report: str) -> list[dict]:
    """For every room with such tests, the number against each library that passed, failed and were skipped.

    Args:
        report: pytest's results as JUnit XML.
    """
    counts = {}
    for case in protocol.cases(report):
        room = case["file"].removeprefix("test_").replace("_", "/", 1)
        # A whole file may be about one library, test_loralib.py; otherwise a test says in its own name whom it compares with.
        for library in (name for name in LIBRARIES if room == name or re.search(rf"_{name}s?(_|$)", case["test"])):
            counts.setdefault(room, {name: Counter() for name in LIBRARIES})[library][case["outcome"]] += 1
    return [{"room": room, **{name: dict(counter) for name, counter in libraries.items()}} for room, libraries in counts.items()]


def table(rows: list[dict]) -> str:
    """The rows in Markdown; empty where a room has nothing that the library has."""
    lines = [[row["room"], *(protocol.cell(row[name]) if row[name] else "" for name in LIBRARIES)] for row in rows]
    return protocol.markdown(["room", *LIBRARIES], lines)
