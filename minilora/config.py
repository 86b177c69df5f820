"""The settings of an adapter and of a training run, by the names that PEFT's and transformers' users know."""

import dataclasses
import math
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin

Schedule = Literal["cosine", "linear", "constant", "constant_with_warmup"]
Compute = Literal["bfloat16", "float32"]
Bias = Literal["none", "all", "lora_only"]
NonFinite = Literal["stop", "skip"]
Metric = Literal["exact_match", "rougeL"]
Strategy = Literal["no", "steps", "epoch"]
REPORT_TO = ("tensorboard", "wandb")
STARTS = (True, "pissa", "olora", "loftq")  # of lora_A and lora_B
LOFTQ = {"loftq_bits": 4, "loftq_iter": 1}  # PEFT's defaults


def _at_least(least: float):
    return (lambda value: least <= value < math.inf), f"must be at least {least}"


def _one_of(kind):
    return (lambda value: value in get_args(kind)), f"must be one of {', '.join(get_args(kind))}"


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _are_patterns(texts: dict | list | str) -> bool:
    return all(map(_is_pattern, [texts] if isinstance(texts, str) else texts))


# For each field that has one: the rule that a value of the right type must keep, and how it is said.
RULES = {
    "r": _at_least(1),
    "lora_alpha": (math.isfinite, "must be finite"),
    "lora_dropout": (lambda value: 0 <= value < 1, "must lie in [0, 1)"),
    "target_modules": (
        lambda value: value and (isinstance(value, list) or _is_pattern(value)),
        "must name at least one module, or be a pattern for some",
    ),
    "exclude_modules": (
        lambda value: not isinstance(value, str) or _is_pattern(value),
        "must name modules, or be a pattern for some",
    ),
    "layers_pattern": (lambda value: _are_patterns(value or []), "must hold regular expressions"),
    "bias": _one_of(Bias),
    "init_lora_weights": (lambda value: value in STARTS, f"must be one of {', '.join(map(repr, STARTS))}"),
    "loftq_config": (
        lambda value: value.keys() <= LOFTQ.keys() and value.get("loftq_bits", 4) == 4 and value.get("loftq_iter", 1) >= 1,
        "must hold loftq_bits = 4 and a loftq_iter of at least 1",
    ),
    "rank_pattern": (
        lambda value: _are_patterns(value) and all(rank >= 1 for rank in value.values()),
        "must map regular expressions to ranks of at least 1",
    ),
    "alpha_pattern": (
        lambda value: _are_patterns(value) and all(map(math.isfinite, value.values())),
        "must map regular expressions to finite numbers",
    ),
    "lr_scheduler_type": _one_of(Schedule),
    "bnb_4bit_compute_dtype": (
        lambda value: value is None or value in get_args(Compute),
        f"must be one of {', '.join(get_args(Compute))}",
    ),
    "learning_rate": (lambda value: 0 < value < math.inf, "must be positive"),
    "loraplus_lr_ratio": (lambda value: 0 < value < math.inf, "must be positive"),
    "warmup_ratio": (lambda value: 0 <= value <= 1, "must lie in [0, 1]"),
    "num_train_epochs": (lambda value: 0 < value < math.inf, "must be positive"),
    "max_steps": (lambda value: value == -1 or value >= 1, "must be -1 or at least 1"),
    "per_device_train_batch_size": _at_least(1),
    "per_device_eval_batch_size": _at_least(1),
    "gradient_accumulation_steps": _at_least(1),
    "weight_decay": _at_least(0),
    "max_grad_norm": (lambda value: value > 0, "must be positive"),
    "on_nonfinite": _one_of(NonFinite),
    "eval_strategy": _one_of(Strategy),
    "save_strategy": _one_of(Strategy),
    "logging_steps": _at_least(1),
    "eval_steps": _at_least(0),
    "eval_samples": _at_least(0),
    "eval_max_new_tokens": _at_least(1),
    "eval_metrics": (lambda value: set(value) <= {*get_args(Metric)}, f"must hold some of {', '.join(get_args(Metric))}"),
    "report_to": (
        lambda value: value == "none" or {*([value] if isinstance(value, str) else value)} <= {*REPORT_TO},
        f"must be none, or hold some of {', '.join(REPORT_TO)}",
    ),
    "save_steps": _at_least(0),
    "save_total_limit": _at_least(1),
    "early_stopping_patience": _at_least(0),
    "max_seq_length": _at_least(1),
}


