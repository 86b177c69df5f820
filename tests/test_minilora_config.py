import dataclasses
import math
import re

import pytest

from minilora.adapters.config import LoraConfig
from minilora.config import COUNTERPARTS, RunConfig, read_run_config
from minilora.training.config import TrainConfig

NAN, INF = math.nan, math.inf

# training_config and peft_config of the Phi-3 cookbook's fine-tuning script, as TOML.
COOKBOOK = """
[training]
bf16 = true
do_eval = false
learning_rate = 5.0e-06
log_level = "info"
logging_steps = 20
logging_strategy = "steps"
lr_scheduler_type = "cosine"
num_train_epochs = 1
max_steps = -1
output_dir = "./checkpoint_dir"
overwrite_output_dir = true
per_device_eval_batch_size = 4
per_device_train_batch_size = 4
remove_unused_columns = true
save_steps = 100
save_total_limit = 1
seed = 0
gradient_checkpointing = true
gradient_checkpointing_kwargs = {use_reentrant = false}
gradient_accumulation_steps = 1
warmup_ratio = 0.2

[peft]
r = 16
lora_alpha = 32
lora_dropout = 0.05
bias = "none"
task_type = "CAUSAL_LM"
target_modules = "all-linear"
"""


def written(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(tmp_path, text) -> str:
    """The message with which a file of this text is refused; it begins with the file's name."""
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=re.escape(str(path))) as refused:
        read_run_config(path)
    return str(refused.value)


def test_configs_cannot_be_changed_once_checked():
    for config in (LoraConfig(), TrainConfig(), RunConfig()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, dataclasses.fields(config)[0].name, -1)


def test_the_cookbooks_two_dictionaries_are_read_verbatim(tmp_path):
    run = read_run_config(written(tmp_path, COOKBOOK))
    assert run.training == TrainConfig(
        learning_rate=5e-6, lr_scheduler_type="cosine", warmup_ratio=0.2, num_train_epochs=1, max_steps=-1,
        per_device_train_batch_size=4, per_device_eval_batch_size=4, gradient_accumulation_steps=1, gradient_checkpointing=True,
        logging_steps=20, save_steps=100, save_total_limit=1, seed=0,
    )  # fmt: skip
    assert run.peft == LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")
    assert (run.bf16, run.output_dir, run.overwrite_output_dir) == (True, "./checkpoint_dir", True)
    assert set(run.without_effect) == {
        "training.do_eval", "training.log_level", "training.logging_strategy", "training.remove_unused_columns",
        "training.gradient_checkpointing_kwargs", "peft.task_type",
    }  # fmt: skip


def test_an_empty_file_means_the_defaults(tmp_path):
    assert read_run_config(written(tmp_path, "")) == RunConfig()


def test_every_field_of_both_configs_can_be_set(tmp_path):
    text = """
    [training]
    weight_decay = 0.1
    max_grad_norm = 0.5
    eval_steps = 7
    max_seq_length = 128
    lr_scheduler_type = "linear"
    [peft]
    target_modules = ["q_proj", "o_proj"]
    use_rslora = true
    rank_pattern = {o_proj = 4}
    alpha_pattern = {o_proj = 2.5, q_proj = 2}
    """
    run = read_run_config(written(tmp_path, text))
    training = {"weight_decay": 0.1, "max_grad_norm": 0.5, "eval_steps": 7, "max_seq_length": 128}
    assert run.training == TrainConfig(**training, lr_scheduler_type="linear")
    patterns = {"rank_pattern": {"o_proj": 4}, "alpha_pattern": {"o_proj": 2.5, "q_proj": 2}}
    assert run.peft == LoraConfig(target_modules=["q_proj", "o_proj"], use_rslora=True, **patterns)


