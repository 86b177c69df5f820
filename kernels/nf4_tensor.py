"""A 4-bit weight that takes a weight's place: a tensor of its shape and dtype that holds codes and scales inside.

    layer.weight = nn.Parameter(NF4Tensor.quantize(layer.weight), requires_grad=False)

nn.Linear and every layer with an adapter then work on it unchanged: F.linear, differentiable in x and bias, and lora_linear
dequantise a block of rows at a time, so that the whole weight never exists in more than 4 bits. The weight itself is frozen:
rounding to 16 levels has no useful gradient. Whatever else torch can do with a weight is refused; dequantize() gives one.
Source: Dettmers et al. 2023, "QLoRA", eq. 5 and 6.
"""

import torch
from torch import Tensor

from minilora.kernels import backend, nf4
from minilora.kernels.arithmetic import linear_dtype
from minilora.kernels.blocks import block_rows, brought, by_column, by_row
from minilora.kernels.nf4 import BLOCK, compress, dequantize_blocks, expand
from minilora.kernels.scratch import scratch

CHUNK = 2**21  # values quantised at once, a multiple of BLOCK
PARTS = ("codes", "absmax_codes", "nested_absmax", "offset")


class NF4Tensor(Tensor):
    """Stands for a weight (N, K) of a floating dtype, the one that dequantize() gives and that x must have.

    `.to(dtype)`, and model.to(dtype), change what it dequantises to, and never expand it. The codes stay the same; the values are
    products in float32, rounded once to that dtype.

    Args:
        codes: (⌈N·K/2⌉,) uint8, two to a byte, of the rows one after another.
        absmax_codes: (⌈N·K/64⌉,) uint8, the scale of each block of 64.
        nested_absmax: (⌈N·K/64/256⌉,) float32, the scale of each group of 256 scales.
        offset: () float32, the mean of the scales.
        shape: (N, K).
        transposed: whether this is the (K, N) view of such a weight.
    """

    @staticmethod
    def __new__(cls, codes, absmax_codes, nested_absmax, offset, shape, dtype, transposed=False):
        N, K = shape
        size, strides = ((K, N), (1, K)) if transposed else ((N, K), (K, 1))
        return Tensor._make_wrapper_subclass(cls, size, strides=strides, dtype=dtype, device=codes.device)

    def __init__(self, codes, absmax_codes, nested_absmax, offset, shape, dtype, transposed=False):
        self.codes, self.absmax_codes, self.nested_absmax, self.offset = codes, absmax_codes, nested_absmax, offset
        self.transposed = transposed

    @classmethod
    def quantize(cls, weight: Tensor) -> "NF4Tensor":
        """Of a weight (N, K), in bounded memory beside it and the result.

        Raises:
            ValueError: the weight is no floating matrix, is empty, or holds NaN or infinity.
        """
        if weight.dim() != 2 or not weight.is_floating_point() or not weight.numel():
            raise ValueError(f"a 4-bit weight stands for a floating (N, K) matrix, not {weight.dtype} {tuple(weight.shape)}")
        values, quantize_blocks = weight.detach().reshape(-1), _blocks(weight).quantize_blocks
        codes = torch.empty(-(-len(values) // 2), dtype=torch.uint8, device=weight.device)
        absmax = torch.empty(-(-len(values) // BLOCK), device=weight.device)
        for start in range(0, len(values), CHUNK):  # into place: pieces that outlive a chunk's scratch would hold its pages too
            piece, scales = quantize_blocks(values[start : start + CHUNK])
            codes[start // 2 :][: len(piece)], absmax[start // BLOCK :][: len(scales)] = piece, scales
        return cls(codes, *compress(absmax), weight.shape, weight.dtype)

    @property
    def parts(self) -> list[Tensor]:
        """The tensors inside."""
        return [getattr(self, name) for name in PARTS]

    def row_blocks(self, values: int, low: int = 0, high: int | None = None):
        """Yields (rows, their values (⋯, K) in dtype) for slices of about so many values of the rows low..high, in order.

        The values lie in one buffer, and are overwritten by the next, and by those of any other weight in this thread.
        """
        N, K = self.shape
        absmax, step = expand(*self.parts[1:]), block_rows(values, K)
        high = N if high is None else high
        buffer = scratch("dequantised", min(step, high - low) * K + 2 * BLOCK, self.dtype, self.device)
        for start in range(low, high, step):
            stop = min(start + step, high)
            first, end = start * K // BLOCK, -(-stop * K // BLOCK)  # the blocks that these rows have a part of
            n = min(end * BLOCK, N * K) - first * BLOCK
            codes = self.codes[first * BLOCK // 2 : end * BLOCK // 2]
            flat = dequantize_blocks(codes, absmax[first:end], n, self.dtype, out=buffer[:n])
            yield slice(start, stop), flat[start * K - first * BLOCK :][: (stop - start) * K].view(-1, K)

    def dequantize(self) -> Tensor:
        """The weight as a plain tensor."""
        if self.transposed:
            return self.t().dequantize().t()
        if _blocks(self) is not nf4:
            return _blocks(self).dequantize(self)
        weight = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for rows, values in self.row_blocks(CHUNK):
            weight[rows] = values
        return weight

    def requires_grad_(self, requires_grad: bool = True) -> "NF4Tensor":
        if requires_grad:
            raise ValueError("a 4-bit weight is frozen and has no gradient: nn.Parameter(weight, requires_grad=False)")
        return super().requires_grad_(False)

    def __repr__(self):
        return f"NF4Tensor({tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __tensor_flatten__(self):
        return list(PARTS), (self.dtype, self.transposed)

    @classmethod
    def __tensor_unflatten__(cls, parts, meta, outer_size, outer_stride):
        dtype, transposed = meta
        return cls(**parts, shape=outer_size[::-1] if transposed else outer_size, dtype=dtype, transposed=transposed)

    @property
    def stored_shape(self) -> torch.Size:
        """(N, K) of the rows that lie one after another."""
        return self.shape[::-1] if self.transposed else self.shape

    def _with(self, parts: list[Tensor], dtype: torch.dtype | None = None, transposed: bool | None = None) -> "NF4Tensor":
        """The same weight with other tensors inside, another dtype, or seen the other way round."""
        transposed = self.transposed if transposed is None else transposed
        return type(self)(*parts, self.stored_shape, dtype or self.dtype, transposed)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        # In inference mode F.linear and .to arrive whole, elsewhere as what they are made of.
        operation = OPERATIONS.get(function, function.decompose)
        result = operation(*args, **kwargs or {})
        if result is NotImplemented:
            raise NotImplementedError(f"{function} does not take a 4-bit weight: dequantize() it first")
        return result


def _blocks(weight: Tensor):
    """The module that quantises and dequantises weights of this dtype where this one lies."""
    if backend.choose(weight.device, weight.dtype)[0] == "torch":
        return nf4
    from minilora.kernels import nf4_triton  # here, so that machines without Triton import all the rest

    return nf4_triton


def linear(x: Tensor, weight: NF4Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias, (M, K) -> (M, N), of a 4-bit W (N, K), or of its transpose, in x's dtype, in plain PyTorch."""
    if weight.transposed:
        return by_column(x, brought(weight.t(), x.dtype, len(x)), len(weight), bias)
    return by_row(x, brought(weight, x.dtype, len(x)), len(weight), bias)


@torch.library.custom_op("minilora::nf4_linear", mutates_args=())
def _linear_op(x: Tensor, parts: list[Tensor], shape: list[int], transposed: bool, bias: Tensor | None) -> Tensor:
    dtype, weight = linear_dtype(x), NF4Tensor(*parts, shape, x.dtype, transposed)
    if _blocks(weight) is not nf4:
        from minilora.kernels import lora_linear_triton

        with torch.cuda.device_of(x):  # a product without any update
            return lora_linear_triton.gemm(x, weight, x.new_empty(len(x), 0), x.new_empty(len(weight), 0), (), bias)
    return linear(x.to(dtype), weight, None if bias is None else bias.to(dtype)).to(x.dtype)


@_linear_op.register_fake
def _(x, parts, shape, transposed, bias):
    return x.new_empty(x.shape[0], shape[1] if transposed else shape[0])


def _addmm(bias: Tensor | None, x: Tensor, weight: NF4Tensor) -> Tensor:
    """What F.linear comes down to, and its gradient in x."""
    if isinstance(x, NF4Tensor) or isinstance(bias, NF4Tensor) or not isinstance(weight, NF4Tensor):
        raise NotImplementedError("a 4-bit weight multiplies from the right only, x Wᵀ: dequantize() it first")
    if x.dtype != weight.dtype:
        raise ValueError(f"x and the 4-bit weight must share a dtype, not {x.dtype} and {weight.dtype}: cast x")
    return _linear_op(x, weight.parts, list(weight.stored_shape), not weight.transposed, bias)


def _to_copy(weight: NF4Tensor, *, dtype=None, device=None, non_blocking=False, **layout) -> NF4Tensor:
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"a 4-bit weight stands for floating numbers, not {dtype}")
    return weight._with([part.to(device, non_blocking=non_blocking, copy=True) for part in weight.parts], dtype)


def _copy_(weight: NF4Tensor, source: NF4Tensor, non_blocking=False) -> NF4Tensor:
    """What load_state_dict does."""
    if not isinstance(weight, NF4Tensor) or not isinstance(source, NF4Tensor) or weight.transposed != source.transposed:
        raise NotImplementedError("a 4-bit weight is copied from and to another one only: quantize, or dequantize(), first")
    for part, other in zip(weight.parts, source.parts, strict=True):
        part.copy_(other, non_blocking=non_blocking)
    return weight


aten = torch.ops.aten
OPERATIONS = {
    aten.detach.default: lambda weight: weight._with(weight.parts),
    aten.alias.default: lambda weight: weight._with(weight.parts),
    aten.clone.default: lambda weight, **layout: weight._with([part.clone() for part in weight.parts]),
    aten.t.default: lambda weight: weight._with(weight.parts, transposed=not weight.transposed),
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy_,
    aten.mm.default: lambda x, weight: _addmm(None, x, weight),
    aten.addmm.default: _addmm,
}
