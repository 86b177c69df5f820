"""The same LoRA training step by minilora and by other libraries: what it computes, what it takes, and how that grows.

Model, weights, data, the adapters' start and all settings are the same; each library has an environment and a process of its
own, and every round takes one step in each of them in turn. A step's time is told as a multiple of the floor too: its frozen
products at the rate of torch.mm, timed in the same process and round.

Needs 16 GB of memory and 9 GB of disk in the cache folder, and a quiet machine; `--quick` is to try the benchmark itself.
"""

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import protocol
from benchmarks.peers.case import Case, write_checkpoint, write_start
from benchmarks.peers.contender import Contender
from benchmarks.peers.environments import LIBRARIES, environment
from benchmarks.peers.tables import tables

QUICK = ("ours", "loralib_layers", "transformers_peft")  # what the environment of the tests has


def main(arguments: list[str] | None = None) -> None:
    """Measures what the options ask for; keeps the rows as JSON and the tables as Markdown, and prints the tables."""
    options = parser().parse_args(arguments)
    if options.quick:
        pythons, failed = {module: Path(sys.executable) for module in QUICK}, []
        groups = [[Case("tiny", 16, threads=1), Case("tiny", 16, dropout=0.05, threads=1)]]
    else:
        (pythons, failed), groups = environments(), plan(options)
    rows = failed
    with tempfile.TemporaryDirectory() as folder:
        for cases in groups:
            rows += measure(cases, pythons, options.rounds, Path(folder))
            if not options.quick:  # each time, since a run takes long
                protocol.write("peers", rows)
    if options.quick:
        print(tables(rows))
    else:
        protocol.write_table("peers", tables(rows))


def parser() -> argparse.ArgumentParser:
    """Its help is the list of all that can be asked for."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks peers",
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    models = ["small", "slice", "growth"]
    parser.add_argument("--models", nargs="+", choices=models, default=models, help="135M; two of Phi-3-mini's layers; growth")
    parser.add_argument("--sequences", nargs="+", type=int, default=[256, 1024], help="tokens: two of the first, one of others")
    parser.add_argument(
        "--dropouts",
        nargs="+",
        type=float,
        default=[0.0, 0.05],
        help="of the adapters; longer sequences take the first",
    )
    parser.add_argument("--threads", nargs="+", type=int, default=[2], help="of torch")
    parser.add_argument("--rounds", type=int, default=3, help="steps that are timed")
    parser.add_argument("--quick", action="store_true", help="a tiny model, libraries as installed here, nothing written")
    return parser


def environments() -> tuple[dict[str, Path], list[dict]]:
    """The Python of every library's environment, and a row for each that cannot be made."""
    pythons, failed = {}, []
    for module, library in LIBRARIES.items():
        try:
            pythons[module] = environment(module)
        except RuntimeError as error:
            failed.append({"library": library.name, "failed": str(error)})
    return pythons, failed


def plan(options: argparse.Namespace) -> Iterator[list[Case]]:
    """The cases, in groups that share their processes. Growth changes one thing at a time: tokens, rank, layers.

    Of longer sequences there is one, since five libraries hold what a step of it takes at once.
    """
    models = [name for name in options.models if name != "growth"]
    tokens, *longer = options.sequences
    for threads in options.threads:
        for model in models:
            yield from ([Case(model, tokens, dropout, threads)] for dropout in options.dropouts)
        if "growth" in options.models:
            base = Case("4 layers", threads=threads)
            changes = {"tokens": 64}, {"tokens": 1024}, {"r": 64}, {"model": "8 layers"}
            yield [base, *(dataclasses.replace(base, **change) for change in changes)]
        for length in longer:
            yield from ([Case(model, length, options.dropouts[0], threads, batch=1)] for model in models)


def measure(cases: list[Case], pythons: dict[str, Path], rounds: int, folder: Path) -> list[dict]:
    """The rows of some cases, with one process for each library.

    All load and take a first step; where there is no dropout, its loss and gradients are compared with ours, which comes first;
    then every round takes a step of each. A library that fails, or computes something else, has a row that says so.
    """
    contenders, rows = [Contender(module, python, folder) for module, python in pythons.items()], []
    ours = contenders[0]
    try:
        for case in cases:
            print(f"\n{case}", flush=True)
            inputs = write_checkpoint(case.model), write_start(case, folder)
            for contender in contenders:
                contender.begin(case)
                contender.attempt(contender.load, *inputs)
            for contender in contenders if not case.dropout else ():
                contender.attempt(contender.check, ours)
                print(contender.outcome(), flush=True)
            for _ in range(rounds):
                for contender in contenders:
                    contender.attempt(contender.turn)
            for contender in contenders:
                contender.attempt(contender.summarise, ours)
                print(contender.outcome(), flush=True)
            rows += [contender.row for contender in contenders]
    finally:
        for contender in contenders:
            contender.close()
    return rows
