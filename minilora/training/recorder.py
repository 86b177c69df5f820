"""What a run tells and keeps: its settings, log.jsonl, evaluations, checkpoints and the adapter at the end."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean

import torch
from torch import nn

from minilora.adapters.adapter_files import load_adapter, save_adapter
from minilora.adapters.switching import adapters_of
from minilora.data.encoding import Example
from minilora.files import remove_folder, remove_leftovers, write_file
from minilora.reporting.tracking import Tracker, figures_of, open_trackers
from minilora.training.checkpoint import checkpoint_folder, find_checkpoints, load_checkpoint, save_checkpoint
from minilora.training.config import Strategy, TrainConfig
from minilora.training.distributed import broadcast, rank, train_batch_size, wait_for_all
from minilora.training.evaluation import evaluate
from minilora.training.fingerprint import fingerprint
from minilora.training.memory import peak_memory
from minilora.training.numerics import WINDOW, find_nonfinite, is_spike, shortened
from minilora.training.questions import Questions, Sample, measure, told

SETTINGS = "training_args.json"  # in output_dir: the TrainConfig


@dataclass
class TrainResult:
    """What a run did, before and after it was resumed; `log` holds the lines of log.jsonl."""

    steps: int = 0
    seconds: float = 0.0  # of training, evaluations and saves left out
    tokens: int = 0  # that passed through the model, padding left out
    skipped: int = 0  # steps that changed nothing, since loss or gradient was not finite
    log: list[dict] = field(default_factory=list)


def best_evaluation(log: Sequence[dict], config: TrainConfig) -> dict | None:
    """The line of the best evaluation by config.metric_for_best_model, the first of equals; NaN is worse than any."""
    metric, sign = config.best_metric, -1 if config.best_is_greatest else 1
    evaluations = [line for line in log if metric in line]
    return min(evaluations, key=lambda line: (math.isnan(line[metric]), sign * line[metric]), default=None)


@dataclass
class Recorder:
    """Keeps a run's result as it grows, in memory and in output_dir where there is one; the rest is as in train."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    dataset: Sequence[Example]
    config: TrainConfig
    eval_dataset: Sequence[Example] | None
    questions: Questions | None
    output_dir: Path | None
    base: str | None
    progress: bool
    result: TrainResult = field(default_factory=TrainResult)
    trackers: list[Tracker] = field(default_factory=list)
    recent: dict[str, list] = field(default_factory=lambda: {"loss": [], "grad_norm": []})  # of the last steps: what is usual

    @cached_property
    def fingerprint(self) -> dict:
        """What the run's checkpoints are known by."""
        return fingerprint(self.model, self.config, self.dataset, self.eval_dataset)

    @property
    def writes(self) -> bool:
        """Whether this process writes: there is an output_dir, and it is rank 0."""
        return self.output_dir is not None and rank() == 0

    @cached_property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    # Beginning and end

    def start(self, checkpoint: Path | None) -> tuple[int, int]:
        """Takes up the run where the checkpoint left it, or begins it; returns the epoch and batch to begin with."""
        place = 0, 0
        if checkpoint:
            progress = load_checkpoint(checkpoint, self.model, self.optimizer, self.schedule, self.fingerprint)
            self.result, self.recent, place = TrainResult(**progress["result"]), progress["recent"], progress["place"]
            self._check_best_is_there(checkpoint)
        if self.writes:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            for name in ("log.jsonl", SETTINGS, "checkpoint-*", "adapter"):
                remove_leftovers(self.output_dir, name)
            settings = asdict(self.config)
            write_file(self.output_dir / SETTINGS, json.dumps(settings, indent=2) + "\n")
            self.trackers = open_trackers(self.config, self.output_dir, settings, self.result.steps)
            write_file(self.output_dir / "log.jsonl", "".join(json.dumps(line) + "\n" for line in self.result.log))
        if not self.result.log and (samples := self._ask()):  # what cannot be answered is told before the first step, too
            self._log({"step": 0, "samples": told(samples)})
        return tuple(place)

    def close(self) -> None:
        """Ends the watching, however the run ended."""
        for tracker in self.trackers:
            tracker.close()

    def finish(self) -> None:
        """Saves the adapter; that of the best evaluation if the config asks for it, which the model then has too."""
        best = self.config.load_best_model_at_end and self._best_step()
        if best and best != self.result.steps:
            if self.writes:  # the others may be on a machine without that folder
                load_adapter(self.model, checkpoint_folder(self.output_dir, best), adapter_name=adapters_of(self.model).active)
            broadcast(parameter for parameter in self.model.parameters() if parameter.requires_grad)
        self.save_adapter()

    def save_adapter(self) -> None:
        if self.writes:
            save_adapter(self.model, self.output_dir / "adapter", self.base)
        wait_for_all()

    # Steps

    def step(self, line: dict, tokens: int, seconds: float, examples: Sequence[Example], last: bool) -> None:
        """Notes a step that was taken, and evaluates where that is due.

        Args:
            line: step, loss, learning_rate and grad_norm.
        """
        config, result, step = self.config, self.result, line["step"]
        result.steps, result.seconds, result.tokens = step, result.seconds + seconds, result.tokens + tokens
        if math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]):
            if step % config.logging_steps == 0 or last:
                speed = {"tokens_per_second": round(tokens / seconds, 1), "memory": peak_memory(self.device)}
                self._log(line | {"tokens": result.tokens, "seconds": round(result.seconds, 3)} | speed)
            self._log_spikes(line, examples)
        if self.eval_dataset and (last or self._is_due(config.eval_strategy, config.eval_steps)):
            self._evaluate(step)

    def _evaluate(self, step: int) -> None:
        found = evaluate(self.model, self.eval_dataset, self.config.per_device_eval_batch_size, self.progress)
        line = {"step": step, "eval_loss": found.loss, "eval_perplexity": found.perplexity}
        if samples := self._ask():
            line |= measure(samples, self.config.eval_metrics) | {"samples": told(samples)}
        self._log(line)

    def _ask(self) -> list[Sample]:
        """The answers to the first config.eval_samples questions; none where nothing is asked."""
        if not self.questions:
            return []
        config = self.config
        asked = replace(self.questions, conversations=self.questions.conversations[: config.eval_samples])
        return asked.ask(self.model, config.eval_max_new_tokens, config.per_device_eval_batch_size, self.progress and rank() == 0)

    def _log_spikes(self, line: dict, examples: Sequence[Example]) -> None:
        for what, earlier in self.recent.items():
            if is_spike(line[what], earlier):
                sources = [example.source for example in examples if example.source]
                spike = {"step": line["step"], "spike": what, "value": line[what], "usual": fmean(earlier)}
                self._log(spike | {"examples": sources})
            self.recent[what] = [*earlier, line[what]][-WINDOW:]

    def nonfinite(self, line: dict, examples: Sequence[Example]) -> None:
        """Logs and counts a step that is left out, or ends the run, as the config says."""
        step, (parameters, sources) = line["step"], find_nonfinite(self.model, examples)
        if self.config.on_nonfinite == "skip":
            self.result.skipped += 1
            figures = {"skipped": self.result.skipped, "not_finite": f"loss {line['loss']}, gradient norm {line['grad_norm']}"}
            self._log({"step": step} | figures | {"parameters": parameters, "examples": sources})
            return
        self.save_adapter()
        of = f", not finite in the gradient of {shortened(parameters)}" if parameters else ""
        on = f", on {shortened(sources)}" if sources else ""
        saved = f", saved in {self.output_dir / 'adapter'}" if self.output_dir else ""
        raise FloatingPointError(
            f"step {step}: loss {line['loss']} and gradient norm {line['grad_norm']} must be finite{of}{on}; the weights stay "
            f"those of step {step - 1}{saved}. Lower learning_rate, or look at the data"
        )

    def _log(self, line: dict) -> None:
        self.result.log.append(line)
        if figures := figures_of(line):
            for tracker in self.trackers:
                tracker.log(line["step"], figures)
        if self.writes:
            with open(self.output_dir / "log.jsonl", "a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")

    def _is_due(self, strategy: Strategy, every: int) -> bool:
        """Whether the step just taken is one of every so many, or ended an epoch, as the strategy has it."""
        step = self.result.steps
        if strategy == "epoch":
            return self._place(step)[0] > self._place(step - 1)[0]
        return strategy == "steps" and every > 0 and step % every == 0

    def _place(self, steps: int) -> tuple[int, int]:
        """The epoch and the batch in it that come after so many steps."""
        batches_an_epoch = math.ceil(len(self.dataset) / train_batch_size(self.config))
        return divmod(steps * self.config.gradient_accumulation_steps, batches_an_epoch)

    def out_of_patience(self) -> bool:
        """Whether the last early_stopping_patience evaluations were all no better than one before them."""
        evaluations, patience = [line for line in self.result.log if "eval_loss" in line], self.config.early_stopping_patience
        if not patience or not evaluations:
            return False
        return len(evaluations) - 1 - evaluations.index(best_evaluation(evaluations, self.config)) >= patience

    # Checkpoints

    def save_if_due(self, now: bool) -> None:
        """Saves a checkpoint where the config says, of the best evaluation so far, and now if so asked."""
        config, step = self.config, self.result.steps
        best = config.load_best_model_at_end and self._best_step() == step
        if self.output_dir and (now or best or self._is_due(config.save_strategy, config.save_steps)):
            fingerprint = self.fingerprint  # which all processes find together
            if self.writes:
                self._save_checkpoint(checkpoint_folder(self.output_dir, step), fingerprint)
            wait_for_all()

    def _save_checkpoint(self, folder: Path, fingerprint: dict) -> None:
        """Saves one, and then removes those before it but the latest save_total_limit and the best."""
        result, config = self.result, self.config
        progress = {"place": self._place(result.steps), "recent": self.recent, "result": asdict(result)}
        save_checkpoint(folder, self.model, self.optimizer, self.schedule, fingerprint, progress, self.base)
        found = find_checkpoints(self.output_dir)
        old = found[: found.index(folder) + 1][: -config.save_total_limit]
        best = config.load_best_model_at_end and checkpoint_folder(self.output_dir, self._best_step())
        for earlier in old:
            if earlier != best:
                remove_folder(earlier)

    def _best_step(self) -> int:
        """The step of the best evaluation; 0 before the first."""
        return (best_evaluation(self.result.log, self.config) or {"step": 0})["step"]

    def _check_best_is_there(self, checkpoint: Path) -> None:
        best = self.config.load_best_model_at_end and self._best_step()
        if self.writes and best and checkpoint_folder(self.output_dir, best) not in find_checkpoints(self.output_dir):
            raise FileNotFoundError(
                f"{checkpoint} needs the best one, checkpoint-{best}, in {self.output_dir}: copy it there too"
            )
