"""A run of the command line: the Phi-3 cookbook's dictionaries, read from TOML, and what belongs to no library call."""

import dataclasses
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from minilora.adapters.config import LoraConfig
from minilora.settings import BrokenSettings, check
from minilora.training.config import TrainConfig

Compute = Literal["bfloat16", "float32"]

RULES = {
    "bnb_4bit_compute_dtype": (
        lambda value: value is None or value in get_args(Compute),
        f"must be one of {', '.join(get_args(Compute))}",
    ),
}


@dataclass(frozen=True)
class RunConfig:
    """A run of the command line: the Phi-3 cookbook's dictionaries, and what belongs to no library call."""

    training: TrainConfig = field(default_factory=TrainConfig)
    peft: LoraConfig = field(default_factory=LoraConfig)
    bf16: bool | None = None  # weights in bfloat16; None: on CUDA yes, elsewhere no
    fsdp: bool = False  # the frozen base is split over torchrun's processes: minilora.training.distributed.shard_base
    load_in_4bit: bool = False  # the base's projections become 4-bit NF4 weights: "QLoRA"
    bnb_4bit_compute_dtype: Compute | None = None  # the same as bf16, in the words of transformers' BitsAndBytesConfig
    assistant_only_loss: bool = True  # the loss is on the assistant's turns; otherwise on every token
    output_dir: str | None = None
    overwrite_output_dir: bool = False
    without_effect: list[str] = field(default_factory=list)  # keys that were given, and decide nothing here

    def __post_init__(self):
        check(self, RULES)
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