def test_all_faults_of_a_file_come_in_one_message(tmp_path):
    message = refusal(
        tmp_path,
        """
        r = 16
        [trainng]
        [training]
        learning_rate = "fast"
        per_device_train_batch_size = 4.0
        gradient_checkpointing = 1
        output_dir = 3
        bf16 = "yes"
        lr_schedule = "cosine"
        warmup_ratio = 2
        logging_strategy = "epoch"
        gradient_checkpointing_kwargs = {use_reentrant = true}
        [peft]
        r = "16"
        target_modules = [1]
        use_rslora = 0
        rank_pattern = 3
        bias = "some"
        task_type = "SEQ_CLS"
        modules_to_save = "lm_head"
        lora_dropout = 1.5
        """,
    )
    for fault in (
        "r is unknown: the tables are [training], [peft] and [quantization]",
        "trainng is unknown: the tables are [training], [peft] and [quantization]",
        "training.learning_rate must be float, not 'fast'",
        "training.per_device_train_batch_size must be int, not 4.0",
        "training.gradient_checkpointing must be bool, not 1",
        "training.output_dir must be str, not 3",
        "training.bf16 must be bool, not 'yes'",
        "training.lr_schedule is unknown; known are",
        "warmup_ratio must lie in [0, 1], not 2",
        "training.logging_strategy must be 'steps', not 'epoch'",
        "training.gradient_checkpointing_kwargs must be {'use_reentrant': False}, not {'use_reentrant': True}",
        "peft.r must be int, not '16'",
        "peft.target_modules must be",
        "peft.use_rslora must be bool, not 0",
        "peft.rank_pattern must be",
        "peft.bias must be one of none, all, lora_only, not 'some'",
        "peft.task_type must be 'CAUSAL_LM', not 'SEQ_CLS'",
        "peft.modules_to_save must be",
        "lora_dropout must lie in [0, 1), not 1.5",
    ):
        assert fault in message


def test_overrides_go_over_the_file_and_over_those_before_them(tmp_path):
    path = written(tmp_path, COOKBOOK)
    run = read_run_config(path, ["peft.r=2", "training.max_steps = 8", "peft.r=4", "peft.target_modules=['o_proj']"])
    assert run.training == dataclasses.replace(read_run_config(path).training, max_steps=8)
    assert run.peft == LoraConfig(r=4, lora_alpha=32, lora_dropout=0.05, target_modules=["o_proj"])
    assert read_run_config(None, ["training.seed = 5"]) == RunConfig(training=TrainConfig(seed=5))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.warmup_ratio = 2", "warmup_ratio must lie in"),
        ("training.sed = 1", "training.sed is unknown"),
        ("training = 3", r"the tables are \[training\], \[peft\] and \[quantization\]"),
        ("peft.target_modules = o_proj", "--set peft.target_modules = o_proj must be TOML"),
    ],
)
def test_an_override_is_held_to_the_same_rules(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        read_run_config(written(tmp_path, COOKBOOK), [override])


@pytest.mark.parametrize(
    ("text", "override"),
    [
        ("[training]\nlearning_rate = 0", "training.learning_rate = 1e-4"),
        ("[training]\nseed = 'one'", "training.seed = 0"),
        ("[peft]\ntask_type = 'SEQ_CLS'", "peft.task_type = 'CAUSAL_LM'"),
    ],
)
def test_an_override_stands_for_the_files_value(tmp_path, text, override):
    run = read_run_config(written(tmp_path, text), [override])
    assert (run.training, run.peft) == (TrainConfig(), LoraConfig())
    assert list(run.without_effect) == (["peft.task_type"] if "task_type" in text else [])


def test_an_override_cannot_hide_a_fault_of_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"the tables are \[training\], \[peft\] and \[quantization\]"):
        read_run_config(written(tmp_path, "training = 3"), ["training.seed = 1"])


def test_an_unknown_key_is_answered_with_the_known_ones(tmp_path):
    message = refusal(tmp_path, "[peft]\nranks = 3\n")
    assert all(name in message for name in ("lora_alpha", "r,", "target_modules", "task_type"))


@pytest.mark.parametrize(("name", "value"), [("rank_pattern", '"8"'), ("rank_pattern", "2.5"), ("alpha_pattern", '"8"')])
def test_a_pattern_must_map_names_to_numbers(tmp_path, name, value):
    assert name in refusal(tmp_path, f"[peft]\n{name} = {{o_proj = {value}}}\n")


@pytest.mark.parametrize("key", ["save_steps", "learning_rate"])
def test_true_is_no_number(tmp_path, key):
    assert f"training.{key} must be" in refusal(tmp_path, f"[training]\n{key} = true\n")


@pytest.mark.parametrize("length", [0, -1])
def test_max_seq_length_must_leave_room_for_a_token(tmp_path, length):
    assert "max_seq_length must be at least 1" in refusal(tmp_path, f"[training]\nmax_seq_length = {length}\n")


@pytest.mark.parametrize("text", ["[training\n", "[training]\nseed = \n", "[training]\nseed = 1\nseed = 2\n"])
def test_broken_toml_is_refused_with_file_and_line(tmp_path, text):
    assert re.search(r"run\.toml must be TOML: .*\bline \d", refusal(tmp_path, text))


