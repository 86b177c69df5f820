"""Products with a weight (N, K) that is not kept in the dtype of x: a block of its rows at a time is brought to that.

    y = x Wᵀ + bias        a block of rows of W makes columns of y
    y = x W  + bias        a block of rows of W adds to all of y

The blocks lie in one buffer, one after the other; the whole weight never exists but as it is kept.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from minilora.kernels.scratch import scratch

Blocks = Iterable[tuple[slice, Tensor]]  # rows of W, in order, and their values (⋯, K)


def block_rows(values: int, K: int) -> int:
    """Rows of about so many values; a multiple of 64 where there are more, since products with 682 rows took 1.06 × the time
    of products with 640 for each row."""
    rows = max(1, values // K)
    return rows if rows < 64 else rows // 64 * 64


def block_values(M: int) -> int:
    """Values of the weight to bring at once for M rows of x.

    With a 4-bit weight on one core, 3072 to 3072, products of 512 rows took 1.04 × those in float32 and the gradient of x 1.06 ×
    by 2²², 1.03 × and 1.08 × by 2²¹; of 64 rows 1.20 × and 1.49 × by 2²⁰, 1.17 × and 1.42 × by 2¹⁹.
    """
    return 2**22 if M > 256 else 2**19


def brought(weight: Tensor, dtype: torch.dtype, M: int) -> Iterator[tuple[slice, Tensor]]:
    """The blocks of a plain weight, or of one that has row_blocks of its own, in dtype, for M rows of x."""
    values = block_values(M)
    blocks = weight.row_blocks(values) if hasattr(weight, "row_blocks") else _views(weight, block_rows(values, weight.shape[1]))
    for rows, found in blocks:
        if found.dtype != dtype:
            found = scratch("brought", found.numel(), dtype, found.device).view(found.shape).copy_(found)
        yield rows, found


def _views(weight: Tensor, step: int) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(weight), step):
        rows = slice(start, min(start + step, len(weight)))
        yield rows, weight[rows]


def by_row(x: Tensor, blocks: Blocks, N: int, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias, (M, K) -> (M, N), in x's dtype, which that of the blocks and of bias must be."""
    y = x.new_empty(len(x), N)
    for rows, values in blocks:
        if bias is None:
            torch.mm(x, values.t(), out=y[:, rows])
        else:
            torch.addmm(bias[rows], x, values.t(), out=y[:, rows])
    return y


def by_column(x: Tensor, blocks: Blocks, K: int, bias: Tensor | None) -> Tensor:
    """x W + bias, (M, N) -> (M, K), likewise, its sum in float32 or better."""
    y = x.new_zeros(len(x), K, dtype=torch.promote_types(x.dtype, torch.float32))
    for rows, values in blocks:
        if y.dtype == x.dtype:
            y.addmm_(x[:, rows], values)  # a third of the traffic of a product that is added afterwards
        else:
            y += x[:, rows] @ values
    return (y if bias is None else y + bias).to(x.dtype)
