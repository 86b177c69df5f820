"""The training loop: batches, loss on the assistant's tokens, AdamW on the adapter, a log, and checkpoints on the way."""

import math
import signal
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from minilora.adapters.adapter_files import check_replaceable
from minilora.adapters.trainable import lora_state_dict
from minilora.data.encoding import Example, collate, count_targets, shuffled_batches
from minilora.data.packing import pack
from minilora.extras import require_extras
from minilora.training.checkpoint import checkpoint_folder, find_checkpoints, find_resumed
from minilora.training.config import TrainConfig
from minilora.training.distributed import broadcast, largest, of_this_rank, rank, sum_gradients, summed, train_batch_size
from minilora.training.interruption import Interrupted, deferred_signals
from minilora.training.loraplus import parameter_groups
from minilora.training.memory import keep_freed_memory
from minilora.training.numerics import named_anomalies
from minilora.training.questions import Questions
from minilora.training.recorder import Recorder, TrainResult


def train(
    model: nn.Module,
    dataset: Sequence[Example],
    config: TrainConfig,
    eval_dataset: Sequence[Example] | None = None,
    output_dir: Path | str | None = None,
    base: str | None = None,
    progress: bool = True,
    resume: bool | Path | str = False,
    questions: Questions | None = None,
) -> TrainResult:
    """Trains whatever parameters of the model ask for gradients; the same seed on the same machine ends bitwise the same.

    A step's gradient is that of the mean loss over all target tokens of its batches, however they are split. A run that was
    ended at any moment and is resumed ends bitwise as one that was not. In a process group (distributed.py) its processes share
    each batch of per_device_train_batch_size times their number, and rank 0 writes.

    Args:
        model: maps input_ids and labels (B, T) to the mean loss, as Phi3ForCausalLM does; with config.packing also given an
            attention_mask (B, T), which numbers the documents of each row.
        eval_dataset: evaluated as config.eval_strategy says, and at the end.
        output_dir: takes log.jsonl, checkpoint-STEP/ as config.save_strategy says, and adapter/ at the end; None writes nothing.
        base: name of the base model, noted in the saved adapters.
        resume: a checkpoint to go on from, or True for the newest one in output_dir. Model, adapter, settings and data must be
            those of the run that wrote it (minilora.training.fingerprint).
        questions: the first config.eval_samples of them are answered before the first step and at every evaluation; the log keeps
            the answers, and config.eval_metrics of them.

    Raises:
        ValueError: there is no data, a conversation is too long to be packed, nothing to train, something trained that no
            adapter holds, no activation checkpointing to turn on, no evaluation to find the best adapter by, or the checkpoint is
            of another run.
        FileExistsError: output_dir holds checkpoints of an earlier run, and nothing is to be resumed.
        FileNotFoundError: there is no checkpoint to resume from.
        FloatingPointError: a loss or gradient is not finite. The last good adapter is in the model and, but for what
            config.detect_anomaly finds, in output_dir/adapter.
        Interrupted: Ctrl-C or SIGTERM came, and a checkpoint was saved for it; without output_dir they end the run as ever.
    """
    output_dir = Path(output_dir) if output_dir else None
    checkpoint = find_resumed(resume, output_dir) if resume else None
    _check(model, dataset, config, eval_dataset, questions, output_dir, checkpoint)
    keep_freed_memory()
    _set_gradient_checkpointing(model, config.gradient_checkpointing)
    rows = pack(dataset, config.max_seq_length) if config.packing else dataset
    total = total_steps(len(rows), config)
    groups = parameter_groups(model, config.learning_rate, config.loraplus_lr_ratio)
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, total, config))
    broadcast(parameters)
    recorder = Recorder(model, optimizer, schedule, rows, config, eval_dataset, questions, output_dir, base, progress)
    place, result = recorder.start(checkpoint), recorder.result
    batches = shuffled_batches(rows, train_batch_size(config), config.seed, *place)
    deferred = deferred_signals() if output_dir else nullcontext([])
    model.train()
    hidden = not progress or rank() > 0
    shown = tqdm(total=total, initial=result.steps, desc="train", unit="step", disable=hidden)
    with closing(recorder), deferred as signals, shown as bar:
        for step in range(result.steps + 1, total + 1):
            torch.manual_seed(step_seed(config.seed, step, rank()))
            learning_rate, started = schedule.get_last_lr()[0], time.perf_counter()
            drawn = list(islice(batches, config.gradient_accumulation_steps))
            with named_anomalies(config.detect_anomaly, step):
                loss, tokens = accumulate_gradients(model, drawn)
            norm = clip_gradients(parameters, config.max_grad_norm)
            examples = list(chain.from_iterable(drawn))
            line = {"step": step, "loss": loss, "learning_rate": learning_rate, "grad_norm": norm}
            if not (math.isfinite(loss) and math.isfinite(norm)):
                recorder.nonfinite(line, examples)
                optimizer.zero_grad(set_to_none=True)  # AdamW leaves alone what has no gradient
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            seconds = time.perf_counter() - started
            bar.set_postfix({"loss": f"{loss:.3f}", "tok/s": f"{tokens / seconds:.0f}"}, refresh=False)
            bar.update()
            recorder.step(line, tokens, seconds, examples, last=step == total)
            if step == total or recorder.out_of_patience():
                break
            received = int(largest(max(signals, default=0)))  # by any process: all end after the same step
            recorder.save_if_due(now=received > 0)
            if received:
                raise Interrupted(step, checkpoint_folder(output_dir, step), signal.Signals(received))
    model.eval()
    recorder.finish()
    return result