def test_a_file_that_is_no_text_is_refused_by_name(tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"run\.toml must be TOML"):
        read_run_config(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.toml"):
        read_run_config(tmp_path / "absent.toml")


def test_a_value_with_a_semicolon_is_one_fault(tmp_path):
    (tmp_path / "run.toml").write_text('[training]\nlr_scheduler_type = "a; b"\n')
    with pytest.raises(ValueError, match=r"run\.toml") as raised:
        read_run_config(tmp_path / "run.toml")
    rule = "must be one of cosine, linear, constant, constant_with_warmup, not 'a; b'"
    assert str(raised.value).splitlines()[1:] == [f"  training.lr_scheduler_type {rule}"]


def test_the_table_of_the_quantisation_reads_bitsandbytesconfig(tmp_path):
    text = """
        [quantization]
        load_in_4bit = true
        bnb_4bit_quant_type = "nf4"
        bnb_4bit_compute_dtype = "bfloat16"
        bnb_4bit_use_double_quant = true
        """
    run = read_run_config(written(tmp_path, text))
    assert run.load_in_4bit
    assert run.bf16 is True
    assert run.without_effect == ["quantization.bnb_4bit_quant_type", "quantization.bnb_4bit_use_double_quant"]
    assert read_run_config(None, ["quantization.load_in_4bit = true"]).bf16 is None
    single = ["quantization.load_in_4bit = true", "quantization.bnb_4bit_compute_dtype = 'float32'"]
    assert read_run_config(None, single).bf16 is False


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["quantization.bnb_4bit_quant_type = 'fp4'"], "quantization.bnb_4bit_quant_type must be 'nf4', not 'fp4'"),
        (["quantization.bnb_4bit_use_double_quant = false"], "bnb_4bit_use_double_quant must be True, not False"),
        (["quantization.load_in_8bit = true"], "quantization.load_in_8bit is unknown; load_in_4bit stands for it"),
        (["quantization.load_in_4bit = 1"], "quantization.load_in_4bit must be bool, not 1"),
        (["quantization.bnb_4bit_compute_dtype = 'float16'"], "quantization.bnb_4bit_compute_dtype must be one of bfloat16"),
        (["quantization.bnb_4bit_compute_dtype = 'float32'"], "quantization.bnb_4bit_compute_dtype needs load_in_4bit = true"),
        (
            ["training.bf16 = true", "quantization = {load_in_4bit = true, bnb_4bit_compute_dtype = 'float32'}"],
            "training.bf16 = true and bnb_4bit_compute_dtype = 'float32' contradict one another",
        ),
    ],
)
def test_other_quantisations_are_refused(overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_run_config(None, overrides)


# What the cookbook's scripts and notebooks name, value by value, where it is another key here.


@pytest.mark.parametrize(
    ("setting", "counterpart"),
    [
        ("training.evaluation_strategy = 'steps'", "is unknown; eval_strategy stands for it"),
        ("training.fp16 = true", "must be False, not True: bf16 stands for it"),
        ("training.optim = 'paged_adamw_8bit'", "must be 'adamw_torch' or 'adamw_torch_fused' or"),
        ("training.dataset_text_field = 'text'", "is unknown; --data stands for it"),
        ("training.warmup_steps = 5", "is unknown; warmup_ratio stands for it"),
        ("peft.rank = 8", "is unknown; r stands for it"),
        ("quantization.load_in_8bit = true", "is unknown; load_in_4bit stands for it"),
    ],
)
def test_a_key_of_another_library_is_answered_with_its_counterpart(setting, counterpart):
    with pytest.raises(ValueError, match=re.escape(f"{setting.split()[0]} {counterpart}")):
        read_run_config(None, [setting])


def test_every_counterpart_that_is_named_is_a_setting():
    fields = [field.name for config in (TrainConfig, LoraConfig, RunConfig) for field in dataclasses.fields(config)]
    said = " ".join(text for table in COUNTERPARTS.values() for text in table.values())
    assert {word for word in re.findall(r"\w+", said) if "_" in word} <= {*fields}


@pytest.mark.parametrize("optim", ["adamw_torch", "paged_adamw_32bit"])
def test_optimizers_of_the_same_arithmetic_are_taken_and_told(optim):
    assert read_run_config(None, [f"training.optim = '{optim}'"]).without_effect == ["training.optim"]
