"""The best evaluation is kept, and a run ends when no better one comes; test_training_loop.py holds what a run logs."""

import pytest
import torch
from helpers import examples, tiny_config, tiny_model

import minilora as lora
from minilora.data.conversations import Conversation
from minilora.training.checkpoint import find_checkpoints
from minilora.training.recorder import best_evaluation

OVERFITTING = {
    "learning_rate": 2e-2, "per_device_train_batch_size": 2, "num_train_epochs": 8, "eval_steps": 2,
}  # fmt: skip


def adapted():
    torch.manual_seed(0)
    model = lora.inject(tiny_model(tiny_config()), lora.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1))
    lora.mark_only_lora_as_trainable(model)
    return model


def train(model, folder, resume=False, **settings):
    """Learns random conversations by heart, and is evaluated on others: sooner or later that gets worse."""
    config = lora.TrainConfig(**OVERFITTING | settings)
    return lora.train(model, examples(8)[:4], config, examples(8)[4:], folder, progress=False, resume=resume)


def losses(result) -> dict[int, float]:
    return {line["step"]: line["eval_loss"] for line in result.log if "eval_loss" in line}


def adapter(model):
    return {name: tensor.clone() for name, tensor in lora.lora_state_dict(model).items()}


def same(first, second) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_the_best_evaluation_is_the_first_with_the_least_loss():
    log = [
        {"step": 1, "loss": 0.0},
        *({"step": step, "eval_loss": loss} for step, loss in [(1, 2.0), (2, 1.0), (3, 1.0), (4, 3.0)]),
    ]
    by_loss = lora.TrainConfig()
    assert best_evaluation(log, by_loss) == log[2]
    assert best_evaluation([{"step": 0, "eval_loss": float("nan")}, *log], by_loss) == log[2]
    assert best_evaluation(log[:1], by_loss) is None


def test_the_best_evaluation_by_a_metric_of_answers_is_the_first_with_the_greatest():
    log = [
        {"step": step, "eval_loss": -share, "eval_exact_match": share} for step, share in [(1, 0.2), (2, 0.8), (3, 0.8), (4, 0.5)]
    ]
    log = [{"step": 0, "samples": []}, *log]
    by_answers = lora.TrainConfig(eval_metrics=["exact_match"], metric_for_best_model="exact_match")
    assert best_evaluation(log, by_answers) == log[2]


@pytest.mark.parametrize("save_steps", [0, 1])
def test_the_adapter_at_the_end_is_that_of_the_best_evaluation(tmp_path, save_steps):
    model = adapted()
    result = train(model, tmp_path, load_best_model_at_end=True, save_steps=save_steps, save_total_limit=1)
    found = losses(result)
    best = min(found, key=found.get)
    assert 0 < best < result.steps == max(found) == 16
    assert lora.evaluate(model, examples(8)[4:], progress=False).loss == found[best]
    saved = lora.load_adapter(tiny_model(tiny_config()), tmp_path / "adapter")
    assert same(adapter(saved), adapter(model))
    kept = [best, 15] if save_steps else [best]
    assert [path.name for path in find_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in kept]


def test_a_run_with_the_best_adapter_resumes_to_the_same_bits(tmp_path):
    settings = {"load_best_model_at_end": True, "save_steps": 3, "save_total_limit": 1}
    whole, model = adapted(), adapted()
    train(whole, tmp_path, **settings)
    train(model, tmp_path, resume=True, **settings)
    assert same(adapter(model), adapter(whole))


def test_resuming_without_the_best_checkpoint_is_refused(tmp_path):
    settings = {"load_best_model_at_end": True, "save_steps": 3, "save_total_limit": 1}
    train(adapted(), tmp_path / "a", **settings)
    newest = find_checkpoints(tmp_path / "a")[-1]
    with pytest.raises(FileNotFoundError, match=r"needs the best one, checkpoint-\d+, in .*b: copy it there too"):
        train(adapted(), tmp_path / "b", resume=newest, **settings)


@pytest.mark.parametrize("patience", [1, 2])
def test_a_run_ends_after_so_many_evaluations_that_are_no_better(tmp_path, patience):
    whole, stopped = adapted(), adapted()
    found = losses(train(whole, None))
    expected, best, since = {}, float("inf"), 0
    for step, loss in found.items():
        expected[step] = loss
        best, since = min(best, loss), 0 if loss < best else since + 1
        if since == patience:
            break
    result = train(stopped, tmp_path, early_stopping_patience=patience)
    assert losses(result) == expected
    assert result.steps == max(expected) < 16
    assert same(adapter(lora.load_adapter(tiny_model(tiny_config()), tmp_path / "adapter")), adapter(stopped))


def test_patience_counts_across_a_resumption(tmp_path):
    whole, model = adapted(), adapted()
    result = train(whole, tmp_path, early_stopping_patience=2, save_steps=1)
    resumed = train(model, tmp_path, resume=True, early_stopping_patience=2, save_steps=1)
    assert resumed.steps == result.steps < 16
    assert same(adapter(model), adapter(whole))


