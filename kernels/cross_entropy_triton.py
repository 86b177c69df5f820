"""The softmax of cross-entropy as a Triton kernel: one program a row of logits, which it reads twice and overwrites once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora.kernels.cross_entropy import IGNORE
from minilora.kernels.tiles import CROSS_ENTROPY


@triton.jit
def cross_entropy_kernel(
    Z,  # (M, V) contiguous; overwritten with dZ
    LABELS,  # (M,) int64
    LOSSES,  # (M,) float32
    V: tl.constexpr,
    IGNORE: tl.constexpr,
    BV: tl.constexpr,
):
    row, rv = tl.program_id(0), tl.arange(0, BV)
    label = tl.load(LABELS + row)
    Z += row.to(tl.int64) * V
    chosen = tl.load(Z + label, mask=(label >= 0) & (label < V), other=float("nan")).to(tl.float32)
    # The online softmax: each lane has the largest of its logits, and the sum of exponentials beside it; finite from the start,
    # so that lanes without a logit stay finite.
    tops, sums = tl.full((BV,), -1e30, tl.float32), tl.zeros((BV,), tl.float32)
    for start in range(0, V, BV):
        z = tl.load(Z + start + rv, mask=start + rv < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(tops, z)
        sums = sums * tl.exp(tops - higher) + tl.exp(z - higher)
        tops = higher
    top = tl.max(tops, axis=0)
    total = tl.sum(sums * tl.exp(tops - top), axis=0)
    share, wanted = 1 / total, label != IGNORE
    tl.store(LOSSES + row, tl.where(wanted, top - chosen + tl.log(total), 0.0))
    for start in range(0, V, BV):
        z = tl.load(Z + start + rv, mask=start + rv < V, other=float("-inf")).to(tl.float32)
        dz = share * tl.exp(z - top) - tl.where(start + rv == label, 1.0, 0.0)
        tl.store(Z + start + rv, tl.where(wanted, dz, 0.0).to(Z.dtype.element_ty), mask=start + rv < V)


def losses_and_dlogits_(logits: Tensor, labels: Tensor) -> Tensor:
    """Every row's loss (M,) float32; the logits (M, V), contiguous, become dZ. Both are 0 in rows of IGNORE."""
    M, V = logits.shape
    losses = torch.empty(M, dtype=torch.float32, device=logits.device)
    if M:
        cross_entropy_kernel[(M,)](
            logits, labels.contiguous(), losses, V=V, IGNORE=IGNORE, BV=CROSS_ENTROPY.BN, num_warps=CROSS_ENTROPY.num_warps
        )
    return losses
