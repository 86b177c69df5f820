"""Which tests hold for which variant of the family: a table of test results, variant × what is tested.

A test counts for the variant in the brackets of its name and for every column whose word is in its name.
"""

import re
from collections import Counter

from benchmarks import protocol

TESTS = ("tests/test_phi3_family.py", "tests/test_phi3_tokenizer.py")
VARIANTS = (
    "phi-3-mini-4k", "phi-3-mini-128k", "phi-3.5-mini", "phi-3-medium-4k", "phi-3-medium-128k", "phi-4", "phi-4-reasoning",
    "phi-4-mini",
)  # fmt: skip
COLUMNS = {word: word for word in ("config", "logits", "gradients", "cache", "template", "save")} | {"config": "config read"}


def main() -> None:
    """Runs the tests of the family, keeps the counts as JSON and the table as Markdown, and prints the table."""
    rows = read_report(protocol.run_tests(*TESTS))
    protocol.write("family", rows)
    protocol.write_table("family", table(rows))


def read_report(report: str) -> list[dict]:
    """For every variant, the number of tests in each column that passed, failed and were skipped, and their seconds.

    Args:
        report: pytest's results as JUnit XML.
    """
    counts = {variant: {column: Counter() for column in COLUMNS.values()} for variant in VARIANTS}
    seconds = Counter()
    for case in protocol.cases(report):
        # The longest that fits: "phi-4" is in "phi-4-mini" too.
        variant = max((v for v in VARIANTS if re.search(rf"\b{re.escape(v)}\b", case["parameters"])), key=len, default=None)
        if variant is None:
            continue
        seconds[variant] += case["seconds"]
        for word, column in COLUMNS.items():
            if word in case["test"]:
                counts[variant][column][case["outcome"]] += 1
    return [{"variant": v, **{c: dict(counts[v][c]) for c in counts[v]}, "seconds": round(seconds[v], 1)} for v in VARIANTS]


def table(rows: list[dict]) -> str:
    """The rows in Markdown: the number of tests where all pass, what is amiss elsewhere."""
    columns = list(COLUMNS.values())
    return protocol.markdown(
        ["variant", *columns], [[row["variant"], *(protocol.cell(row[column]) for column in columns)] for row in rows]
    )
