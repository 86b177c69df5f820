"""The training loop: batches, loss on the assistant's tokens, AdamW on the adapter, a log, and adapters saved on the way."""

import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from minilora.adapter import check_replaceable, save_adapter
from minilora.config import TrainConfig
from minilora.data import Example, collate, shuffled_batches
from minilora.evaluation import evaluate
from minilora.kernels.cross_entropy import IGNORE
from minilora.loraplus import parameter_groups
from minilora.packing import pack
from minilora.trainable import lora_state_dict


@dataclass
class TrainResult:
    """What a run did; `log` holds the lines of log.jsonl."""

    steps: int
    seconds: float  # of training, evaluations and saves left out
    tokens: int  # that passed through the model, padding left out
    log: list[dict] = field(default_factory=list)


def train(
    model: nn.Module,
    dataset: Sequence[Example],
    config: TrainConfig,
    eval_dataset: Sequence[Example] | None = None,
    output_dir: Path | str | None = None,
    base: str | None = None,
    progress: bool = True,
) -> TrainResult:
    """Trains whatever parameters of the model ask for gradients; the same seed on the same machine ends bitwise the same.

    A step's gradient is that of the mean loss over all target tokens of its batches, however they are split.

    Args:
        model: maps input_ids and labels (B, T) to the mean loss, as Phi3ForCausalLM does; with config.packing also given an
            attention_mask (B, T), which numbers the documents of each row.
        eval_dataset: evaluated every config.eval_steps, and at the end.
        output_dir: takes log.jsonl, checkpoint-STEP/ every config.save_steps, and adapter/ at the end; None writes nothing.
        base: name of the base model, noted in the saved adapters.

    Raises:
        ValueError: there is no data, a conversation is too long to be packed, nothing to train, something trained that no
            adapter holds, or no activation checkpointing to turn on.
        FloatingPointError: a loss or gradient is not finite. The last good adapter is in the model, and in output_dir/adapter.
    """
    _check(model, dataset, output_dir)
    _set_gradient_checkpointing(model, config.gradient_checkpointing)
    torch.manual_seed(config.seed)
    rows = pack(dataset, config.max_seq_length) if config.packing else dataset
    total = total_steps(len(rows), config)
    groups = parameter_groups(model, config.learning_rate, config.loraplus_lr_ratio)
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, total, config))
    batches = shuffled_batches(rows, config.per_device_train_batch_size, config.seed)
    recorder = _Recorder(model, config, eval_dataset, output_dir and Path(output_dir), base, progress)
    model.train()
    with tqdm(total=total, desc="train", unit="step", disable=not progress) as bar:
        for step in range(1, total + 1):
            learning_rate, started = schedule.get_last_lr()[0], time.perf_counter()
            loss, tokens = accumulate_gradients(model, list(islice(batches, config.gradient_accumulation_steps)))
            norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).item()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                recorder.save("adapter")
                raise FloatingPointError(
                    f"step {step}: loss {loss} and gradient norm {norm} must be finite; the weights stay those of step {step - 1}"
                    + (f", saved in {recorder.folder / 'adapter'}" if recorder.folder else "")
                    + ". Lower learning_rate, or look at the data"
                )
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            recorder.step(step, total, loss, norm, learning_rate, tokens, time.perf_counter() - started, bar)
    model.eval()
    recorder.save("adapter")
    return recorder.result


def _check(model: nn.Module, dataset: Sequence[Example], output_dir: Path | str | None) -> None:
    """Everything that would spoil a run is told before its first step."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not dataset or not trained:
        raise ValueError("training needs at least one conversation and one trainable parameter (mark_only_lora_as_trainable)")
    if output_dir and not any("lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("output_dir takes adapters, and the model has none: inject one first")
    if output_dir:
        lost = set(trained) - lora_state_dict(model).keys()
        if lost:
            raise ValueError(f"output_dir takes adapters only, and would lose what else is trained: {', '.join(sorted(lost))}")
    if output_dir:
        check_replaceable(Path(output_dir, "adapter"))


def _set_gradient_checkpointing(model: nn.Module, wanted: bool) -> None:
    able = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    if wanted and not able:
        raise ValueError("gradient_checkpointing needs a model with a module that has that attribute, and this one has none")
    for module in able:
        module.gradient_checkpointing = wanted


def total_steps(examples: int, config: TrainConfig) -> int:
    """Steps of a whole run: max_steps, or else the epochs' batches gathered by gradient_accumulation_steps."""
    if config.max_steps != -1:
        return config.max_steps
    batches = math.ceil(examples / config.per_device_train_batch_size) * config.num_train_epochs
    return math.ceil(batches / config.gradient_accumulation_steps)


def rate(step: int, total: int, config: TrainConfig) -> float:
    """The share of the peak learning rate at a step counted from 0: a linear rise, then a cosine or linear fall to 0 at total."""
    warmup = math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    left = (total - step) / max(1, total - warmup)
    return left if config.lr_scheduler_type == "linear" else (1 - math.cos(math.pi * left)) / 2


def accumulate_gradients(model: nn.Module, batches: list[list[Example]]) -> tuple[float, int]:
    """Adds the gradient of the mean loss over all target tokens of all batches; returns that loss and all tokens seen."""
    device = next(model.parameters()).device
    collated = [collate(batch) for batch in batches]
    counts = [int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in collated]
    loss = 0.0
    for batch, count in zip(collated, counts, strict=True):
        share = model(**{name: tensor.to(device) for name, tensor in batch.items()}) * (count / sum(counts))
        share.backward()
        loss += share.item()
    return loss, sum(len(example.ids) for batch in batches for example in batch)


class _Recorder:
    """Everything a run tells: the progress bar, log.jsonl, evaluations, and adapters on disk."""

    def __init__(self, model, config: TrainConfig, eval_dataset, folder: Path | None, base, progress: bool):
        self.model, self.config, self.eval_dataset = model, config, eval_dataset
        self.folder, self.base, self.progress = folder, base, progress
        self.checkpoints = []  # names of this run's, the oldest first
        self.result = TrainResult(steps=0, seconds=0.0, tokens=0)
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "log.jsonl").write_text("")

    def step(self, step, total, loss, norm, learning_rate, tokens, seconds, bar) -> None:
        config, result = self.config, self.result
        result.steps, result.seconds, result.tokens = step, result.seconds + seconds, result.tokens + tokens
        bar.set_postfix({"loss": f"{loss:.3f}", "tok/s": f"{tokens / seconds:.0f}"}, refresh=False)
        bar.update()
        last = step == total
        if step % config.logging_steps == 0 or last:
            line = {"step": step, "loss": loss, "learning_rate": learning_rate, "grad_norm": norm}
            self._log(line | {"tokens": result.tokens, "seconds": round(result.seconds, 3)})
        if self.eval_dataset and (last or (config.eval_steps and step % config.eval_steps == 0)):
            found = evaluate(self.model, self.eval_dataset, config.per_device_eval_batch_size, self.progress)
            self._log({"step": step, "eval_loss": found.loss, "eval_perplexity": found.perplexity})
        if config.save_steps and step % config.save_steps == 0 and not last:
            self.save(f"checkpoint-{step}")
            self.checkpoints.append(f"checkpoint-{step}")
            if self.folder and len(self.checkpoints) > config.save_total_limit:
                shutil.rmtree(self.folder / self.checkpoints.pop(0))

    def _log(self, line: dict) -> None:
        self.result.log.append(line)
        if self.folder:
            with open(self.folder / "log.jsonl", "a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")

    def save(self, name: str) -> None:
        if self.folder:
            save_adapter(self.model, self.folder / name, self.base)
