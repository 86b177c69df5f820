"""What an adapter asks of the weight beside it where that may be 4-bit: its rows, their lengths, and a plain copy."""

from collections.abc import Iterator

import torch
from torch import Tensor

from minilora.kernels.nf4_tensor import CHUNK, NF4Tensor


def dense(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A plain copy of a weight in dtype; a 4-bit one comes straight from its codes, not by way of its own dtype."""
    return weight.to(dtype).dequantize() if isinstance(weight, NF4Tensor) else weight.to(dtype, copy=True)


def row_blocks(matrix: Tensor, start: int, stop: int) -> Iterator[tuple[slice, Tensor]]:
    """The rows start..stop of a matrix, a block at a time where they are 4-bit: (slice, counted from start; its rows).

    The next block overwrites the one before it.
    """
    if not isinstance(matrix, NF4Tensor):
        yield slice(0, stop - start), matrix[start:stop]
        return
    for rows, values in matrix.row_blocks(CHUNK, start, stop):
        yield slice(rows.start - start, rows.stop - start), values


def row_lengths(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The norm of each row, found in dtype."""
    return torch.cat([torch.linalg.vector_norm(rows, dim=1, dtype=dtype) for _, rows in row_blocks(matrix, 0, len(matrix))])
