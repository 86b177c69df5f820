"""What every result carries, and where it is kept: benchmarks/results/NAME.json, written by `python -m benchmarks NAME`."""

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def machine() -> dict:
    """The device and versions that a figure was found with."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return {
        "date": date.today().isoformat(),
        "cpu": f"{cpu}, {os.cpu_count()} cores",
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
    } | {name: version(name) for name in ("torch", "triton", "tokenizers", "safetensors")}


def write(name: str, rows: list[dict]) -> None:
    """Keeps rows, with the machine that they were found on, as a result to be committed."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")
    print(f"wrote {path}")


def read(name: str) -> list[dict]:
    """The rows of a committed result."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]


def memory(field: str) -> int:
    """Bytes of this process, pages of mapped files included: "VmRSS" now, "VmHWM" the most at once so far."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def run_tests(*files: str) -> str:
    """Runs the tests in files, by their paths from the root; their results as JUnit XML."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        subprocess.run([sys.executable, "-m", "pytest", *files, f"--junitxml={report}"], cwd=ROOT)
        return report.read_text(encoding="utf-8")


def cases(report: str) -> Iterator[dict]:
    """Every test in JUnit XML: the stem of its file, its name, what stands in brackets behind it, its outcome and its seconds."""
    for case in ElementTree.fromstring(report).iter("testcase"):
        test, _, parameters = case.get("name").partition("[")
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        yield {
            "file": case.get("classname", "").rpartition(".")[2],
            "test": test,
            "parameters": parameters.removesuffix("]"),
            "outcome": "failed" if outcome in ("failure", "error") else outcome,
            "seconds": float(case.get("time")),
        }


def cell(counts: Mapping[str, int]) -> str:
    """Of a table of test results: the number of tests where all pass, else what is amiss."""
    if counts.keys() == {"passed"}:
        return f"✓ {counts['passed']}"
    amiss = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("failed", "skipped", "passed") if outcome in counts)
    return f"✗ {amiss or 'no test'}"


def markdown(header: list[str], rows: list[list]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]]) + "\n"


def write_table(name: str, table: str) -> None:
    """Keeps a table in Markdown beside the result of the same name, and prints it."""
    path = RESULTS / f"{name}.md"
    path.write_text(table, encoding="utf-8")
    print(f"{table}\nwrote {path}")
