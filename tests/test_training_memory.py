import subprocess
import sys

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
