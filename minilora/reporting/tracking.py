"""Where a run is watched from outside, beside log.jsonl: TensorBoard and Weights & Biases, under transformers' names."""

import math
from pathlib import Path
from typing import Protocol

from minilora.training.config import TrainConfig


class Tracker(Protocol):
    """Takes the figures of a run as they come. Neither waits for disk or network: both hand them to a thread of their own."""

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Figures of one step, by their names as train/… and eval/…"""

    def close(self) -> None:
        """Ends the watching when all is written."""


class TensorBoard:
    """Event files in OUTPUT/tensorboard: `tensorboard --logdir OUTPUT`.

    Args:
        done: steps before this run; figures of later ones, from a run that was ended, are no longer shown.
    """

    def __init__(self, output_dir: Path, settings: dict, done: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(output_dir / "tensorboard", purge_step=done + 1 if done else None)
        self.writer.add_text("settings", "\n\n".join(f"{name} = {value!r}" for name, value in settings.items()))

    def log(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run named after the output folder. Project, mode (offline, say) and a run to go on with are WANDB_… variables, as ever.

    Raises:
        ValueError: wandb takes no run, since nobody is logged in, say.
    """

    def __init__(self, output_dir: Path, settings: dict, done: int):
        import wandb

        try:
            self.run = wandb.init(dir=output_dir, name=output_dir.resolve().name, config=settings)
        except wandb.Error as error:
            raise ValueError(f"Weights & Biases took no run ({error}): wandb login, or WANDB_MODE=offline") from None

    def log(self, step: int, figures: dict[str, float]) -> None:
        self.run.log(figures, step=step)

    def close(self) -> None:
        self.run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def open_trackers(config: TrainConfig, output_dir: Path, settings: dict, done: int) -> list[Tracker]:
    """The trackers that config.report_to names; their packages must be installed (minilora.extras)."""
    return [TRACKERS[name](output_dir, settings, done) for name in config.trackers]


def figures_of(line: dict) -> dict[str, float]:
    """The finite numbers in a line of the log, as transformers names them: loss is train/loss, eval_loss eval/loss.

    None of a spike's, which are those of its step.
    """
    numbers = {name: value for name, value in line.items() if isinstance(value, int | float) and name != "step"}
    named = {name.replace("eval_", "eval/") if "eval_" in name else f"train/{name}": value for name, value in numbers.items()}
    return {} if "spike" in line else {name: value for name, value in named.items() if math.isfinite(value)}