def test_the_adapter_that_answers_best_is_kept_and_its_answers_are_in_the_log(tmp_path):
    """The answers are right after step 4 and at no other time: a model cannot be made to do that, but who reads it can."""
    conversations = [Conversation([{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}], "here")] * 3
    asked = []

    def generate(model, conversations, max_new_tokens):
        assert not model.training
        assert max_new_tokens == 5
        asked.append(len(conversations))
        return ["yes" if len(asked) == 3 else "no"] * len(conversations)

    config = lora.TrainConfig(
        **OVERFITTING, eval_samples=2, eval_max_new_tokens=5, eval_metrics=["exact_match"], load_best_model_at_end=True,
        metric_for_best_model="exact_match", early_stopping_patience=2,
    )  # fmt: skip
    model, data = adapted(), examples(8)
    questions = lora.Questions(conversations, generate)
    result = lora.train(model, data[:4], config, data[4:], tmp_path, progress=False, questions=questions)
    samples = {line["step"]: [sample["answer"] for sample in line["samples"]] for line in result.log if "samples" in line}
    assert samples == {step: ["yes" if step == 4 else "no"] * 2 for step in (0, 2, 4, 6, 8)}
    assert [line["eval_exact_match"] for line in result.log if "eval_loss" in line] == [0, 1, 0, 0]
    kept = lora.load_adapter(tiny_model(tiny_config()), tmp_path / "checkpoint-4")
    assert same(adapter(kept), adapter(model))


def test_answers_that_nobody_can_give_are_told_before_the_first_step(tmp_path):
    config = lora.TrainConfig(**OVERFITTING, eval_metrics=["exact_match"])
    with pytest.raises(ValueError, match="questions are asked at evaluations, which need an eval_dataset"):
        lora.train(adapted(), examples(4), lora.TrainConfig(), progress=False, questions=lora.Questions([], list))
    for questions in (None, lora.Questions([], list)):
        with pytest.raises(ValueError, match="eval_metrics need conversations to evaluate on, questions"):
            lora.train(adapted(), examples(4), config, examples(4), tmp_path / "run", progress=False, questions=questions)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("settings", [{"load_best_model_at_end": True}, {"early_stopping_patience": 1}])
def test_a_best_that_could_never_be_found_is_refused(tmp_path, settings):
    with pytest.raises(ValueError, match="need conversations to evaluate on, and eval_steps"):
        train(adapted(), tmp_path, eval_steps=0, **settings)
    with pytest.raises(ValueError, match="need conversations to evaluate on, and eval_steps"):
        lora.train(adapted(), examples(4), lora.TrainConfig(eval_steps=1, **settings), output_dir=tmp_path)


def test_the_best_needs_a_folder_to_lie_in():
    with pytest.raises(ValueError, match="needs an output_dir"):
        train(adapted(), None, load_best_model_at_end=True)


# 4 conversations in batches of 2: an epoch is 2 batches.


@pytest.mark.parametrize(
    ("strategy", "steps", "accumulated", "due"),
    [
        ("steps", 3, 1, [3, 6]),
        ("steps", 0, 1, []),
        ("no", 1, 1, []),
        ("epoch", 0, 1, [2, 4, 6]),
        ("epoch", 3, 1, [2, 4, 6]),
        ("epoch", 0, 3, [1, 2, 3, 4, 5, 6]),  # 3 of 2 batches: each step ends an epoch
    ],
)
def test_evaluations_and_checkpoints_come_as_their_strategy_says(tmp_path, strategy, steps, accumulated, due):
    settings = {"max_steps": 7, "gradient_accumulation_steps": accumulated, "save_total_limit": 9}
    what = {"eval_strategy": strategy, "eval_steps": steps, "save_strategy": strategy, "save_steps": steps}
    result = train(adapted(), tmp_path, **settings, **what)
    assert [*losses(result)] == [*due, 7]
    assert [int(folder.name.removeprefix("checkpoint-")) for folder in find_checkpoints(tmp_path)] == due


def test_the_best_evaluation_may_be_one_of_each_epochs(tmp_path):
    settings = {"eval_strategy": "epoch", "eval_steps": 0, "load_best_model_at_end": True}
    result = train(adapted(), tmp_path, **settings)
    assert len(losses(result)) == OVERFITTING["num_train_epochs"]
    with pytest.raises(ValueError, match='eval_steps or eval_strategy = "epoch"'):
        train(adapted(), tmp_path, **settings | {"eval_strategy": "no", "eval_steps": 1})


def test_a_run_resumed_from_the_end_of_an_epoch_ends_the_same(tmp_path):
    model, again, settings = adapted(), adapted(), {"max_steps": 6, "save_strategy": "epoch"}
    train(model, tmp_path, **settings)
    train(again, tmp_path, resume=tmp_path / "checkpoint-4", **settings | {"save_strategy": "no"})
    assert same(adapter(model), adapter(again))
