"""A 4-bit weight under the names and in the shapes in which bitsandbytes saves one, and transformers with it.

    NAME                                       (⌈N·K/2⌉, 1) uint8, the codes
    NAME.absmax                                (⌈N·K/64⌉,) uint8
    NAME.nested_absmax                         (⌈N·K/64/256⌉,) float32
    NAME.quant_map, NAME.nested_quant_map      the tables, (16,) and (256,) float32
    NAME.quant_state.bitsandbytes__nf4         uint8, the bytes of a JSON object: shape, dtype, offset, sizes of the blocks

Source: bitsandbytes 0.50.2, functional.QuantState.as_dict(packed=True).
"""

import json
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from minilora.kernels.nf4 import BLOCK, DYNAMIC, GROUP, LEVELS
from minilora.kernels.nf4_tensor import NF4Tensor

STATE = "quant_state.bitsandbytes__nf4"
SUFFIXES = ("absmax", "nested_absmax", "quant_map", "nested_quant_map", STATE)  # of NAME.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LONGEST = 4096  # bytes of JSON; bitsandbytes writes about 200
FIXED = {"quant_type": "nf4", "blocksize": BLOCK, "nested_blocksize": GROUP, "nested_dtype": "float32"}


def to_bitsandbytes(weight: NF4Tensor, name: str) -> dict[str, Tensor]:
    """The tensors that bitsandbytes saves for a weight called name.

    Raises:
        ValueError: the weight's dtype is none of bitsandbytes', float32, bfloat16 or float16.
    """
    dtype = str(weight.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ValueError(f"{name}: bitsandbytes knows no 4-bit {dtype}, only {', '.join(DTYPES)}: cast with .to(dtype)")
    state = {
        "quant_type": "nf4", "blocksize": BLOCK, "dtype": dtype, "shape": list(weight.shape),
        "nested_blocksize": GROUP, "nested_dtype": "float32", "nested_offset": weight.offset.item(),
    }  # fmt: skip
    return {
        name: weight.codes[:, None],
        f"{name}.absmax": weight.absmax_codes,
        f"{name}.quant_map": LEVELS.to(weight.device, copy=True),  # copies: safetensors refuses tensors that share memory
        f"{name}.nested_absmax": weight.nested_absmax,
        f"{name}.nested_quant_map": DYNAMIC.to(weight.device, copy=True),
        f"{name}.{STATE}": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def from_bitsandbytes(tensors: Mapping[str, Tensor], name: str) -> NF4Tensor:
    """The weight called name among tensors that bitsandbytes saved; its codes and scales are those tensors, not copies.

    Raises:
        ValueError: a tensor is missing, or is not what a weight in NF4 with blocks of 64 and double quantisation has; all
            faults at once.
    """
    names = [name, *(f"{name}.{suffix}" for suffix in SUFFIXES)]
    faults = [f"{missing} is missing" for missing in names if missing not in tensors]
    if not faults:
        codes, absmax, nested, levels, dynamic, packed = (tensors[each] for each in names)
        state, faults = _state(packed)
        faults += _faults_of_tables(levels, dynamic)
        if state:
            faults += _faults_of_sizes(codes, absmax, nested, math.prod(state["shape"]))
    if faults:
        raise ValueError(f"{name} is no 4-bit weight that can be read here: {'; '.join(faults)}")
    offset = torch.tensor(state["nested_offset"], dtype=torch.float32, device=codes.device)
    return NF4Tensor(codes.flatten(), absmax, nested, offset, state["shape"], DTYPES[state["dtype"]])


def _state(packed: Tensor) -> tuple[dict | None, list[str]]:
    """The JSON object, None where its shape and dtype are of no use, and all that is wrong with it."""
    if packed.dtype != torch.uint8 or packed.dim() != 1 or len(packed) > LONGEST:
        return None, [f"{STATE} must be at most {LONGEST} bytes, not {packed.dtype} {tuple(packed.shape)}"]
    try:
        state = json.loads(bytes(packed.tolist()))
    except (ValueError, RecursionError) as error:
        return None, [f"{STATE} is no JSON: {error}"]
    if not isinstance(state, dict):
        return None, [f"{STATE} must hold a JSON object, not {state!r:.80}"]
    faults = [f"{key} must be {value!r}, not {state.get(key)!r:.80}" for key, value in FIXED.items() if state.get(key) != value]
    shape, dtype, offset = (state.get(key) for key in ("shape", "dtype", "nested_offset"))
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and 0 < size < 2**31 for size in shape)):
        faults.append(f"shape must be two positive sizes, not {shape!r:.80}")
    if not (isinstance(dtype, str) and dtype in DTYPES):
        faults.append(f"dtype must be {', '.join(DTYPES)}, not {dtype!r:.80}")
    if type(offset) not in (int, float) or not abs(offset) <= torch.finfo(torch.float32).max:
        faults.append(f"nested_offset must be a finite float32, not {offset!r:.80}")
    return None if faults else state, faults


def _faults_of_tables(levels: Tensor, dynamic: Tensor) -> list[str]:
    tables = {"quant_map": (levels, LEVELS), "nested_quant_map": (dynamic, DYNAMIC)}
    return [
        f"{suffix} must be the table of {kind}, and is another one"
        for (suffix, (found, table)), kind in zip(tables.items(), ("NF4", "8-bit dynamic numbers"), strict=True)
        if found.dtype != table.dtype or not torch.equal(found.cpu(), table)
    ]


def _faults_of_sizes(codes: Tensor, absmax: Tensor, nested: Tensor, n: int) -> list[str]:
    """What is wrong with the tensors of a weight of n numbers."""
    blocks = -(-n // BLOCK)
    expected = {
        "the codes": (codes, torch.uint8, (-(-n // 2), 1)),
        "absmax": (absmax, torch.uint8, (blocks,)),
        "nested_absmax": (nested, torch.float32, (-(-blocks // GROUP),)),
    }
    faults = [
        f"{what} must be {dtype} {shape} for {n} numbers, not {found.dtype} {tuple(found.shape)}"
        for what, (found, dtype, shape) in expected.items()
        if found.dtype != dtype or tuple(found.shape) != shape
    ]
    return faults if nested.isfinite().all() else [*faults, "nested_absmax must be finite"]
