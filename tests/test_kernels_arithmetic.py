"""What products of 16-bit numbers are taken in: by what the CPU has, and what the environment lets torch use of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minilora.kernels import arithmetic

CPU, GPU = torch.device("cpu"), torch.device("cuda")
HALVES = [torch.bfloat16, torch.float16]


def in_fresh_python(code: str, **environment: str) -> str:
    settings = {"env": os.environ | environment, "cwd": Path(__file__).parents[1], "timeout": 120}
    return subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True, **settings).stdout


@pytest.mark.parametrize("dtype", HALVES)
def test_products_are_the_cpus_own_where_it_can_multiply_the_dtype_and_else_in_float32(monkeypatch, dtype):
    for can, expected in ((True, dtype), (False, torch.float32)):
        monkeypatch.setattr(arithmetic, "multiplies", lambda dtype, can=can: can)
        assert arithmetic.product_dtype(dtype, CPU) == expected
        assert arithmetic.product_dtype(dtype, GPU) == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_numbers_are_multiplied_as_they_are(dtype):
    assert arithmetic.product_dtype(dtype, CPU) == dtype


def test_few_rows_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(arithmetic, "multiplies", lambda dtype: False)
    dtypes = [arithmetic.linear_dtype(torch.ones(*shape, 8).bfloat16()) for shape in [(0,), (1, 1), (3,), (4,), (2, 2)]]
    assert dtypes == [torch.bfloat16] * 3 + [torch.float32] * 2


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here, which the environment restrains")
def test_an_environment_that_keeps_onednn_to_avx2_leaves_no_16_bit_arithmetic():
    code = (
        "import torch\nfrom minilora.kernels import arithmetic\n"
        "for dtype in (torch.bfloat16, torch.float16): print(arithmetic.describe(dtype, torch.device('cpu')))"
    )
    assert in_fresh_python(code, ONEDNN_MAX_CPU_ISA="AVX2").splitlines() == [
        "products in float32: this CPU has no bfloat16 arithmetic",
        "products in float32: this CPU has no float16 arithmetic",
    ]


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the system does not list what its CPU has")
@pytest.mark.skipif("ONEDNN_MAX_CPU_ISA" in os.environ, reason="the environment may forbid what the CPU has")
def test_bfloat16_is_multiplied_where_the_system_lists_it():
    flags = set(
        next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Feat"))).split()
    )
    assert arithmetic.multiplies(torch.bfloat16) == bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def test_it_is_told_in_words(monkeypatch):
    assert arithmetic.describe(torch.float32, CPU) == "products in float32"
    monkeypatch.setattr(arithmetic, "multiplies", lambda dtype: True)
    assert arithmetic.describe(torch.bfloat16, CPU) == "products in bfloat16"
    monkeypatch.setattr(arithmetic, "multiplies", lambda dtype: False)
    assert arithmetic.describe(torch.float16, CPU) == "products in float32: this CPU has no float16 arithmetic"
