"""Which implementation of an operation runs: Triton where it can, plain PyTorch elsewhere, and never in silence.

`MINILORA_BACKEND=torch` or `=triton` in the environment forces one; a Triton that cannot run is then an error.
"""

import importlib.util
import os

import torch

VARIABLE = "MINILORA_BACKEND"
TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None  # asked once: each search takes 85 µs
LEAST_ARCH = 80  # sm_80: the first with bfloat16 tensor cores and asynchronous copies, which the kernels are laid out for


def choose(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The backend's name, "triton" or "torch", for tensors of dtype on device, and the reason in a few words.

    torch.compile asks once, when it traces, and keeps the answer.

    Raises:
        ValueError: the environment forces Triton where it cannot run, or names no backend.
    """
    forced = os.environ.get(VARIABLE, "")
    if forced not in ("", "torch", "triton"):
        raise ValueError(f"{VARIABLE} must be torch or triton, or unset, not {forced!r}")
    if forced == "torch":
        return "torch", f"{VARIABLE}=torch"
    obstacle = _obstacle(device, dtype)
    if obstacle and forced:
        raise ValueError(f"{VARIABLE}=triton cannot be followed: {obstacle}. Unset it, or move the tensors")
    return ("torch", obstacle) if obstacle else ("triton", f"{VARIABLE}=triton" if forced else f"{device.type} tensors")


choose._dynamo_marked_constant = True  # as torch.compiler.assume_constant_result does, which takes 1.2 s to import torch._dynamo


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """One line for people: the backend that runs for such tensors, and why."""
    name, reason = choose(device, dtype)
    return f"{'Triton' if name == 'triton' else 'plain PyTorch'} ({reason})"


def _obstacle(device: torch.device, dtype: torch.dtype) -> str:
    """What keeps Triton from running, empty where nothing does."""
    if not TRITON_IS_INSTALLED:
        return "Triton is not installed"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels multiply float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return _obstacle_of(device)


def _obstacle_of(device: torch.device) -> str:
    if device.type != "cuda" or torch.version.hip:
        return f"the tensors are on {device.type}, not on an NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor < LEAST_ARCH:
        return f"{torch.cuda.get_device_name(device)} is sm_{major}{minor}, and the kernels need sm_{LEAST_ARCH} or later"
    return ""
