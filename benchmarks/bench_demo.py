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
    """One run; the weights are fetched and converted before it, so that the network is not in the figures."""
    demo_weights.obtain()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "minilora", "demo", "--output", folder], check=True)
        seconds = time.perf_counter() - started
        summary = json.loads(Path(folder, "summary.json").read_text())
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    protocol.write("demo", [summary | {"seconds_process": round(seconds, 1), "peak_memory_bytes": peak}])
