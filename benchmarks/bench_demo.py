"""The demo as a newcomer runs it: a fresh process, its wall time, its peak memory, and what it learnt."""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import protocol


def main() -> None:
    """One run with the weights in the cache; one more before it fetches them where they are not."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "minilora", "demo", "--output"]
        subprocess.run([*command, f"{folder}/warm", "--max-steps", "1"], check=True)
        started = time.perf_counter()
        subprocess.run([*command, f"{folder}/demo"], check=True)
        seconds = time.perf_counter() - started
        summary = json.loads(Path(folder, "demo", "summary.json").read_text())
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # the largest child; both runs hold the same model
    protocol.write("demo", [summary | {"seconds_process": round(seconds, 1), "peak_memory_bytes": peak}])
