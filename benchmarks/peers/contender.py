"""One library through one case after another: its process, its steps, and the row that comes of them."""

import dataclasses
import time
from pathlib import Path
from statistics import median

from safetensors.torch import load_file

from benchmarks import protocol
from benchmarks.peers.case import ALPHA, SEED, Case
from benchmarks.peers.environments import LIBRARIES
from benchmarks.peers.process import Process
from tests.helpers import rms_error

SAME = 1e-3  # the largest RMS error of loss and gradients that counts as the same computation; zeros have 1


class Contender:
    """A library's module in this folder, with the Python of its environment.

    Every step of a case goes through `attempt`: what fails is told in the row, and ends the process and the case for the library.
    """

    def __init__(self, module: str, python: Path, folder: Path):
        self.module, self.python, self.folder = module, python, folder
        self.process, self.environment = None, {}

    def begin(self, case: Case) -> None:
        """A new row."""
        self.case, self.steps, self.floors = case, [], []
        self.row = {"library": LIBRARIES[self.module].name, "device": protocol.machine()["cpu"]}
        self.row |= dataclasses.asdict(case) | self.environment

    def attempt(self, part, *arguments) -> None:
        """Does a part of the case, unless an earlier one failed."""
        if "failed" in self.row:
            return
        try:
            part(*arguments)
        except RuntimeError as error:
            self.row["failed"] = str(error)
            self.close()

    def load(self, checkpoint: Path, start: Path) -> None:
        """Loads the model and takes a first step, the process's start included where there is none yet."""
        fresh = self.process is None
        if fresh:
            self.process = Process(self.module, self.python, self.case.threads, self.folder / f"{self.module}.log")
        settings = {"r": self.case.r, "alpha": ALPHA, "dropout": self.case.dropout, "seed": SEED}
        self.row |= self.process.ask("load", folder=str(checkpoint), start=str(start), **settings)
        self.row |= self.process.ask("first_step", to=str(self.gradients))
        if fresh:
            self.row["seconds_to_first_step"] = round(time.perf_counter() - self.process.started, 2)
            self.row["seconds_import"] = {name: round(seconds, 2) for name, seconds in self.process.seconds_import.items()}
            self.environment = self.process.ask("installed", names=LIBRARIES[self.module].distributions)
            self.row |= self.environment

    @property
    def gradients(self) -> Path:
        return self.folder / f"{self.module}.gradients.safetensors"

    def check(self, reference: "Contender") -> None:
        """Finds how far the first step's loss and gradients are from the reference's.

        Raises:
            RuntimeError: they are farther than SAME.
        """
        if "failed" in reference.row:
            raise RuntimeError(f"there is nothing to compare it with: {reference.row['failed']}")
        ours, theirs = load_file(reference.gradients), load_file(self.gradients)
        errors = {}  # the largest over the layers, for each projection's A and B
        for path, gradient in ours.items():
            name = ".".join(path.split(".")[-2:])
            errors[name] = max(errors.get(name, 0.0), rms_error(theirs[path], gradient))
        self.row["loss_error"] = abs(self.row["loss"] / reference.row["loss"] - 1)
        self.row["gradient_error"] = max(errors.values())
        self.row["gradient_errors"] = errors
        if max(self.row["loss_error"], self.row["gradient_error"]) > SAME:
            raise RuntimeError("it computes something else: see loss_error and gradient_errors")

    def turn(self) -> None:
        """One step, and the floor beside it."""
        self.steps.append(self.process.ask("step"))
        self.floors.append(self.process.ask("floor"))

    def summarise(self, reference: "Contender") -> None:
        """Medians over the rounds, of seconds and of the ratios within each round."""
        for kind in ("wall", "cpu"):
            step, floor = [found[kind] for found in self.steps], [found[kind] for found in self.floors]
            self.row |= {f"{kind}_seconds": median(step), f"{kind}_seconds_floor": median(floor), f"{kind}_rounds": step}
            self.row[f"{kind}_over_floor"] = median(a / b for a, b in zip(step, floor, strict=True))
            if len(reference.steps) == len(step):
                self.row[f"{kind}_over_ours"] = median(a / b[kind] for a, b in zip(step, reference.steps, strict=True))

    def outcome(self) -> str:
        """What is known of the case by now, in a line."""
        row, text = self.row, f"  {self.row['library']:20}"
        if "failed" in row:
            return f"{text} failed: {row['failed']}"
        if "wall_over_floor" in row:
            return f"{text} {row['wall_seconds']:.3f} s, {row['wall_over_floor']:.2f} × the floor"
        return f"{text} loss {row['loss']:.6f}, RMS error of the gradients at most {row['gradient_error']:.0e}"

    def close(self) -> None:
        if self.process is not None:
            self.process.close()
            self.process = None
