"""The dtype in which a CPU takes products of 16-bit numbers: their own where it can multiply them, else float32.

Where it cannot, torch's product with a bfloat16 weight reaches 25 GFLOP/s on one core, and the one for the gradient of x 0.8,
where float32 has 90. oneDNN, which torch leaves these products to, uses no more than ONEDNN_MAX_CPU_ISA in the environment
allows.
"""

import torch
from torch import Tensor

NAMES = {  # of what a CPU has that multiplies a dtype: on x86, and the last one on ARM
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}
FEW = 4  # rows: fewer are found as dot products, in float32 without a copy, one row in 0.4 × the time of blocks made float32


def _listed(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    onednn, capabilities = torch.ops.mkldnn, torch.cpu.get_capabilities()
    allowed = onednn._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else onednn._is_mkldnn_fp16_supported()
    return allowed and any(capabilities.get(name) for name in NAMES[dtype])


LACKING = {dtype for dtype in NAMES if not _listed(dtype)}  # asked once, and not within what torch.compile traces


def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies numbers of dtype, and torch lets it."""
    return dtype not in LACKING


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What numbers of dtype on device are multiplied in."""
    return torch.float32 if device.type == "cpu" and not multiplies(dtype) else dtype


def linear_dtype(x: Tensor) -> torch.dtype:
    """What x (..., K) is multiplied with a weight in."""
    return x.dtype if x.numel() < FEW * x.shape[-1] else product_dtype(x.dtype, x.device)


def describe(dtype: torch.dtype, device: torch.device) -> str:
    """For people: the dtype of products on device, and the reason where it is not the numbers' own."""
    name, computed = (str(of).removeprefix("torch.") for of in (dtype, product_dtype(dtype, device)))
    return f"products in {computed}" + (f": this CPU has no {name} arithmetic" if name != computed else "")
