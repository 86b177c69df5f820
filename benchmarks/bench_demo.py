"""The demo as a newcomer runs it: a fresh process, its wall time, its peak memory, and what it learnt."""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import protocol
from minilora.demo import weights as demo_weights


def main() -> None:
    """One run, whose words are demo.txt; the weights are fetched and converted before, so that no network is in the figures."""
    demo_weights.obtain()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        command = [sys.executable, "-m", "minilora", "demo"]
        told = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout
        seconds = time.perf_counter() - started
        summary = json.loads(Path(folder, "runs", "demo", "summary.json").read_text())
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    (protocol.RESULTS / "demo.txt").write_text(told, encoding="utf-8")
    protocol.write("demo", [summary | {"seconds_process": round(seconds, 1), "peak_memory_bytes": peak}])
