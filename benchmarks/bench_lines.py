"""How long the LoRA library is beside loralib and PEFT's LoRA: physical lines of Python, counted where they are installed."""

import importlib.util
from importlib.metadata import version
from pathlib import Path

from benchmarks import protocol

THEIRS = {"loralib": (".", {"test"}), "peft": ("tuners/lora", set())}  # folder in the package; stems left out


def main() -> None:
    """Counts, keeps the counts as JSON and the table as Markdown, and prints the table."""
    rows = count()
    protocol.write("lines", rows)
    protocol.write_table("lines", table(rows))


def count() -> list[dict]:
    """For each library its files and their lines."""
    ours = {file.stem: _lines(file) for file in sorted(protocol.ROOT.glob("minilora/adapters/*.py"))}
    rows = [{"library": "minilora", "version": version("minilora"), "lines": sum(ours.values()), "files": ours}]
    for name, (folder, left_out) in THEIRS.items():
        package = Path(importlib.util.find_spec(name).origin).parent / folder
        files = {str(file.relative_to(package)): _lines(file) for file in package.rglob("*.py") if file.stem not in left_out}
        rows.append({"library": name, "version": version(name), "lines": sum(files.values()), "files": files})
    return rows


def _lines(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


def table(rows: list[dict]) -> str:
    """The totals in Markdown."""
    return protocol.markdown(
        ["library", "files", "lines"], [[f"{r['library']} {r['version']}", len(r["files"]), f"{r['lines']:,}"] for r in rows]
    )
