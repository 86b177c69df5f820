"""LoftQ: adapters that start at what a weight lost when it became 4-bit, so that the whole starts near the original weight W.

    Q₁ = q(W)      s B_t A_t = the best approximation of rank r of W − Q_t      Q_{t+1} = q(W − s B_t A_t)      t = 1 … T

With T = 1 the 4-bit weight stays what it is, and the adapter fits any base that was quantised alike. A larger T changes the
weight to Q_T: the base must be saved too, since the adapter belongs to it.
Source: Li et al. 2023, "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", algorithm 1.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from minilora.adapters.four_bit import dense
from minilora.adapters.layers import Linear
from minilora.adapters.offset import pissa
from minilora.kernels.nf4_tensor import NF4Tensor

FAR = 0.5  # of the RMS of a weight: rounding to 4 bits moves one by about 0.1 of it, and another weight lies 1.4 away


@torch.no_grad()
def start_by_loftq(layers: dict[str, Linear], original: Callable[[str], Tensor], iterations: int) -> None:
    """Sets lora_A and lora_B of every layer, and the layers' 4-bit weights where iterations are more than one.

    Args:
        layers: by their paths, with 4-bit weights.
        original: gives the weight of a name, "….o_proj.weight", as it was before.

    Raises:
        ValueError: an original has another shape than the weight, or is another one; layers before it are changed.
    """
    for path, layer in tqdm(layers.items(), desc="loftq", unit="layer", leave=False):  # 10 s of a core at 3072 × 3072
        weight = original(f"{path}.weight")
        if weight.shape != layer.weight.shape or not weight.is_floating_point():
            wanted = f"floating {tuple(layer.weight.shape)}"
            raise ValueError(f"the original of {path}.weight must be {wanted}, not {weight.dtype} {tuple(weight.shape)}")
        _start(path, layer, weight.to(layer.weight.device, torch.float32), iterations)


def _start(path: str, layer: Linear, weight: Tensor, iterations: int) -> None:
    for iteration in range(iterations):
        if iteration:
            layer.weight.copy_(NF4Tensor.quantize(_without_adapter(layer, weight)))
        lost = weight - dense(layer.weight, torch.float32)
        if lost.norm() > FAR * weight.norm():
            raise ValueError(f"the original of {path}.weight is another weight than the 4-bit one: take both from one checkpoint")
        factors = [pissa(lost[start:stop], layer.r, layer.scaling) for start, stop in layer.slices]
        layer.set_factors(torch.cat([A for A, _ in factors]), torch.cat([B for _, B in factors]))


def _without_adapter(layer: Linear, weight: Tensor) -> Tensor:
    """W − s B A."""
    rest = weight.clone()
    for (start, stop), part in zip(layer.slices, layer.delta().split([b - a for a, b in layer.slices]), strict=True):
        rest[start:stop] -= part
    return rest
