"""The settings of a training run, by the names of transformers' TrainingArguments."""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from minilora.settings import BrokenSettings, at_least, check, one_of

Schedule = Literal["cosine", "linear", "constant", "constant_with_warmup"]
NonFinite = Literal["stop", "skip"]
Metric = Literal["exact_match", "rougeL"]
Strategy = Literal["no", "steps", "epoch"]
REPORT_TO = ("tensorboard", "wandb")

RULES = {
    "lr_scheduler_type": one_of(Schedule),
    "learning_rate": (lambda value: 0 < value < math.inf, "must be positive"),
    "loraplus_lr_ratio": (lambda value: 0 < value < math.inf, "must be positive"),
    "warmup_ratio": (lambda value: 0 <= value <= 1, "must lie in [0, 1]"),
    "num_train_epochs": (lambda value: 0 < value < math.inf, "must be positive"),
    "max_steps": (lambda value: value == -1 or value >= 1, "must be -1 or at least 1"),
    "per_device_train_batch_size": at_least(1),
    "per_device_eval_batch_size": at_least(1),
    "gradient_accumulation_steps": at_least(1),
    "weight_decay": at_least(0),
    "max_grad_norm": (lambda value: value > 0, "must be positive"),
    "on_nonfinite": one_of(NonFinite),
    "eval_strategy": one_of(Strategy),
    "save_strategy": one_of(Strategy),
    "logging_steps": at_least(1),
    "eval_steps": at_least(0),
    "eval_samples": at_least(0),
    "eval_max_new_tokens": at_least(1),
    "eval_metrics": (lambda value: set(value) <= {*get_args(Metric)}, f"must hold some of {', '.join(get_args(Metric))}"),
    "report_to": (
        lambda value: value == "none" or {*([value] if isinstance(value, str) else value)} <= {*REPORT_TO},
        f"must be none, or hold some of {', '.join(REPORT_TO)}",
    ),
    "save_steps": at_least(0),
    "save_total_limit": at_least(1),
    "early_stopping_patience": at_least(0),
    "max_seq_length": at_least(1),
}


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training run, by the names of transformers' TrainingArguments.

    A step is one update of the weights, by gradient_accumulation_steps batches.

    Raises:
        ValueError: a field is out of its range; all faults at once.
    """

    learning_rate: float = 1e-4  # at its peak
    loraplus_lr_ratio: float = 1.0  # times as much for lora_B, "LoRA+" (Hayou et al. 2024): about 16 there; 1 trains all alike
    lr_scheduler_type: Schedule = "cosine"  # how it falls to 0 after the warm-up, or stays; "constant" is without warm-up
    warmup_ratio: float = 0.0  # share of the steps in which it rises from 0
    num_train_epochs: float = 1.0  # passes over the data
    max_steps: int = -1  # takes so many steps, whatever the epochs; -1 leaves it to the epochs
    per_device_train_batch_size: int = 8  # conversations that each process takes of a batch
    per_device_eval_batch_size: int = 8  # likewise
    gradient_accumulation_steps: int = 1  # batches a step
    max_seq_length: int = 2048  # tokens that a conversation may have, and that a packed row has at most
    packing: bool = False  # conversations share rows of max_seq_length tokens, apart from one another; a batch counts rows
    gradient_checkpointing: bool = False  # keep each layer's input only and compute the rest again: less memory, ~4/3 of the time
    weight_decay: float = 0.0  # of AdamW
    max_grad_norm: float = 1.0  # longer gradients are cut to this norm
    on_nonfinite: NonFinite = "stop"  # what a loss or gradient that is NaN or infinite does: end the run, or leave out its step
    detect_anomaly: bool = False  # name the operation whose backward gives the first NaN; much slower
    logging_steps: int = 1  # steps between lines of the log
    report_to: list[str] | str = "none"  # who is told of them beside log.jsonl: "tensorboard", "wandb"
    eval_strategy: Strategy = "steps"  # evaluate every eval_steps, after each "epoch", or, "no", at the end only, as all do
    eval_steps: int = 0  # steps between evaluations; 0 for one at the end only
    eval_samples: int = 4  # of the conversations to evaluate on, the first so many are answered too, and kept in the log
    eval_max_new_tokens: int = 64  # tokens of such an answer at most
    eval_metrics: list[str] = field(default_factory=list)  # of these answers: "exact_match", "rougeL"
    save_strategy: Strategy = "steps"  # save a checkpoint every save_steps, after each "epoch", or, "no", none
    save_steps: int = 0  # steps between checkpoints; 0 for none, and the adapter at the end only
    save_total_limit: int = 2  # checkpoints that are kept, the latest
    load_best_model_at_end: bool = False  # the adapter at the end is that of the best evaluation
    metric_for_best_model: str = "eval_loss"  # or eval_perplexity, or eval_ before one of eval_metrics; eval_ may be left out
    greater_is_better: bool | None = None  # follows from the metric
    early_stopping_patience: int = 0  # evaluations without a better one that end the run; 0 for none
    seed: int = 0  # of the order of the data and of dropout

    def __post_init__(self):
        check(self, RULES)
        measured = ["eval_loss", "eval_perplexity", *(f"eval_{name}" for name in self.eval_metrics)]
        if self.best_metric not in measured:
            known = f"{', '.join(measured)} (others by eval_metrics)"
            raise BrokenSettings([f"metric_for_best_model must be one of {known}, not {self.metric_for_best_model!r}"])
        if self.greater_is_better not in (None, self.best_is_greatest):
            raise BrokenSettings([f"greater_is_better must be {self.best_is_greatest} for {self.best_metric}"])

    @property
    def trackers(self) -> list[str]:
        """The names in report_to, each once."""
        named = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        return [name for name in REPORT_TO if name in named]

    @property
    def best_metric(self) -> str:
        """The key of metric_for_best_model in the log."""
        return f"eval_{self.metric_for_best_model.removeprefix('eval_')}"

    @property
    def best_is_greatest(self) -> bool:
        return self.best_metric not in ("eval_loss", "eval_perplexity")
