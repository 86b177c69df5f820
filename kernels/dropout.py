"""Dropout whose mask is a function of seed, row and column.

    drop(x) = keep ⊙ x / (1 − p)
    keep[i, 8q + 2w + h] = half h (16 bits, the low one first) of word w of Philox4x32(key = seed, counter = (q, i, 0, 0)) ≥ 2¹⁶ p

An element's fate depends on no tile, no thread and no neighbour, so that kernels of any shape agree on it: Triton makes the mask
again wherever it is needed, and stores none. PyTorch, which takes as long to find it as for several passes over x, stores it,
a byte an element. One call of the generator decides eight elements.
p is rounded to a multiple of 2⁻¹⁶. Seven rounds are the fewest that pass BigCrush.
Source: Srivastava et al. 2014, "Dropout" (scaled while training); Salmon et al. 2011, "Parallel Random Numbers", §3.3, table 2.
"""

import torch
from torch import Tensor

PHILOX_ROUNDS = 7
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57  # of words 0 and 2
KEY_STEPS = 0x9E3779B9, 0xBB67AE85  # added to the key's halves after each round
LOW = 0xFFFFFFFF
CALLS = 2**17  # of the generator at once on a CPU: enough for its cores, in arrays of a megabyte


def draw_seed(device: torch.device | str = "cpu") -> Tensor:
    """Draws a seed, () int64 on device, from torch's generator there: manual_seed and activation checkpointing replay it."""
    return torch.randint(2**63 - 1, (), device=device)


def threshold(p: float) -> int:
    """2¹⁶ p, rounded: what an element's 16 bits must reach for it to be kept; at least one of the 2¹⁶ values does."""
    return min(round(p * 2**16), 2**16 - 1)


def kept_share(p: float) -> float:
    """1 − p with p rounded as the mask rounds it."""
    return 1 - threshold(p) / 2**16


def philox(seed: Tensor, counter: tuple[Tensor, Tensor]) -> list[Tensor]:
    """The four words (int64 holding 32 bits) of Philox4x32-7 for counters (c0, c1, 0, 0), c0 and c1 broadcast together.

    A word is as large as what it follows from so far: for a row and a column of counters, two rounds cost next to nothing.
    """
    zero, halves = torch.zeros_like(seed), (int(seed) & LOW, int(seed) >> 32 & LOW)
    words = [counter[0].clone(), counter[1], zero, zero.clone()]
    for r in range(PHILOX_ROUNDS):
        first, third = words[0].mul_(MULTIPLIERS[0]), words[2].mul_(MULTIPLIERS[1])  # modulo 2⁶⁴: all of their 64 bits
        key = [(half + r * step) & LOW for half, step in zip(halves, KEY_STEPS, strict=True)]
        xor = Tensor.bitwise_xor if r < 3 else Tensor.bitwise_xor_  # in place, once words have grown: a quarter of the time
        high = [xor(third >> 32, words[1]).bitwise_xor_(key[0]), xor(first >> 32, words[3]).bitwise_xor_(key[1])]
        words = [high[0].bitwise_and_(LOW), third, high[1].bitwise_and_(LOW), first]
    return [words[0], words[1] & LOW, words[2], words[3] & LOW]


@torch.library.custom_op("minilora::keep", mutates_args=())
def keep(M: int, N: int, p: float, seed: Tensor) -> Tensor:
    """The mask itself, (M, N) booleans on seed's device, found in blocks of rows."""
    groups = torch.arange((N + 7) // 8, device=seed.device)[None]  # q, for each 8 columns
    pairs = torch.empty(M, groups.shape[1], 2, dtype=torch.int64, device=seed.device)  # of words, the second in the high half
    step = max(1, CALLS // groups.shape[1]) if groups.numel() else 1
    for start in range(0, M, step):
        rows = torch.arange(start, min(start + step, M), device=seed.device)[:, None]
        words, part = philox(seed, (groups, rows)), pairs[start : start + step]
        for i in range(2):
            part[..., i] = (words[2 * i + 1] << 32).bitwise_or_(words[2 * i])
    halves = pairs.flatten(1).view(torch.int16)  # (M, 8 · groups), as numbers with a sign: 2¹⁵ less
    return halves.bitwise_xor_(-(2**15)).ge_(threshold(p) - 2**15)[:, :N].bool()


@keep.register_fake
def _(M, N, p, seed):
    return seed.new_empty(M, N, dtype=torch.bool)


def drop(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Zeroes each element of x with probability p and divides the rest by 1 − p; the same seed drops the same elements.

    Linear in x and its own transpose, so the gradient of drop(x) is drop(gradient) with the same seed.

    Args:
        x: (..., N), any floating dtype; the leading dimensions count as one, i in the equation.
        p: probability in [0, 1); with 0 x itself comes back.
        seed: () int64 on x's device; unread with p = 0.
    """
    if p == 0:
        return x
    M = x.numel() // max(x.shape[-1], 1)
    return torch.where(keep(M, x.shape[-1], p, seed).view(x.shape), x, 0) / kept_share(p)
