"""How the GPU benchmarks time: ways of one computation in turn, by CUDA events, each run after all else has left the L2 cache.

On a CPU the same functions run with its clock, so that tests can call what a GPU will run.
"""

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from statistics import quantiles

import torch
from torch import Tensor

from benchmarks import protocol

WARMUP, ROUNDS = 5, 50
FLUSH = 2**30  # bytes written before each run: more than any L2 holds, and 0.4 ms on an H100, in which the host runs ahead
TOLERANCE = 2e-2  # of bfloat16, in RMS(error) / RMS(reference); zeros have 1


def require_cuda(name: str) -> None:
    """Ends the process, as one that did what it could, where there is no GPU to measure."""
    if not torch.cuda.is_available():
        print(f"benchmarks {name} measures a GPU, and torch sees no CUDA device here: run it on a machine with one")
        sys.exit(0)


class Clock:
    """Marks on a device's stream, or of a CPU's clock."""

    def __init__(self, device: str):
        self.cuda = torch.device(device).type == "cuda"

    def mark(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start, end) -> float:
        """Between two marks; waits for the device."""
        if not self.cuda:
            return (end - start) * 1e3
        end.synchronize()
        return start.elapsed_time(end)


def paired(
    runs: dict[str, Callable[[], None]], device: str, warmup: int = WARMUP, rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """Milliseconds of each run in every round; a round takes each of them once, in turn."""
    clock, marks = Clock(device), {name: [] for name in runs}
    cache = torch.empty(FLUSH if clock.cuda else 0, dtype=torch.uint8, device=device)
    for _ in range(warmup + rounds):
        for name, run in runs.items():
            cache.zero_()
            start = clock.mark()
            run()
            marks[name].append((start, clock.mark()))
    return {name: [clock.milliseconds(*pair) for pair in pairs[warmup:]] for name, pairs in marks.items()}


@dataclass(frozen=True)
class Problem:
    """A computation on some tensors, ours and its reference's, which torch.compile gets too.

    Args:
        row: what the results say of it.
        inputs: of both functions; those that ask for a gradient are differentiated to.
        least: bytes that a run must move at least, forward and backward.
        others: further ways, by their names.
    """

    row: dict
    ours: Callable[..., Tensor | tuple[Tensor, ...]]
    reference: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]
    least: int
    others: dict[str, Callable] | None = None

    @property
    def leaves(self) -> list[Tensor]:
        return [tensor for tensor in self.inputs if tensor.requires_grad]

    @cached_property
    def gradients(self) -> list[Tensor]:
        """Of the results, random; none where nothing asks for a gradient."""
        return [torch.randn_like(output) for output in _tuple(self.reference(*self.inputs))] if self.leaves else []

    def ways(self) -> dict[str, Callable]:
        ways = {"ours": self.ours, "eager": self.reference, "torch_compile": torch.compile(self.reference)}
        return ways | (self.others or {})

    def step(self, function: Callable) -> None:
        """Forward, and backward where something asks for a gradient."""
        for leaf in self.leaves:
            leaf.grad = None
        outputs = _tuple(function(*self.inputs))
        if self.leaves:
            torch.autograd.backward(outputs, self.gradients)

    def error(self) -> float:
        """The largest RMS error of ours, results and gradients, over the RMS of the reference in float64."""
        doubles = [_double(tensor) for tensor in self.inputs]
        found = []
        for function, inputs in ((self.ours, self.inputs), (self.reference, doubles)):
            outputs = _tuple(function(*inputs))
            leaves = [tensor for tensor in inputs if tensor.requires_grad]
            upstream = [gradient.to(output.dtype) for gradient, output in zip(self.gradients, outputs, strict=False)]
            of_leaves = torch.autograd.grad(outputs, leaves, upstream) if leaves else []
            found.append([tensor.detach().double() for tensor in (*outputs, *of_leaves)])
        return max(float((ours - expected).norm() / expected.norm()) for ours, expected in zip(*found, strict=True))


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else tensor


def measure(problem: Problem, device: str, **counts: int) -> list[dict]:
    """A row for each way.

    Raises:
        ValueError: ours computes something else than the reference; nothing was timed.
    """
    error = problem.error()
    if not error < TOLERANCE:
        raise ValueError(f"{problem.row}: ours is off by {error:.1e}; nothing was timed")
    runs = {name: partial(problem.step, function) for name, function in problem.ways().items()}
    rows = []
    for name, found in paired(runs, device, **counts).items():
        _, low, _, _, middle, _, _, high, _ = quantiles(found, n=10, method="inclusive")
        rate = problem.least / middle / 1e6
        rows.append(problem.row | {"way": name, "ms_p20": low, "ms_p50": middle, "ms_p80": high, "least_gb_per_s": rate})
        rows[-1]["peak_bytes"] = peak_bytes(runs[name], device)
        print(*problem.row.values(), f"{name}: {middle:.3f} ms, {rate:.0f} GB/s", flush=True)
    return rows


def peak_bytes(run: Callable[[], None], device: str) -> int | None:
    """Of memory that a run takes over what there is before; None for a CPU, whose memory nobody counts."""
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def main(name: str, problems: Callable[[str], Iterable[Problem]]) -> None:
    """Writes results/NAME.json, a row for each problem and way; ends where there is no GPU."""
    require_cuda(name)
    protocol.write(name, [row for problem in problems("cuda") for row in attempt(problem, "cuda")])


def attempt(problem: Problem, device: str) -> list[dict]:
    """The rows of measure, or one that says why there are none: ours is wrong, or a way wants more memory than there is."""
    try:
        return measure(problem, device)
    except (ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        print(*problem.row.values(), f"failed: {reason}", flush=True)
        return [problem.row | {"failed": reason}]