class BrokenSettings(ValueError):
    """All faults of a config at once, one by one in `faults`."""

    def __init__(self, faults: list[str]):
        super().__init__("; ".join(faults))
        self.faults = faults


def _faults(config) -> list[str]:
    """Every field that is of another type than annotated, or breaks its rule."""
    faults = []
    for item in dataclasses.fields(config):
        value, (keeps, rule) = getattr(config, item.name), RULES.get(item.name, (lambda _: True, ""))
        if not _fits(value, item.type):
            faults.append(f"{item.name} must be {_spelled(item.type)}, not {value!r}")
        elif not keeps(value):
            faults.append(f"{item.name} {rule}, not {value!r}")
    return faults


def _check(config) -> None:
    faults = _faults(config)
    if faults:
        raise BrokenSettings(faults)


def _fits(value, kind) -> bool:
    """Whether a value is of an annotated type; an integer is a float too."""
    if get_origin(kind) is Literal:
        return isinstance(value, str)  # which of them is a rule of its own
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, option) for option in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(item, *get_args(kind)) for item in value)
    if get_origin(kind) is dict:
        of_key, of_value = get_args(kind)
        return isinstance(value, dict) and all(_fits(k, of_key) and _fits(v, of_value) for k, v in value.items())
    if kind is float:
        return type(value) in (int, float)
    return type(value) is (NoneType if kind is None else kind)


def _spelled(kind) -> str:
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_spelled(option) for option in get_args(kind) if option is not NoneType)
    return kind.__name__ if get_origin(kind) is None else str(kind)


@dataclass(frozen=True)
class LoraConfig:
    """What PEFT's LoraConfig says about a LoRA adapter.

    Raises:
        ValueError: a field is out of its range; all faults at once.
    """

    r: int = 8  # rank
    lora_alpha: float = 8  # numerator of the scaling
    lora_dropout: float = 0.0  # probability with which the adapter's input loses an element in training
    # Module names (a path, or the end of one), a regular expression over whole paths, or "all-linear": all but lm_head.
    target_modules: list[str] | str = "all-linear"
    exclude_modules: list[str] | str | None = None  # names or an expression as above, for modules to leave alone
    layers_to_transform: list[int] | int | None = None  # numbers of the layers to adapt, of those that a list of targets names
    layers_pattern: list[str] | str | None = None  # names of the module lists that those numbers count; any list when None
    use_rslora: bool = False  # scale by alpha / sqrt(r) instead of alpha / r (Kalajdzievski 2023)
    use_dora: bool = False  # a trained length for each row of the adapted weight (Liu et al. 2024): minilora.dora
    rank_pattern: dict[str, int] = field(default_factory=dict)  # path or end of path → its own r
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # likewise → its own lora_alpha
    init_lora_weights: bool | str = True  # lora_B starts at zero; or "pissa", "olora": minilora.offset; "loftq": minilora.loftq
    loftq_config: dict[str, int] = field(default_factory=dict)  # loftq_bits, which are 4, and loftq_iter: T there
    lora_bias: bool = False  # lora_B has a bias, trained too
    bias: Bias = "none"  # biases of the base model that are trained too
    modules_to_save: list[str] | None = None  # ends of paths: modules that are trained whole, and saved with the adapter
    ensure_weight_tying: bool = True  # what is tied to an embedding is adapted, or trained whole, with it: minilora.tying

    def __post_init__(self):
        faults = _faults(self)
        if not faults:
            faults = [text for wrong, text in self._conflicts() if wrong]
        if faults:
            raise BrokenSettings(faults)

    def _conflicts(self) -> list[tuple[bool, str]]:
        """Pairs of settings that contradict one another: whether they do, and how it is said."""
        by_layer, starts_off = self.layers_to_transform not in (None, []), self.init_lora_weights is not True
        subtracted = self.init_lora_weights in ("pissa", "olora")
        return [
            (by_layer and isinstance(self.target_modules, str), "layers_to_transform needs a list of target_modules, not a text"),
            (bool(self.layers_pattern) and not by_layer, "layers_pattern needs layers_to_transform"),
            (self.lora_bias and self.use_dora, "lora_bias and use_dora exclude one another"),
            (self.lora_bias and starts_off, "lora_bias needs init_lora_weights = True"),
            (self.use_dora and starts_off, "use_dora needs init_lora_weights = True"),
            (bool(self.loftq_config) and self.init_lora_weights != "loftq", 'loftq_config needs init_lora_weights = "loftq"'),
            (subtracted and self.lora_dropout > 0, f"init_lora_weights = {self.init_lora_weights!r} needs lora_dropout = 0"),
        ]

    def rank(self, path: str) -> int:
        """The r of the module at a path."""
        return _first_match(self.rank_pattern, path, self.r)

    def alpha(self, path: str) -> float:
        """The lora_alpha of the module at a path."""
        return _first_match(self.alpha_pattern, path, self.lora_alpha)


