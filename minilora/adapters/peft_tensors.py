"""One layer's adapter as it lies in a file, by PEFT's names and in PEFT's shapes.

A layer adapted by slices is one exact pair there: A_g stacked to (G·r, in), B_g as blocks of (out, G·r), zero elsewhere.
"""

import torch
from torch import Tensor

from minilora.adapters.dora import DoraLinear
from minilora.adapters.embedding import Embedding
from minilora.adapters.layers import Linear, LoRALayer, spread
from minilora.adapters.lora_bias import BiasedLinear
from minilora.adapters.tying import TiedLinear
from minilora.kernels.lora_linear import Slices


def on_disk(layer: LoRALayer) -> dict[str, Tensor]:
    """A layer's adapter by PEFT's names and in its shapes, slices fused."""
    A, B = (factor.detach() for factor in layer.factors())
    if isinstance(layer, Embedding):
        return {"lora_embedding_A": A, "lora_embedding_B": B}
    if not isinstance(layer, Linear):  # a convolution into r channels, and a pointwise one out of them
        return {
            "lora_A.weight": A.view(-1, *layer.weight.shape[1:]),
            "lora_B.weight": B.view(*B.shape, *[1] * (layer.weight.ndim - 2)),
        }
    tensors = {"lora_A.weight": A, "lora_B.weight": fuse(B, layer.slices, layer.out_features)}
    if isinstance(layer, DoraLinear):
        tensors["lora_magnitude_vector"] = layer.magnitudes()
    if isinstance(layer, BiasedLinear):
        tensors["lora_B.bias"] = layer.spread_bias().detach()
    return tensors


def from_disk(layer: LoRALayer, tensors: dict[str, Tensor]) -> None:
    """The inverse of on_disk, in place."""
    if isinstance(layer, Embedding):
        layer.set_factors(tensors["lora_embedding_A"], tensors["lora_embedding_B"])
        return
    if not isinstance(layer, Linear):
        layer.set_factors(tensors["lora_A.weight"].flatten(1), tensors["lora_B.weight"].flatten(1))
        return
    layer.set_factors(tensors["lora_A.weight"], _split(tensors["lora_B.weight"], layer.slices))
    if isinstance(layer, DoraLinear):
        layer.lora_magnitude_vector.copy_(_rows(tensors["lora_magnitude_vector"], layer.slices))
    if isinstance(layer, BiasedLinear):
        layer.lora_bias.copy_(_rows(tensors["lora_B.bias"], layer.slices))


def faults_outside_slices(path: str, layer: LoRALayer, tensors: dict[str, Tensor]) -> list[str]:
    """What the file changes in rows that the model's adapter, by slices, leaves alone."""
    if not by_slices(layer):
        return []
    expected = {"lora_B.weight": lambda B: fuse(_split(B, layer.slices), layer.slices, layer.out_features)}
    if isinstance(layer, DoraLinear) and not layer.weight.is_meta:
        expected["lora_magnitude_vector"] = lambda m: spread(_rows(m, layer.slices), layer.slices, layer.magnitudes())
    if isinstance(layer, BiasedLinear):
        expected["lora_B.bias"] = lambda b: spread(_rows(b, layer.slices), layer.slices, torch.zeros_like(b))
    return [
        f"{path}.{key} reaches outputs that the model's adapter, by slices, does not adapt"
        for key, within in expected.items()
        if not torch.allclose(within(tensors[f"{path}.{key}"]), tensors[f"{path}.{key}"], rtol=1e-5, atol=0)
    ]


def faults_of_sharing(layers: dict[str, LoRALayer], tensors: dict[str, Tensor]) -> list[str]:
    """Tied modules that share one adapter in the model, and have unlike ones in the file."""
    first, faults = {}, []
    for path, layer in layers.items():
        if isinstance(layer, Embedding):
            pair = tensors[f"{path}.lora_embedding_A"], tensors[f"{path}.lora_embedding_B"]
        elif isinstance(layer, TiedLinear):
            pair = tensors[f"{path}.lora_B.weight"].T, tensors[f"{path}.lora_A.weight"].T
        else:
            continue
        source, expected = first.setdefault(layer.lora_A, (path, pair))
        if not all(map(torch.equal, pair, expected)):
            faults.append(f"{path} must have the adapter of {source}, to which it is tied, and has another one in the file")
    return faults


def refuse_convolutions(layers: dict[str, LoRALayer]) -> None:
    """Raises for convolutions that PEFT's two, one into r channels and a pointwise one out of them, cannot be.

    loralib's factors run over parts of the kernel. With groups PEFT's first one still sees all channels, and no kernel of the
    frozen layer's shape does the same.
    """
    convolutions = {path: layer for path, layer in layers.items() if not isinstance(layer, Linear | Embedding)}
    others = [path for path, layer in convolutions.items() if not layer.made_around or layer.groups > 1]
    if others:
        raise ValueError(
            "adapter files hold no convolutions with groups or with loralib's factors: load and save "
            f"{', '.join(others)} with lora_state_dict"
        )


def by_slices(layer: LoRALayer) -> bool:
    """Whether a layer's adapters leave some of its outputs alone, or are several."""
    return isinstance(layer, Linear) and layer.slices != ((0, layer.out_features),)


def fuse(lora_B: Tensor, slices: Slices, out_features: int) -> Tensor:
    """B of the slices (their width, r) as one block matrix (out_features, G·r), zero outside the blocks."""
    fused = lora_B.new_zeros(out_features, len(slices) * lora_B.shape[1])
    blocks = lora_B.split([stop - start for start, stop in slices])
    for (start, stop), columns, block in zip(slices, fused.chunk(len(slices), dim=1), blocks, strict=True):
        columns[start:stop] = block
    return fused


def _split(fused: Tensor, slices: Slices) -> Tensor:
    """The inverse of fuse."""
    columns = fused.chunk(len(slices), dim=1)
    return torch.cat([columns_g[start:stop] for (start, stop), columns_g in zip(slices, columns, strict=True)])


def _rows(values: Tensor, slices: Slices) -> Tensor:
    """The values of the slices' rows: the inverse of spread."""
    return torch.cat([values[start:stop] for start, stop in slices])
