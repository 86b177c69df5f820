"""Linear layers with a low-rank adapter beside a frozen weight, under loralib's names and with its constructor arguments.

    y = x Wᵀ + bias + scaling · drop(x) lora_Aᵀ lora_Bᵀ

With r = 0 a layer is the plain one; with an adapter its weight is frozen from the start.

loralib's `merge_weights` is taken and changes nothing: there it says when the weight is rewritten, never what a layer computes.
Here `train()` and `eval()` touch no weight, since adding an adapter and subtracting it again does not give a bfloat16 weight
back; merging is an explicit verb (minilora.adapters.merging).
Source: Hu et al. 2021, "LoRA", eq. 3, §4.1; loralib 0.1.2 for the names, the shapes and the start of the parameters.
"""

import math
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from minilora.adapters.config import scaling
from minilora.kernels.linear import linear
from minilora.kernels.lora_linear import Slices, lora_linear


def enabled_slices(enable_lora: list[bool], out_splits: list[int]) -> Slices:
    """(start, stop) of the enabled ones among consecutive parts of a layer's outputs."""
    edges = pairwise(accumulate(out_splits, initial=0))
    return tuple(edge for edge, enabled in zip(edges, enable_lora, strict=True) if enabled)


def spread(values: Tensor, slices: Slices, elsewhere: Tensor) -> Tensor:
    """One value for each output of a layer: those of the slices in their order, and between them those of elsewhere (N,)."""
    rows = torch.cat([torch.arange(start, stop, device=values.device) for start, stop in slices])
    return elsewhere.to(values.dtype).index_put((rows,), values)


class LoRALayer:
    """What an adapter adds to the plain layer that a class inherits from next: settings and two parameters.

    Args:
        r: rank; 0 for the plain layer, whose lora_A and lora_B are None.
        lora_alpha: the adapter is scaled by lora_alpha / r, or / sqrt(r) with use_rslora.
        lora_dropout: probability with which the adapter's input loses an element in training.
        lora_dtype: of lora_A and lora_B; the weight's when None.
    """

    fan_in_fan_out = False
    made_around = False  # a plain layer, by around

    @property
    def slices(self) -> Slices:
        """(start, stop) of the rows of the weight that each adapter adds to."""
        return ((0, len(self.weight)),)

    def lora_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of lora_A and lora_B."""
        raise NotImplementedError

    def delta(self) -> Tensor:
        """What the adapters add to their rows of the weight, in float32 or better."""
        raise NotImplementedError

    @classmethod
    def around(cls, module: nn.Module, lora_dtype: torch.dtype, lora_device=None, **settings) -> "LoRALayer":
        """The layer with an adapter that takes over a plain layer's weight, bias, settings and hooks; the weight is no copy.

        Args:
            lora_device: of lora_A and lora_B; the weight's when None.
        """
        layer = cls._taking_over(module)
        layer._adapt(lora_dtype=lora_dtype, lora_device=lora_device, **settings)
        return layer

    @classmethod
    def _taking_over(cls, module: nn.Module) -> "LoRALayer":
        layer = cls.__new__(cls)
        # nn.Module keeps parameters and hooks in dicts: the layer has dicts of its own with the same entries.
        vars(layer).update({name: value.copy() if isinstance(value, dict) else value for name, value in vars(module).items()})
        layer.made_around = True
        return layer

    def _adapt(self, r, lora_alpha=1, lora_dropout=0.0, use_rslora=False, lora_dtype=None, lora_device=None) -> None:
        if r < 0 or not 0 <= lora_dropout < 1:
            raise ValueError(f"r must be at least 0 and lora_dropout lie in [0, 1), not {r} and {lora_dropout}")
        self.r, self.lora_alpha, self.lora_dropout, self.use_rslora = r, lora_alpha, lora_dropout, use_rslora
        self.merged = False
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        if r and self.slices:
            self.scaling = scaling(r, lora_alpha, use_rslora)
            dtype, device = lora_dtype or self.weight.dtype, lora_device or self.weight.device
            self._make_adapter(torch.empty(0, dtype=dtype, device=device))

    def _make_adapter(self, like: Tensor) -> None:
        self.lora_A, self.lora_B = (nn.Parameter(like.new_empty(shape)) for shape in self.lora_shapes())
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """lora_A as nn.Linear starts its weight, which is PEFT's and loralib's start; lora_B zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the whole update, of the shapes of lora_A and lora_B with as many ranks as it takes."""
        return self.lora_A, self.lora_B

    def set_factors(self, A: Tensor, B: Tensor) -> None:
        """Takes over what factors gives."""
        self.lora_A.copy_(A)
        self.lora_B.copy_(B)

    def _adds(self) -> bool:
        """Whether forward adds an adapter: there is one, and the weight does not hold it already."""
        if self.merged and self.training and torch.is_grad_enabled():
            raise ValueError("this layer's adapter is merged into its weight: unmerge before training")
        return self.lora_A is not None and not self.merged

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}"


def adapted_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Every layer that has an adapter, by its path."""
    layers = {path: module for path, module in model.named_modules() if isinstance(module, LoRALayer)}
    return {path: layer for path, layer in layers.items() if layer.lora_A is not None}


