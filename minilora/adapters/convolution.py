"""Convolutions with a low-rank adapter beside the frozen weight.

    y = conv(x, W) + bias + conv(drop(x), ΔW)        ΔW = scaling · (lora_B lora_A), read off as the shape of W

ΔW is formed: it is a kernel, small beside the activations, and costs far less than the convolution. Two convolutions in a row,
through r channels, are the same for PEFT's shapes alone: in loralib's a row of lora_B lora_A covers a part of an output's kernel,
which takes r · k² channels between the two, and with groups a row may run from one output into the next.

Without dropout one convolution with W + ΔW, rounded once to W's dtype, is the same.
Source: loralib 0.1.2.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.adapters.layers import LoRALayer


class _ConvLoRA(LoRALayer):
    """A convolution of any number of dimensions with an adapter; settings holds nn.Conv's own (stride, padding, groups, …).

    Parameters:
        weight (out_channels, in_channels / groups, *kernel_size), bias (out_channels,) or None, and, with k the last size of the
        kernel and K the product of the others, in the shapes of loralib's Conv2d for any kernel and any number of dimensions:
        lora_A (r · k, in_channels · k), lora_B (out_channels / groups · K, r · k).
        Made around a plain layer the shapes are PEFT's, flattened: lora_A (r, in_channels / groups · K · k),
        lora_B (out_channels, r).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        *,
        use_rslora: bool = False,
        lora_dtype: torch.dtype | None = None,
        **settings,
    ):
        super().__init__(in_channels, out_channels, kernel_size, **settings)
        self._adapt(r, lora_alpha, lora_dropout, use_rslora, lora_dtype)
        self.weight.requires_grad_(self.lora_A is None)

    def lora_shapes(self):
        if self.made_around:
            return (self.r, self.weight[0].numel()), (self.out_channels, self.r)
        *others, k = self.kernel_size
        rows = self.out_channels // self.groups * math.prod(others)
        return (self.r * k, self.in_channels * k), (rows, self.r * k)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, ...) or (in_channels, ...) -> the same with out_channels, as nn.Conv."""
        if not self._adds():
            return super().forward(x)
        delta = self.delta()
        if self.training and self.lora_dropout:
            dropped = F.dropout(x, self.lora_dropout)
            return super().forward(x) + self._conv_forward(dropped, delta.to(self.weight.dtype), None)
        return self._conv_forward(x, (self.weight + delta).to(self.weight.dtype), self.bias)

    def delta(self) -> Tensor:
        """In the shape of the weight."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        return self.scaling * (self.lora_B.to(dtype) @ self.lora_A.to(dtype)).view(self.weight.shape)

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        for name in ("weight", "bias"):  # loralib's layer holds a plain one, conv
            if f"{prefix}conv.{name}" in state_dict:
                state_dict[prefix + name] = state_dict.pop(f"{prefix}conv.{name}")
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Conv1d(_ConvLoRA, nn.Conv1d):
    __doc__ = _ConvLoRA.__doc__


class Conv2d(_ConvLoRA, nn.Conv2d):
    __doc__ = _ConvLoRA.__doc__


class Conv3d(_ConvLoRA, nn.Conv3d):
    __doc__ = _ConvLoRA.__doc__
