"""Numbers that go wrong in training: losses and gradients that are not finite, and those far above the usual."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean, pstdev

import torch
from torch import nn

from minilora.data.encoding import Example
from minilora.training.evaluation import evaluate

WINDOW = 32  # finite steps that say what is usual
LEAST = 8  # of them, before anything is unusual
DEVIATIONS = 6  # standard deviations above the mean that are a spike
LEAST_DEVIATION = 0.05  # of the mean, for losses that hardly vary
SHOWN = 5  # names spelled out before the rest is only counted


def find_nonfinite(model: nn.Module, examples: Sequence[Example]) -> tuple[list[str], list[str]]:
    """Where a step that was not finite went wrong: parameters whose gradient is not, and the examples' sources.

    The examples are those whose loss alone, without dropout, is not finite; all where it takes several of them together, or
    only the gradient fails.
    """
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    parameters = [name for name, gradient in trained.items() if not gradient.isfinite().all()]
    alone = [example for example in examples if not math.isfinite(evaluate(model, [example], progress=False).loss)]
    return parameters, [example.source for example in alone or examples if example.source]


def shortened(names: list[str]) -> str:
    """Names in a sentence: the first ones, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def is_spike(value: float, earlier: Sequence[float]) -> bool:
    """Whether a loss or gradient norm lies more than DEVIATIONS standard deviations above the mean of those before it."""
    if len(earlier) < LEAST:
        return False
    mean = fmean(earlier)
    return value > mean + DEVIATIONS * max(pstdev(earlier), LEAST_DEVIATION * mean)


@contextmanager
def named_anomalies(wanted: bool, step: int) -> Iterator[None]:
    """Autograd's anomaly detection inside a with statement: torch prints where the operation was called that gives a NaN.

    Raises:
        FloatingPointError: a backward gave a NaN; the operation is named.
    """
    try:
        with torch.autograd.set_detect_anomaly(wanted):
            yield
    except RuntimeError as error:
        if "returned nan values" not in str(error):
            raise
        raise FloatingPointError(f"step {step}: {error} It was called where the lines above say") from None
