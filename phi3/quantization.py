"""4-bit weights in a checkpoint, as bitsandbytes and transformers write and read them. A weight (N, K) lies there as

    NAME                                codes, (⌈N·K/2⌉, 1) uint8          NAME.quant_map           what a code stands for
    NAME.absmax                         scales, (⌈N·K/64⌉,) uint8          NAME.nested_quant_map    what a scale's code stands for
    NAME.nested_absmax                  scales of the scales, float32
    NAME.quant_state.bitsandbytes__nf4  JSON in uint8: shape, dtype, sizes of the blocks, and the mean of the scales

and config.json says so in quantization_config. Source: bitsandbytes 0.50.2, QuantState; transformers 5.23, BitsAndBytesConfig.
"""

import json
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from minilora.kernels.nf4 import BLOCK, DYNAMIC, GROUP, LEVELS
from minilora.kernels.nf4_tensor import NF4Tensor

STATE = ".quant_state.bitsandbytes__nf4"
PARTS = ("", ".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map", STATE)  # of a weight's name
BLOCKS = {"quant_type": "nf4", "blocksize": BLOCK, "nested_blocksize": GROUP, "nested_dtype": "float32"}
# What quantization_config must say. Left out, the last one means what it must be; the others mean something else.
CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
STORAGE = {"bnb_4bit_quant_storage": "uint8"}


def quantized_weights(model: nn.Module) -> dict[str, NF4Tensor]:
    """The weights of a model that are 4-bit, by their names."""
    return {name: weight for name, weight in model.named_parameters() if isinstance(weight, NF4Tensor)}


@torch.no_grad()
def dequantize(model: nn.Module) -> None:
    """Makes the weights that are 4-bit plain ones, of the dtype that they stand for, one after another."""
    for name, weight in quantized_weights(model).items():
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(weight.dequantize(), requires_grad=False))


def faults_of_config(raw: object) -> list[str]:
    """What config.json's quantization_config asks for and cannot be had; None asks for nothing."""
    if raw is None:
        return []
    if not isinstance(raw, dict):
        return [f"quantization_config must be an object or null, not {raw!r}"]
    return [
        f"quantization_config.{name} must be {json.dumps(value)}, not {json.dumps(raw.get(name))} (bitsandbytes' NF4 with double "
        "quantisation is read, and nothing else)"
        for name, value in (CONFIG | STORAGE).items()
        if raw.get(name, STORAGE.get(name)) != value
    ]


def make_config(compute_dtype: torch.dtype, plain: Iterable[str]) -> dict:
    """quantization_config for a model that multiplies in a dtype; plain are the paths of linear layers that are not 4-bit."""
    dtype = str(compute_dtype).removeprefix("torch.")
    return CONFIG | STORAGE | {"bnb_4bit_compute_dtype": dtype, "llm_int8_skip_modules": list(plain)}


def to_stored(name: str, weight: NF4Tensor) -> dict[str, Tensor]:
    """The tensors that a file holds for a weight, by their names."""
    state = {
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
        "nested_offset": weight.offset.item(),
    }
    maps = [table.clone() for table in (LEVELS, DYNAMIC)]  # safetensors refuses tensors that share memory
    text = torch.tensor(list(json.dumps(BLOCKS | state).encode()), dtype=torch.uint8)
    tensors = [weight.codes[:, None], weight.absmax_codes, weight.nested_absmax, *maps, text]
    return {name + part: tensor for part, tensor in zip(PARTS, tensors, strict=True)}


def from_stored(name: str, shape: Iterable[int], read: Callable[[str], Tensor]) -> NF4Tensor:
    """The weight of a shape that a file's tensors stand for, bit for bit; to_stored's inverse.

    Args:
        read: gives the tensor of a name, and raises KeyError where there is none.

    Raises:
        ValueError: a tensor is missing or does not fit; all that is wrong with this weight at once.
    """
    try:
        codes, absmax, nested, levels, dynamic, text = (read(name + part) for part in PARTS)
        state = dict(json.loads(bytes(text.tolist())))
    except KeyError as error:
        raise ValueError(f"{error.args[0]} is missing (4-bit weights must have scales that are quantised too)") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}{STATE} must hold a JSON object: {error}") from None
    values, dtype = math.prod(shape), getattr(torch, str(state.get("dtype")), None)
    blocks = math.ceil(values / BLOCK)
    wanted = BLOCKS | {"shape": list(shape)}
    faults = [f"{key} {state.get(key)!r}, not {value!r}" for key, value in wanted.items() if state.get(key) != value]
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        faults.append(f"dtype {state.get('dtype')!r}, which is no floating one")
    offset = state.get("nested_offset")
    if type(offset) not in (int, float) or not math.isfinite(offset):
        faults.append(f"nested_offset {offset!r}, which is no finite number")
    for part, tensor, kind, size in (
        ("codes", codes, torch.uint8, (values + 1) // 2),
        ("absmax", absmax, torch.uint8, blocks),
        ("nested_absmax", nested, torch.float32, math.ceil(blocks / GROUP)),
    ):
        if tensor.dtype != kind or tensor.numel() != size:
            faults.append(f"{part} of {tensor.numel()} × {tensor.dtype}, not {size} × {kind}")
    for part, table, ours in (("quant_map", levels, LEVELS), ("nested_quant_map", dynamic, DYNAMIC)):
        if not torch.equal(table, ours):
            faults.append(f"a {part} that is not bitsandbytes' own")
    if not faults and not nested.isfinite().all():
        faults.append("a nested_absmax with NaN or infinity")
    if faults:
        raise ValueError(f"{name} is stored in 4 bits with " + "; ".join(faults))
    return NF4Tensor(
        codes.flatten(), absmax.flatten(), nested.flatten(), torch.tensor(offset, dtype=torch.float32), torch.Size(shape), dtype
    )
