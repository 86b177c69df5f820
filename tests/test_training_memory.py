import os
import subprocess
import sys

import pytest
import torch

from minilora.training.memory import peak_memory


def test_what_is_allocated_and_given_back_stays_in_the_peak():
    """In a process of its own: in this one an earlier test may have held more."""
    code = """
import torch
from minilora.training.memory import peak_memory
before = peak_memory(torch.device("cpu"))
size = 300_000_000 + before
torch.ones(size, dtype=torch.uint8)
after = peak_memory(torch.device("cpu"))
print(size <= after <= size + before + 50_000_000)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "True\n"


def test_memory_is_counted_in_bytes():
    assert 10**7 < peak_memory(torch.device("cpu")) < 10**12


def test_nothing_is_told_where_the_system_does_not_count(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory(torch.device("cpu")) is None


HOLD = """
import os, sys
from pathlib import Path
from minilora.training.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
held = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
before = held()
for _ in range(2):
    blocks = [bytearray(2**20) for _ in range(200)]
    del blocks
print(held() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
def test_what_is_freed_is_kept_unless_the_environment_decides():
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}

    def held(argument, **variables):
        command = [sys.executable, "-c", HOLD, argument]
        return int(subprocess.run(command, env=environment | variables, check=True, capture_output=True, text=True).stdout)

    assert held("keep") > 190 * 2**20
    assert held("leave") < 50 * 2**20
    assert held("keep", MALLOC_MMAP_THRESHOLD_="65536") < 50 * 2**20