def scaling(r: int, lora_alpha: float, use_rslora: bool = False) -> float:
    """The factor on B·A: alpha / r (Hu et al. 2021), or alpha / sqrt(r) (Kalajdzievski 2023, "rsLoRA")."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def _first_match(pattern: dict, path: str, default):
    """PEFT's rule: a key is a regular expression for a path or for the end of one after a dot; the first hit counts."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", path)), default)


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
        _check(self)
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


@dataclass(frozen=True)
class RunConfig:
    """A run of the command line: the Phi-3 cookbook's dictionaries, and what belongs to no library call."""

    training: TrainConfig = field(default_factory=TrainConfig)
    peft: LoraConfig = field(default_factory=LoraConfig)
    bf16: bool | None = None  # weights in bfloat16; None: on CUDA yes, elsewhere no
    fsdp: bool = False  # the frozen base is split over torchrun's processes: minilora.distributed.shard_base
    load_in_4bit: bool = False  # the base's projections become 4-bit NF4 weights: "QLoRA"
    bnb_4bit_compute_dtype: Compute | None = None  # the same as bf16, in the words of transformers' BitsAndBytesConfig
    assistant_only_loss: bool = True  # the loss is on the assistant's turns; otherwise on every token
    output_dir: str | None = None
    overwrite_output_dir: bool = False
    without_effect: list[str] = field(default_factory=list)  # keys that were given, and decide nothing here

    def __post_init__(self):
        _check(self)
        compute = self.bnb_4bit_compute_dtype
        if compute and not self.load_in_4bit:
            raise BrokenSettings(["bnb_4bit_compute_dtype needs load_in_4bit = true"])
        if compute and self.bf16 is None:
            object.__setattr__(self, "bf16", compute == "bfloat16")
        elif compute and self.bf16 != (compute == "bfloat16"):
            raise BrokenSettings(
                [f"bf16 = {str(self.bf16).lower()} and bnb_4bit_compute_dtype = {compute!r} contradict one another"]
            )


# Keys of RunConfig, by the table that holds them.
RUN_KEYS = {
    "training": ("bf16", "fsdp", "assistant_only_loss", "output_dir", "overwrite_output_dir"),
    "quantization": ("load_in_4bit", "bnb_4bit_compute_dtype"),
}
# Keys of the cookbook's dictionaries that leave nothing to decide here, and the values that they may have.
DECIDED = {
    "training": {
        "do_eval": None, "remove_unused_columns": None, "log_level": None, "logging_strategy": ("steps",),
        "gradient_checkpointing_kwargs": ({"use_reentrant": False},), "fp16": (False,), "adam_beta1": (0.9,),
        "adam_beta2": (0.999,), "adam_epsilon": (1e-8,),
        "optim": ("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit", "paged_adamw"),
    },
    "peft": {"task_type": ("CAUSAL_LM",)},
    "quantization": {"bnb_4bit_quant_type": ("nf4",), "bnb_4bit_use_double_quant": (True,)},
}  # fmt: skip
# What stands here for keys of transformers, trl and bitsandbytes that are not known by their own names.
COUNTERPARTS = {
    "training": {
        "evaluation_strategy": "eval_strategy stands for it, its name since transformers 4.41",
        "fp16": "bf16 stands for it, with the range of float32 and no scale on the loss",
        "optim": "AdamW with moments in float32 is the one optimizer; those of an adapter are small",
        "warmup_steps": "warmup_ratio stands for it, a share of all steps",
        "max_length": "max_seq_length stands for it",
        "max_seq_len": "max_seq_length stands for it",
        "do_train": "the command train stands for it",
        "dataset_text_field": "--data stands for it: conversations, which the model's own template writes",
        "push_to_hub": "OUTPUT/adapter stands for it, a folder that PEFT can push",
        "neftune_noise_alpha": "nothing stands for it: embeddings get no noise",
    },
    "peft": {"rank": "r stands for it", "alpha": "lora_alpha stands for it", "dropout": "lora_dropout stands for it"},
    "quantization": {
        "load_in_8bit": "load_in_4bit stands for it",
        "bnb_4bit_quant_storage": "nothing stands for it: codes are bytes",
    },
}


