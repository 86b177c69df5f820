"""The backend: Triton where it can run, PyTorch elsewhere, said and not silent."""

import subprocess
import sys

import pytest
import torch
from without_gpu import interpreting

from minilora.kernels import backend
from minilora.kernels.lora_linear import lora_linear

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def unforced(monkeypatch):
    monkeypatch.delenv(backend.VARIABLE, raising=False)


@pytest.fixture
def gpu(monkeypatch):
    """A machine whose GPU has a given compute capability, as far as the choice can see."""

    def have(major: int, minor: int) -> torch.device:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
        return torch.device("cuda")

    return have


def test_on_a_cpu_pytorch_runs_and_the_reason_is_told():
    assert backend.choose(CPU, torch.float32) == ("torch", "the tensors are on cpu, not on an NVIDIA GPU")
    assert backend.describe(CPU, torch.float32).startswith("plain PyTorch (the tensors are on cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_on_a_gpu_that_the_kernels_are_made_for_triton_runs(gpu, capability, dtype):
    device = gpu(*capability)
    assert backend.choose(device, dtype) == ("triton", "cuda tensors")
    assert backend.describe(device, dtype) == "Triton (cuda tensors)"


def test_an_older_gpu_and_another_dtype_are_named_as_reasons(gpu):
    assert backend.choose(gpu(7, 5), torch.float16) == ("torch", "Some GPU is sm_75, and the kernels need sm_80 or later")
    name, reason = backend.choose(gpu(9, 0), torch.float64)
    assert name == "torch"
    assert "not float64" in reason


def test_the_environment_forces_pytorch_anywhere(gpu, monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "torch")
    assert backend.choose(gpu(9, 0), torch.bfloat16) == ("torch", "MINILORA_BACKEND=torch")
    with interpreting() as launches:
        lora_linear(torch.ones(2, 3), torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1), 1.0)
    assert launches == []


def test_a_forced_triton_runs_where_it_can_and_is_an_error_where_it_cannot(gpu, monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "triton")
    assert backend.choose(gpu(8, 0), torch.bfloat16) == ("triton", "MINILORA_BACKEND=triton")
    with pytest.raises(ValueError, match="MINILORA_BACKEND=triton cannot be followed: the tensors are on cpu"):
        lora_linear(torch.ones(2, 3), torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1), 1.0)
    with interpreting() as launches:
        lora_linear(torch.ones(2, 3), torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1), 1.0)
    assert [launch.kernel for launch in launches] == ["down_kernel", "gemm_kernel"]


def test_an_unknown_backend_is_an_error(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "cuda")
    with pytest.raises(ValueError, match="MINILORA_BACKEND must be torch or triton, or unset, not 'cuda'"):
        backend.choose(CPU, torch.float32)


def test_without_triton_all_of_it_imports_and_pytorch_runs():
    program = """
import importlib.util, sys
sys.modules["triton"] = None
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
import torch
from minilora.kernels import backend, lora_linear
y = lora_linear.lora_linear(torch.ones(2, 3), torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1), 1.0)
assert y.tolist() == [[6.0] * 4] * 2, y
print(backend.describe(torch.device("cpu"), torch.float32))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "plain PyTorch (Triton is not installed)", done.stderr
