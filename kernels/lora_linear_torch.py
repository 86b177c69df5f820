"""The steps of lora_linear in plain PyTorch: what each Triton kernel of the same name computes, and what runs without a GPU.

    down   S_g = f · (keep ⊙ P)_g U_g
    gemm   Y = X Wᵀ + bias + keep ⊙ [S_g U_gᵀ]
    outer  D_g = (keep ⊙ P)_gᵀ S_g
    sweep  T_g = f · P_g U_g  and  D_g = P_gᵀ S_g

P (M, N) is the wide matrix, x or dY; g counts slices of its columns, (start, stop), and _g takes those columns. U and D
stack the slices' factors, (width of all slices, R); S and T have them side by side, (M, G·R). keep is dropout's mask, all
ones without one; 1 / (1 − p) is part of f. Only a matrix with one slice, all of it, has a mask. W may have 4 bits, or another
dtype than X (linear).
"""

import torch
from torch import Tensor

from minilora.kernels.dropout import keep
from minilora.kernels.linear import product
from minilora.kernels.scratch import scratch

Slices = tuple[tuple[int, int], ...]


def per_slice(slices: Slices, S: Tensor, U: Tensor):
    """Yields ((start, stop), S_g (M, R), U_g (stop − start, R)) for each slice: views, no copies."""
    R, row = U.shape[1], 0
    for g, (start, stop) in enumerate(slices):
        yield (start, stop), S[..., g * R : (g + 1) * R], U[row : row + stop - start]
        row += stop - start


def make_mask(M: int, N: int, p: float, drawn: Tensor | None) -> Tensor | None:
    """keep (M, N) as these steps take it, from itself or from its seed."""
    return drawn if drawn is None or drawn.dim() else keep(M, N, p, drawn)


def _dropped(P: Tensor, mask: Tensor | None) -> Tensor:
    """keep ⊙ P, in memory of the thread's."""
    if mask is None:
        return P
    return torch.mul(P, mask.view(torch.int8), out=scratch("dropped", P.numel(), P.dtype, P.device).view(P.shape))


def down(P: Tensor, U: Tensor, slices: Slices, factor: float, mask: Tensor | None = None) -> Tensor:
    """S (M, G·R) in P's dtype."""
    P = _dropped(P, mask)
    S = P.new_empty(len(P), len(slices) * U.shape[1])
    for (start, stop), S_g, U_g in per_slice(slices, S, U.to(P.dtype)):
        torch.addmm(S_g, P[:, start:stop], U_g, beta=0, alpha=factor, out=S_g)
    return S


def gemm(
    X: Tensor, W: Tensor, S: Tensor, U: Tensor, slices: Slices, bias: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Y (M, N) in X's dtype."""
    Y = product(X, W, bias)
    if mask is not None:
        return Y.addcmul_(S @ U.to(X.dtype).T, mask.view(torch.int8))
    for (start, stop), S_g, U_g in per_slice(slices, S, U.to(X.dtype)):
        Y[:, start:stop].addmm_(S_g, U_g.T)
    return Y


def outer(P: Tensor, S: Tensor, U: Tensor, slices: Slices, mask: Tensor | None = None) -> Tensor:
    """D, laid out as U and in its dtype."""
    P = _dropped(P, mask)
    D = torch.empty_like(U)
    for (start, stop), S_g, D_g in per_slice(slices, S, D):
        D_g.copy_((S_g.T @ P[:, start:stop]).T)  # six times as fast on a CPU as P_gᵀ S_g at (512, 1536) and R 8
    return D


def sweep(P: Tensor, U: Tensor, S: Tensor, slices: Slices, factor: float) -> tuple[Tensor, Tensor]:
    """T as S, and D as U."""
    return down(P, U, slices, factor), outer(P, S, U, slices)
