"""Which tile each kernel runs with: a small table to read and to question, in place of a search at run time.

A search needs a GPU, repeats on every machine and makes results depend on timing noise; these rows are compiled for sm_80,
sm_89 and sm_90 by the tests, which hold each to no spilled register, to tensor cores and to the shared memory of its device.
Tiles are (rows, columns, depth of a step, warps, stages of loads in flight).
"""

from dataclasses import dataclass

PROGRAMS = 128  # what fills an A100 (108 processors), an H100 (132) or an RTX 4090 (128) once


@dataclass(frozen=True)
class Tile:
    """BM × BN is what one program works on, over the third dimension in steps of BK where there is one."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int


def for_gemm(arch: int, itemsize: int, M: int, N: int, rank: int, dropout: bool, aligned: bool) -> Tile:
    """arch as in sm_<arch>; itemsize of the operands in bytes; rank of the whole update; aligned: rows start at 16 bytes."""
    if not aligned:
        return Tile(64, 64, 32, 4, 3)  # loads of single numbers need registers for their addresses: more would spill
    if itemsize == 4:
        return Tile(128, 128, 32, 8, 3)
    small = Tile(64, 128, 64, 4, 3)
    if rank > 128 or -(-M // 128) * -(-N // 128) < PROGRAMS:
        return small  # few tokens: more processors have a tile; large ranks: registers are left for their loop
    square = Tile(128, 128, 64, 8, 3)  # 64 KB on sm_89, which has 99
    wide = Tile(128, 256, 64, 8, 3)  # a third fewer bytes from L2 than square
    if arch == 80 and (dropout or rank > 16):
        return square  # the mask, or the factors of more ranks, would spill some of wide
    if arch in (90, 100) and dropout and rank > 64:
        return square  # likewise the mask and a loop over ranks
    return wide if arch in (80, 90, 100) else square


def for_gemm_nf4(itemsize: int, M: int) -> Tile:
    """All rows of x, BM, are one tile; BK (BN where W is transposed) divides a block of 64 weights, which has one absmax."""
    if itemsize == 4:
        return Tile(16 if M <= 16 else 32, 32, 32, 4, 3)
    return Tile(16, 32, 64, 4, 4) if M <= 16 else Tile(32, 32, 64, 2, 4)


def dequantise_inside(M: int, K: int) -> bool:
    """Whether a product with M rows dequantises the weight as it reads it; else it is dequantised before, into a buffer.

    Inside, each row of tiles dequantises every weight again, in about 30 instructions: 0.24 clocks of a processor. The buffer
    takes them once, and 2 · itemsize bytes a weight written and read: 0.29 clocks on an H100 in 16 bits. So inside wins as long
    as 32 rows are one row of tiles, and more tokens share what is dequantised once. It needs rows of whole blocks.
    """
    return M <= 32 and K % 64 == 0


def for_down(arch: int, itemsize: int, dropout: bool) -> Tile:
    """BM rows of P by BN columns a step; bound by memory: enough loads in flight is all that it needs."""
    if itemsize == 4:
        return Tile(32, 64, 0, 4, 3)
    # With 64 rows an H100 multiplies by warp groups, in fewer instructions, and leaves Philox the time that memory takes.
    return Tile(64 if dropout and arch in (90, 100) else 32, 64, 0, 4, 4)


def for_outer(itemsize: int, aligned: bool) -> Tile:
    """BN columns of P by BM rows a step."""
    return Tile(64, 128, 0, 4, 3) if itemsize == 2 and aligned else Tile(32, 64, 0, 4, 3)


def for_sweep(itemsize: int) -> Tile:
    """BM rows of P by BN columns a step. Each BM rows leave a partial D behind, so they are many."""
    return Tile(256, 64, 0, 8, 3) if itemsize == 2 else Tile(64, 64, 0, 4, 2)


FOR_BLOCKS = Tile(16, 64, 0, 4, 3)  # BM blocks of 64 weights, quantised or dequantised whole; bound by memory, without a loop

SCALES = 512  # of blocks, that one program expands


def sweep_wins(itemsize: int, rank: int, aligned: bool) -> bool:
    """Whether reading P once for T and D moves fewer bytes than reading it twice.

    It saves itemsize · M · N and writes, then reads, ⌈M / BM⌉ partial D of N · rank float32 numbers. Rows that no load can
    take in pieces of 16 bytes would spill registers there.
    """
    return aligned and 8 * rank < itemsize * for_sweep(itemsize).BM


def split(programs: int, length: int, least: int) -> int:
    """Into how many shares of at least `least` a sum of `length` terms is cut, where `programs` alone leave processors idle."""
    return max(1, min(PROGRAMS // max(programs, 1), length // least))


# The elementwise kernels are bound by memory: 16 numbers a thread are two loads of 16 bytes in bfloat16 for each tensor, which
# keeps enough of them in flight, and leaves registers for what a norm holds of its row.

SWIGLU = Tile(1, 1024, 0, 4, 1)  # half as many numbers a thread: three tensors are read at once
# A turn's block of a row of logits. With 16 warps three rows share a processor: they keep enough loads in flight, and of 32,064
# logits in bfloat16 all rows that an H100 works on are 25 MB, so that L2 serves the second reading.
CROSS_ENTROPY = Tile(1, 4096, 0, 16, 1)


def for_row(C: int) -> tuple[int, int]:
    """(BC, warps) for a program that holds a row of C numbers; for 16 warps sm_90's assembler saves registers, and spills."""
    BC = _power_of_two(C)
    return BC, min(8, max(1, BC // 512))


def for_heads(H: int, D: int) -> tuple[int, int, int]:
    """(BH, BD, warps) for a program that turns BH of H heads of D numbers: 2,048 numbers, where there are as many."""
    BD = _power_of_two(D)
    return min(_power_of_two(H), max(1, 2048 // BD)), BD, 4


def _power_of_two(n: int) -> int:
    """The first from n on."""
    return 1 << (n - 1).bit_length()