def read_run_config(path: Path | str | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a TOML file with the tables [training] and [peft], which hold the cookbook's training_config and peft_config, and
    [quantization], which holds the arguments of transformers' BitsAndBytesConfig.

    Args:
        path: the file; everything at its default when None.
        overrides: TOML such as "training.max_steps = 8", each over the file and over those before it.

    Raises:
        ValueError: not TOML, an unknown table or key, a value of the wrong type or out of range; all faults at once.
        FileNotFoundError: there is no such file.
    """
    layers = [_tables(path, Path(path).read_bytes())] if path else []
    layers += [_tables(f"--set {override}", override.encode()) for override in overrides]
    faults, given, without_effect = [], {"training": {}, "peft": {}, "quantization": {}}, []
    for table, values in (entry for layer in layers for entry in layer.items()):
        if table in given and isinstance(values, dict):
            given[table] |= values
        else:
            faults.append(f"{table} is unknown: the tables are [training], [peft] and [quantization]")
    keys = {"training": _names(TrainConfig), "peft": _names(LoraConfig), "quantization": []}
    keys = {table: [*names, *RUN_KEYS.get(table, ())] for table, names in keys.items()}
    for table, key in [(name, key) for name, values in given.items() for key in values]:
        if key in DECIDED[table]:
            allowed, value = DECIDED[table][key], given[table].pop(key)
            without_effect.append(f"{table}.{key}")
            if allowed is not None and value not in allowed:
                why = f": {COUNTERPARTS[table][key]}" if key in COUNTERPARTS[table] else ""
                faults.append(f"{table}.{key} must be {' or '.join(map(repr, allowed))}, not {value!r}{why}")
        elif key not in keys[table]:
            del given[table][key]
            known = f"known are {', '.join(sorted([*keys[table], *DECIDED[table]]))}"
            faults.append(f"{table}.{key} is unknown; {COUNTERPARTS[table].get(key, known)}")
    run = {key: given[table].pop(key) for table, own in RUN_KEYS.items() for key in own if key in given[table]}
    parts = {"training": (TrainConfig, given["training"]), "peft": (LoraConfig, given["peft"]), "run": (RunConfig, run)}
    made = {}
    for table, (cls, values) in parts.items():
        try:
            made[table] = cls(**values)
        except BrokenSettings as error:
            faults += [f"{_table_of(fault) if table == 'run' else table}.{fault}" for fault in error.faults]
    if faults:
        raise ValueError(f"{path or 'the settings'}:\n  " + "\n  ".join(faults))
    settings = {"training": made["training"], "peft": made["peft"], "without_effect": sorted(without_effect)}
    return dataclasses.replace(made["run"], **settings)


def _table_of(fault: str) -> str:
    """The table of the key of RunConfig that a fault begins with."""
    return next(table for table, keys in RUN_KEYS.items() if fault.split()[0] in keys)


def _names(config: type) -> list[str]:
    return [item.name for item in dataclasses.fields(config)]


def _tables(source: Path | str, text: bytes) -> dict:
    try:
        return tomllib.loads(text.decode())
    except ValueError as error:
        raise ValueError(f"{source} must be TOML: {error}; a text stands in quotes, training.output_dir='out'") from None
