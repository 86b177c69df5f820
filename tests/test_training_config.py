import math
import re

import pytest

from minilora.training.config import TrainConfig

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("lr_scheduler_type", "step", "must be one of cosine, linear, constant, constant_with_warmup, not 'step'"),
        ("learning_rate", 0.0, "must be positive, not 0.0"),
        ("learning_rate", -1e-4, "must be positive, not -0.0001"),
        ("learning_rate", INF, "must be positive, not inf"),
        ("learning_rate", NAN, "must be positive, not nan"),
        ("loraplus_lr_ratio", 0.0, "must be positive, not 0.0"),
        ("loraplus_lr_ratio", INF, "must be positive, not inf"),
        ("warmup_ratio", -0.1, "must lie in [0, 1], not -0.1"),
        ("warmup_ratio", 1.1, "must lie in [0, 1], not 1.1"),
        ("num_train_epochs", 0, "must be positive, not 0"),
        ("num_train_epochs", INF, "must be positive, not inf"),
        ("max_steps", 0, "must be -1 or at least 1, not 0"),
        ("max_steps", -2, "must be -1 or at least 1, not -2"),
        ("weight_decay", -0.1, "must be at least 0, not -0.1"),
        ("max_grad_norm", 0.0, "must be positive, not 0.0"),
        ("eval_steps", -1, "must be at least 0, not -1"),
        ("save_steps", -1, "must be at least 0, not -1"),
        ("per_device_train_batch_size", 0, "must be at least 1, not 0"),
        ("per_device_eval_batch_size", 0, "must be at least 1, not 0"),
        ("gradient_accumulation_steps", 0, "must be at least 1, not 0"),
        ("logging_steps", 0, "must be at least 1, not 0"),
        ("save_total_limit", 0, "must be at least 1, not 0"),
        ("save_strategy", "best", "must be one of no, steps, epoch, not 'best'"),
        ("eval_strategy", "epochs", "must be one of no, steps, epoch, not 'epochs'"),
    ],
)
def test_a_broken_training_rule_is_refused_with_its_value(name, value, rule):
    with pytest.raises(ValueError, match=re.escape(f"{name} {rule}") + "$"):
        TrainConfig(**{name: value})


def test_all_broken_training_rules_are_named_at_once():
    broken = {"learning_rate": 0, "warmup_ratio": 2, "max_steps": 0, "save_total_limit": 0, "lr_scheduler_type": "step"}
    with pytest.raises(ValueError, match="; ") as refused:
        TrainConfig(**broken)
    assert sorted(fault.split()[0] for fault in str(refused.value).split("; ")) == sorted(broken)


def test_the_edges_of_the_training_rules_are_allowed():
    TrainConfig(warmup_ratio=1, num_train_epochs=0.01, max_steps=1, weight_decay=0, eval_steps=0, save_steps=0)


@pytest.mark.parametrize(
    ("name", "key", "greatest"),
    [
        ("loss", "eval_loss", False),
        ("eval_loss", "eval_loss", False),
        ("perplexity", "eval_perplexity", False),
        ("exact_match", "eval_exact_match", True),
        ("eval_rougeL", "eval_rougeL", True),
    ],
)
def test_the_metric_of_the_best_evaluation_says_which_way_is_better(name, key, greatest):
    settings = {"eval_metrics": ["exact_match", "rougeL"], "metric_for_best_model": name}
    for said in (None, greatest):
        config = TrainConfig(**settings, greater_is_better=said)
        assert (config.best_metric, config.best_is_greatest) == (key, greatest)
    with pytest.raises(ValueError, match=f"greater_is_better must be {greatest} for {key}"):
        TrainConfig(**settings, greater_is_better=not greatest)


def test_a_best_by_what_is_not_measured_is_refused():
    with pytest.raises(ValueError, match="metric_for_best_model must be one of eval_loss, eval_perplexity, eval_exact_match "):
        TrainConfig(eval_metrics=["exact_match"], metric_for_best_model="rougeL")