class Linear(LoRALayer, nn.Linear):
    """A linear layer with an adapter on all of its outputs.

    Args:
        fan_in_fan_out: the weight is stored as (in_features, out_features).

    Parameters:
        weight (out_features, in_features), bias (out_features,) or None, lora_A (r, in_features), lora_B (out_features, r).
        lora_B starts at zero, so that the layer starts as the frozen one.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        *,
        use_rslora: bool = False,
        lora_dtype: torch.dtype | None = None,
        bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        if fan_in_fan_out:
            self.fan_in_fan_out, self.weight = True, nn.Parameter(self.weight.detach().T.contiguous())
        self._adapt(r, lora_alpha, lora_dropout, use_rslora, lora_dtype)
        self.weight.requires_grad_(self.lora_A is None)

    @property
    def matrix(self) -> Tensor:
        """The weight as (out_features, in_features), however it is stored."""
        return self.weight.T if self.fan_in_fan_out else self.weight

    @property
    def slices(self) -> Slices:
        """(start, stop) of the outputs that each adapter adds to."""
        return ((0, self.out_features),)

    def lora_shapes(self):
        return (len(self.slices) * self.r, self.in_features), (sum(stop - start for start, stop in self.slices), self.r)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if not self._adds():
            return linear(x, self.matrix, self.bias)
        dropout = self.lora_dropout if self.training else 0.0
        return lora_linear(x, self.matrix, *self.factors(), self.scaling, self.bias, dropout, self.slices)

    def delta(self) -> Tensor:
        """What the adapters add to each slice of the matrix, (width of the slices, in_features), in float32 or better."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        A, B = self.factors()
        widths = [stop - start for start, stop in self.slices]
        pairs = zip(B.to(dtype).split(widths), A.to(dtype).chunk(len(widths)), strict=True)
        return torch.cat([self.scaling * (B_g @ A_g) for B_g, A_g in pairs])


class MergedLinear(Linear):
    """Several linear layers fused into one weight, with an adapter for each that is enabled.

    Args:
        enable_lora: for each fused layer, whether it has an adapter; with none the layer is a plain one.
        out_splits: outputs of each fused layer, in order; equal parts when None.

    Parameters:
        lora_A (number enabled · r, in_features), lora_B (outputs of those enabled, r), in the order of the fused layers.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: list[bool] = (False,),
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        *,
        out_splits: list[int] | None = None,
        **settings,
    ):
        self._split(enable_lora, out_splits, out_features)
        super().__init__(in_features, out_features, r, lora_alpha, lora_dropout, fan_in_fan_out, merge_weights, **settings)

    @classmethod
    def around(cls, linear, lora_dtype, lora_device=None, *, enable_lora, out_splits=None, **settings) -> "MergedLinear":
        layer = cls._taking_over(linear)
        layer._split(enable_lora, out_splits, linear.out_features)
        layer._adapt(lora_dtype=lora_dtype, lora_device=lora_device, **settings)
        return layer

    def _split(self, enable_lora: list[bool], out_splits: list[int] | None, out_features: int) -> None:
        out_splits = out_splits or [out_features // max(1, len(enable_lora))] * len(enable_lora)
        if sum(out_splits) != out_features or len(out_splits) != len(enable_lora) or min(out_splits) < 0:
            raise ValueError(
                f"out_splits must be {len(enable_lora)} sizes (one for each of enable_lora) that add up to out_features = "
                f"{out_features}, not {list(out_splits)}"
            )
        self.enable_lora, self.out_splits = list(enable_lora), list(out_splits)

    @property
    def slices(self) -> Slices:
        return enabled_slices(self.enable_lora, self.out_splits)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, enable_lora={self.enable_lora}, out_splits={self.out_splits}"
