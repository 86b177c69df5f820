"""NormalFloat in 4 bits: the frozen weight of QLoRA, in blocks of 64 values that share a scale.

    absmax_b = max |w| over block b
    code_i   = number of the entry of LEVELS nearest to w_i / absmax_b
    ŵ_i      = LEVELS[code_i] · absmax_b

LEVELS are quantiles of a normal distribution, so that each is used about equally often. Two codes share a byte, the first in
its high half. The scales are quantised again, to 8 bits in groups of 256, which makes 4.127 bits a weight:

    offset   = mean absmax
    m_h      = max |absmax − offset| over group h
    c_b      = number of the entry of DYNAMIC nearest to (absmax_b − offset) / m_h

All functions take flat values, on any device. Codes, scales and values equal those of bitsandbytes 0.50.2 on a CPU bit for bit.
Source: Dettmers et al. 2023, "QLoRA", §3 and appendix E; Dettmers et al. 2022, "8-bit Optimizers", §1.3 for DYNAMIC.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.kernels.scratch import scratch

BLOCK = 64  # values that share a scale
GROUP = 256  # scales that share one themselves
CACHED = 2**18  # values dequantised at once: all that is read again stays in a core's cache
LEAST = 1e-38  # a smaller scale is taken for this one: its reciprocal still is a float32
GRID = 65535  # steps into which bitsandbytes rounds −1..1 before it looks for the nearest entry of DYNAMIC

LEVELS = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def _dynamic() -> Tensor:
    """(256,) ascending: for i in 0..6 the middles of 2ⁱ equal parts of 0.1..1, times 10ⁱ⁻⁶, with both signs; and 0 and 1."""
    edges = [torch.linspace(0.1, 1, 2**i + 1) for i in range(7)]
    positive = [10 ** (i - 6) * ((edge[:-1] + edge[1:]) / 2) for i, edge in enumerate(edges)]
    return torch.cat([*positive, *(-part for part in positive), torch.tensor([0.0, 1.0])]).sort().values


DYNAMIC = _dynamic()
PAIRS = torch.stack([LEVELS.repeat_interleave(16), LEVELS.repeat(16)], dim=1)  # (256, 2): what a byte stands for


def _nearest(values: Tensor, table: Tensor) -> Tensor:
    """The number of the table's entry nearest to each value, the lower one at a tie; a table's ends stand for all beyond."""
    return torch.bucketize(values, ((table[:-1] + table[1:]) / 2).to(values.device), out_int32=True).to(torch.uint8)


def quantize_blocks(values: Tensor) -> tuple[Tensor, Tensor]:
    """(codes (⌈n/2⌉,) uint8, absmax (⌈n/64⌉,) float32) of (n,) values of any floating dtype; the last block may be short.

    Raises:
        ValueError: a value is NaN or infinite, in float32.
    """
    values = values.float()
    blocks, rest = values[: len(values) // BLOCK * BLOCK].view(-1, BLOCK), values[len(values) // BLOCK * BLOCK :]
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * absmax.clamp(min=LEAST).reciprocal()[:, None]).flatten()
    if len(rest):  # bitsandbytes divides a short block, and keeps the scale that it divides by
        last = rest.abs().amax(dim=0, keepdim=True).clamp(min=LEAST)
        absmax, scaled = torch.cat([absmax, last]), torch.cat([scaled, rest / last])
    require_finite(absmax, values)
    codes = F.pad(_nearest(scaled, LEVELS), (0, len(values) % 2), value=7)  # LEVELS[7] is 0
    return codes[::2] << 4 | codes[1::2], absmax


def require_finite(absmax: Tensor, values: Tensor) -> None:
    """ValueError, saying how many, where the scales show that a value is NaN or infinite in float32."""
    if not absmax.isfinite().all():
        kinds = f"{int(values.isnan().sum())} NaN and {int(values.isinf().sum())} infinite"
        raise ValueError(f"4-bit weights must be finite in float32, not {kinds} of {len(values)} values")


def dequantize_blocks(codes: Tensor, absmax: Tensor, n: int, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """(n,) values: products in float32, rounded once to dtype; written to out (n,) where there is one."""
    out = torch.empty(n, dtype=dtype, device=codes.device) if out is None else out
    pairs = PAIRS.to(codes.device).view(torch.int64).flatten()  # a byte fetches both of its values as one int64
    room = min(CACHED, n + 1) // 2
    index, fetched = (scratch(use, room, as_, codes.device) for use, as_ in (("index", torch.int32), ("fetched", torch.int64)))
    for start in range(0, n, CACHED):
        stop = min(start + CACHED, n)
        part_codes = codes[start // 2 : (stop + 1) // 2]
        at = index[: len(part_codes)].copy_(part_codes)
        values = torch.index_select(pairs, 0, at, out=fetched[: len(at)]).view(torch.float32)[: stop - start]
        scales, part = absmax[start // BLOCK : -(-stop // BLOCK)], out[start:stop]
        whole = len(values) // BLOCK
        edge = whole * BLOCK
        torch.mul(values[:edge].view(-1, BLOCK), scales[:whole, None], out=part[:edge].view(-1, BLOCK))
        torch.mul(values[edge:], scales[whole:], out=part[edge:])  # a short block, or nothing
    return out


def compress(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes (b,) uint8, nested absmax (⌈b/256⌉,) float32, offset () float32) of (b,) scales: double quantisation."""
    offset = absmax.mean()
    groups = F.pad(absmax - offset, (0, -len(absmax) % GROUP)).view(-1, GROUP)
    nested = groups.abs().amax(dim=1)
    scaled = (groups * nested.reciprocal()[:, None]).flatten()[: len(absmax)]
    scaled = scaled.nan_to_num(nan=-1, posinf=1, neginf=-1)  # of a group of equal scales, whose m and codes are 0
    step = ((scaled + 1) / 2 * GRID + 0.5).int()
    return _nearest((step.double() * 2 / GRID - 1).float(), DYNAMIC), nested, offset


def expand(codes: Tensor, nested: Tensor, offset: Tensor) -> Tensor:
    """(b,) float32 scales from what compress gives."""
    return DYNAMIC.to(codes.device).index_select(0, codes.int()) * nested.repeat_interleave(GROUP)[: len(codes)] + offset
