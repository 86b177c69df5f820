"""One training step as it is and through torch.compile, whole and without a graph break, on this machine's CPU.

Both take turns in one process, on the same weights, adapters and tokens: forward, loss and every gradient.
"""

import json
import os
import statistics
import tempfile
import time

import torch
from torch import nn

from benchmarks import protocol
from benchmarks.peers.case import SEED, Case, make

CASES = (Case("small"), Case("slice"), Case("slice", dropout=0.05))
ROUNDS = 5
INDUCTOR = {"backend": "inductor", "options": {"fallback_random": True}}  # dropout's seeds are then those of the plain step


def main() -> None:
    """All cases, about ten minutes on two CPU cores; nothing that was compiled before is used again."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        protocol.write("compiled", [measure(case) for case in CASES])


def measure(case: Case, rounds: int = ROUNDS, how: dict = INDUCTOR) -> dict:
    """Seconds of a step each way, their ratio within the rounds, and how far loss and gradients are apart.

    Args:
        how: torch.compile's backend and options.
    """
    model, ids = make(case)
    ways = {"eager": model, "compiled": torch.compile(model, fullgraph=True, **how)}
    first = {name: step(way, model, ids) for name, way in ways.items()}
    seconds = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name].append(step(way, model, ids)[0])
    row = {"model": case.model, "tokens": case.tokens, "dropout": case.dropout, "seconds_first": first["compiled"][0]}
    row |= {f"seconds_{name}": statistics.median(found) for name, found in seconds.items()}
    ratios = [compiled / eager for compiled, eager in zip(seconds["compiled"], seconds["eager"], strict=True)]
    row |= {"compiled_over_eager": statistics.median(ratios), "error": distance(*(found[1] for found in first.values()))}
    print(json.dumps(row), flush=True)
    return row


def step(way: nn.Module, model: nn.Module, ids: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Seconds, and the loss and all gradients in one vector; the same dropout each time."""
    torch.manual_seed(SEED)
    started = time.perf_counter()
    loss = way(ids, labels=ids)
    loss.backward()
    seconds = time.perf_counter() - started
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.requires_grad]
    model.zero_grad(set_to_none=True)
    return seconds, torch.cat([loss.detach()[None], *gradients])


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())
