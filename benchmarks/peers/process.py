"""The worker process of one library, as whoever measures it sees it."""

import contextlib
import json
import os
import subprocess
import time
from pathlib import Path

from benchmarks.peers.environments import last_line


class Process:
    """Runs worker.py for a library's module with the Python of its environment.

    Args:
        log: file that takes what the library prints.

    Raises:
        RuntimeError: from every method: the worker ended or a request failed; the message is its error's.
    """

    def __init__(self, module: str, python: Path | str, threads: int, log: Path):
        self.log = log
        variables = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self.started = time.perf_counter()
        with open(log, "w") as errors:
            self.process = subprocess.Popen(
                [python, Path(__file__).with_name("worker.py"), module],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | variables,
            )  # fmt: skip
        self.seconds_import = {"cpu": self._answer()["cpu"], "wall": time.perf_counter() - self.started}

    def ask(self, do: str, **arguments) -> dict:
        """What the worker's method answers."""
        try:
            self.process.stdin.write(json.dumps({"do": do} | arguments) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: the log says why
        return self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        found = json.loads(line) if line else {"error": last_line(self.log.read_text(errors="replace"))}
        if "error" in found:
            raise RuntimeError(found["error"])
        return found

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended, and not taken its last request
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()
