"""Dropout whose mask is a function of its seed: backward makes it again instead of storing it.

    drop(x) = keep(seed) ⊙ x / (1 − p),   keep ~ Bernoulli(1 − p)

Source: Srivastava et al. 2014, "Dropout", in the inverted form (scaled while training).
"""

import torch
from torch import Tensor


def draw_seed() -> int:
    """Draws a seed from torch's default generator, so that `torch.manual_seed` and activation checkpointing replay it."""
    return int(torch.randint(2**63 - 1, ()))


def drop(x: Tensor, p: float, seed: int) -> Tensor:
    """Zeroes each element of x with probability p and divides the rest by 1 − p; the same seed drops the same elements.

    Linear in x and its own transpose, so the gradient of drop(x) is drop(gradient) with the same seed.

    Args:
        x: any shape, any floating dtype.
        p: probability in [0, 1); with 0 x itself comes back.
        seed: a non-negative integer below 2**63.
    """
    if p == 0:
        return x
    generator = torch.Generator(x.device).manual_seed(seed)
    keep = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p, generator=generator)
    return torch.where(keep, x, 0).mul_(1 / (1 - p))