def _check(model, dataset, config: TrainConfig, eval_dataset, questions, output_dir: Path | None, checkpoint) -> None:
    """Everything that would spoil a run is told before its first step."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not dataset or not trained:
        raise ValueError("training needs at least one conversation and one trainable parameter (mark_only_lora_as_trainable)")
    if (config.load_best_model_at_end or config.early_stopping_patience) and not (eval_dataset and _evaluates(config)):
        raise ValueError(
            "load_best_model_at_end and early_stopping_patience need conversations to evaluate on, and eval_steps or "
            'eval_strategy = "epoch"'
        )
    if config.eval_metrics and not (eval_dataset and questions and questions.conversations and config.eval_samples):
        raise ValueError("eval_metrics need conversations to evaluate on, questions, and eval_samples above 0")
    if questions and not eval_dataset:
        raise ValueError("questions are asked at evaluations, which need an eval_dataset")
    require_extras([*config.eval_metrics, *config.trackers])
    if config.trackers and not output_dir:
        raise ValueError("report_to needs an output_dir, which the trackers write into")
    if output_dir:
        _check_output(model, set(trained), output_dir, checkpoint)
    elif config.load_best_model_at_end:
        raise ValueError("load_best_model_at_end needs an output_dir, where the best checkpoint lies until then")


def _evaluates(config: TrainConfig) -> bool:
    """Whether there are evaluations on the way."""
    return config.eval_strategy == "epoch" or (config.eval_strategy == "steps" and config.eval_steps > 0)


def _check_output(model: nn.Module, trained: set[str], output_dir: Path, checkpoint: Path | None) -> None:
    if not any("lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("output_dir takes adapters, and the model has none: inject one first")
    lost = trained - lora_state_dict(model).keys()
    if lost:
        raise ValueError(f"output_dir takes adapters only, and would lose what else is trained: {', '.join(sorted(lost))}")
    check_replaceable(output_dir / "adapter")
    found = find_checkpoints(output_dir)
    if found and not checkpoint:
        raise FileExistsError(f"{output_dir} holds {found[-1].name} of an earlier run: resume it, or choose another folder")


def _set_gradient_checkpointing(model: nn.Module, wanted: bool) -> None:
    able = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    if wanted and not able:
        raise ValueError("gradient_checkpointing needs a model with a module that has that attribute, and this one has none")
    for module in able:
        module.gradient_checkpointing = wanted


def step_seed(seed: int, step: int, rank: int) -> int:
    """What a process draws dropout from in a step: no state of a generator has to outlive it."""
    return int(np.random.SeedSequence((seed % 2**64, step, rank)).generate_state(1, np.uint64)[0])  # it takes no negative one


def total_steps(examples: int, config: TrainConfig) -> int:
    """Steps of a whole run: max_steps, or else the epochs' batches gathered by gradient_accumulation_steps."""
    if config.max_steps != -1:
        return config.max_steps
    batches = math.ceil(examples / train_batch_size(config)) * config.num_train_epochs
    return math.ceil(batches / config.gradient_accumulation_steps)


def rate(step: int, total: int, config: TrainConfig) -> float:
    """The share of the peak learning rate at a step counted from 0, by the schedules of transformers.get_scheduler.

    A linear rise, of which no step is at 0, and then a cosine or linear fall to 0 at total, or none; "constant" does not rise
    either.
    """
    kind = config.lr_scheduler_type
    warmup = 0 if kind == "constant" else math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    left = (total - step) / max(1, total - warmup)
    return {"cosine": (1 - math.cos(math.pi * left)) / 2, "linear": left}.get(kind, 1.0)


def accumulate_gradients(model: nn.Module, batches: list[list[Example]]) -> tuple[float, int]:
    """Adds the gradient of the mean loss over all target tokens of all batches; returns that loss and all tokens seen.

    Several processes share each batch; gradients and loss are the same in all of them then.
    """
    device = next(model.parameters()).device
    total, loss = sum(map(count_targets, batches)), 0.0
    for part, counts in map(of_this_rank, batches):
        tensors = {name: tensor.to(device) for name, tensor in collate(part).items()}
        share = model(**tensors) * (count_targets(part) * counts / total)
        share.backward()
        loss += share.item()
    sum_gradients(model.parameters())
    return summed(loss)[0], sum(len(example.ids) for batch in batches for example in batch)


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """Cuts the gradient of all parameters together to max_norm, where it is finite; returns its norm before that."""
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if norm.isfinite():  # else all would be NaN, and no longer tell where it came from
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm.item()
