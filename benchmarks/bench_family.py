"""Which tests hold for which variant of the family: a table of test results, variant × what is tested.

A test counts for the variant in the brackets of its name and for every column whose word is in its name.
"""

import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from benchmarks import protocol

ROOT = Path(__file__).parents[1]
TESTS = ("tests/test_phi3_family.py", "tests/test_phi3_tokenizer.py")
VARIANTS = (
    "phi-3-mini-4k", "phi-3-mini-128k", "phi-3.5-mini", "phi-3-medium-4k", "phi-3-medium-128k", "phi-4", "phi-4-reasoning",
    "phi-4-mini",
)  # fmt: skip
COLUMNS = {word: word for word in ("config", "logits", "gradients", "cache", "template", "save")} | {"config": "config read"}


def main() -> None:
    """Runs the tests of the family, keeps the counts as JSON and the table as Markdown, and prints the table."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        subprocess.run([sys.executable, "-m", "pytest", *TESTS, f"--junitxml={report}"], cwd=ROOT)
        rows = read_report(report.read_text(encoding="utf-8"))
    protocol.write("family", rows)
    path = protocol.RESULTS / "family.md"
    path.write_text(table(rows), encoding="utf-8")
    print(f"{table(rows)}\nwrote {path}")


def read_report(report: str) -> list[dict]:
    """For every variant, the number of tests in each column that passed, failed and were skipped, and their seconds.

    Args:
        report: pytest's results as JUnit XML.
    """
    counts = {variant: {column: Counter() for column in COLUMNS.values()} for variant in VARIANTS}
    seconds = Counter()
    for case in ElementTree.fromstring(report).iter("testcase"):
        test, _, parameters = case.get("name").partition("[")
        # The longest that fits: "phi-4" is in "phi-4-mini" too.
        variant = max((v for v in VARIANTS if re.search(rf"\b{re.escape(v)}\b", parameters)), key=len, default=None)
        if variant is None:
            continue
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        seconds[variant] += float(case.get("time"))
        for word, column in COLUMNS.items():
            if word in test:
                counts[variant][column]["failed" if outcome in ("failure", "error") else outcome] += 1
    return [{"variant": v, **{c: dict(counts[v][c]) for c in counts[v]}, "seconds": round(seconds[v], 1)} for v in VARIANTS]


def table(rows: list[dict]) -> str:
    """The rows in Markdown: the number of tests where all pass, what is amiss elsewhere."""
    columns = list(COLUMNS.values())
    lines = [f"| variant | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    lines += [f"| {row['variant']} | {' | '.join(_cell(row[column]) for column in columns)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(counts: dict[str, int]) -> str:
    if counts.keys() == {"passed"}:
        return f"✓ {counts['passed']}"
    amiss = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("failed", "skipped", "passed") if outcome in counts)
    return f"✗ {amiss or 'no test'}"
