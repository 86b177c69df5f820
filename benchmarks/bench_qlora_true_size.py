"""Phi-3-mini at its true size over a 4-bit base: memory and seconds against transformers, PEFT and bitsandbytes.

Needs 8 GB of disk and 12 GB of memory (which the others take), and takes many minutes on two CPU cores.
"""

import tempfile
from pathlib import Path

from benchmarks import bench_qlora, bench_true_size, protocol
from minilora import phi3

# What each side does best on a CPU; bitsandbytes takes 48 times as long in bfloat16.
COMPUTE = dict(zip(bench_qlora.SIDES, ("bfloat16", "float32"), strict=True))


def main(config: phi3.Phi3Config = bench_true_size.PHI_3_MINI, name: str = "qlora_true_size") -> None:
    """Random weights, the same ones for both; a narrower config, under another name, to try it."""
    with tempfile.TemporaryDirectory() as folder:
        written = bench_true_size.write_checkpoint(config, Path(folder), bench_true_size.SHARD_BYTES)
        protocol.write(name, [{"part": "checkpoint"} | written, *bench_qlora.memory(Path(folder), COMPUTE)])
