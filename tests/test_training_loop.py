import json
import math
import re

import pytest
import torch
import transformers
from helpers import examples, rms_error, tiny_config, tiny_model
from torch import nn

import minilora as lora
from minilora.training.loop import accumulate_gradients, rate, step_seed, total_steps

SCHEDULES = ["cosine", "linear", "constant", "constant_with_warmup"]
CLOCK = {"seconds", "tokens_per_second", "memory"}  # of the log: what no two runs share


def adapted(**settings):
    """A tiny Phi-3 with a fresh adapter that alone is to learn."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = lora.inject(tiny_model(tiny_config()), lora.LoraConfig(**{"r": 4, "lora_alpha": 8} | settings))
    lora.mark_only_lora_as_trainable(model)
    return model


def config(**settings) -> lora.TrainConfig:
    return lora.TrainConfig(**{"learning_rate": 1e-2, "per_device_train_batch_size": 2} | settings)


def train(model, dataset=None, output_dir=None, eval_dataset=None, base=None, **settings):
    return lora.train(model, dataset or examples(), config(**settings), eval_dataset, output_dir, base, progress=False)


def adapter(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in lora.lora_state_dict(model).items()}


def same(first: dict, second: dict) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


# The gradient of a step


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_steps_gradient_does_not_depend_on_how_its_examples_are_split(dtype):
    model = adapted().to(dtype)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, 0.0, 0.3, torch.Generator().manual_seed(1))
    model.train()
    dataset = examples(8)
    counts = [sum(example.mask) for example in dataset]
    assert len(set(counts)) > 4  # unlike, so that a mean of means would be another gradient
    found = {}
    for size in (8, 4, 2, 1):
        model.zero_grad()
        loss, tokens = accumulate_gradients(model, [dataset[i : i + size] for i in range(0, 8, size)])
        assert tokens == sum(len(example.ids) for example in dataset)
        found[size] = loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    tolerance = 2e-6 if dtype == torch.float32 else 1e-12  # of two gradients that are each off by 1e-6 at most
    for size in (4, 2, 1):
        assert found[size][0] == pytest.approx(found[8][0], rel=1e-6)
        for name, gradient in found[size][1].items():
            assert rms_error(gradient, found[8][1][name]) < tolerance, name


def test_gradients_of_a_step_add_to_what_is_there():
    model, batches = adapted(), [examples(2)]
    accumulate_gradients(model, batches)
    once = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    accumulate_gradients(model, batches)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, 2 * once[name]), name


def test_accumulated_batches_train_as_one_batch_of_their_size():
    whole, parts = adapted(), adapted()
    first = train(whole, per_device_train_batch_size=4, gradient_accumulation_steps=1, max_steps=2)
    second = train(parts, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2)
    assert first.steps == second.steps == 2
    for one, other in zip(first.log, second.log, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


def test_every_step_of_every_process_draws_from_a_seed_of_its_own():
    seeds = {step_seed(seed, step, rank) for seed in (-1, 0, 2) for step in range(20) for rank in range(5)}
    assert len(seeds) == 300
    assert step_seed(2, 7, 1) == step_seed(2, 7, 1)


# The schedule


@pytest.mark.parametrize(
    ("examples", "settings", "steps"),
    [
        (8, {"per_device_train_batch_size": 2}, 4),
        (9, {"per_device_train_batch_size": 2}, 5),
        (9, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, 3),
        (9, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 2}, 5),
        (8, {"per_device_train_batch_size": 2, "num_train_epochs": 2.5}, 10),
        (8, {"per_device_train_batch_size": 2, "num_train_epochs": 0.01}, 1),
        (8, {"per_device_train_batch_size": 2, "max_steps": 3}, 3),
        (8, {"per_device_train_batch_size": 2, "max_steps": 100}, 100),
        (1, {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 8}, 1),
    ],
)
def test_a_run_has_max_steps_or_else_the_steps_of_its_epochs(examples, settings, steps):
    assert total_steps(examples, lora.TrainConfig(**settings)) == steps


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("total", [1, 7, 100])
@pytest.mark.parametrize("warmup_ratio", [0, 0.1, 0.2, 1])
def test_the_rate_rises_by_equal_parts_and_then_goes_on_as_in_transformers(kind, total, warmup_ratio):
    settings = lora.TrainConfig(lr_scheduler_type=kind, warmup_ratio=warmup_ratio)
    warmup = math.ceil(warmup_ratio * total)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    law = transformers.get_scheduler(kind, optimizer, warmup, total).lr_lambdas[0]
    for step in range(total):
        rises = kind != "constant" and step < warmup
        expected = (step + 1) / warmup if rises else law(step)  # theirs would waste the first step
        assert rate(step, total, settings) == pytest.approx(expected, abs=1e-12)
    assert rate(total, total, settings) == pytest.approx(float("constant" in kind), abs=1e-12)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_the_rate_rises_to_its_peak_and_falls_from_it(kind):
    settings = lora.TrainConfig(lr_scheduler_type=kind, warmup_ratio=0.3)
    rates = [rate(step, 20, settings) for step in range(20)]
    assert rates[:6] == sorted(rates[:6])
    assert rates[6:] == sorted(rates[6:], reverse=True)
    assert max(rates) == rates[5] == 1
    assert all(0 < rate <= 1 for rate in rates)  # no step is wasted


@pytest.mark.parametrize("kind", SCHEDULES)
def test_every_step_is_taken_at_the_rate_of_the_schedule(kind):
    settings = {"lr_scheduler_type": kind, "warmup_ratio": 0.5, "num_train_epochs": 2, "learning_rate": 0.003}
    result = train(adapted(), **settings)
    assert [line["step"] for line in result.log] == list(range(1, 9))
    for line in result.log:
        assert line["learning_rate"] == pytest.approx(0.003 * rate(line["step"] - 1, 8, config(**settings)))


# What a run does


def test_a_memorisable_set_is_memorised():
    dataset = examples(4)
    # With the head: a frozen one bounds the logits, and the loss from below.
    model = adapted(target_modules=["q_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"], r=8, lora_alpha=16)
    before = lora.evaluate(model, dataset, progress=False).loss
    result = train(model, dataset, learning_rate=2e-2, per_device_train_batch_size=4, num_train_epochs=40)
    after = lora.evaluate(model, dataset, progress=False).loss
    assert result.log[0]["loss"] == pytest.approx(before, rel=1e-3)
    assert before > 4
    assert after < 0.1


@pytest.mark.parametrize("lora_dropout", [0.0, 0.3])
def test_two_identical_runs_end_bitwise_equal(lora_dropout):
    first, second, other = (adapted(lora_dropout=lora_dropout) for _ in range(3))
    start = adapter(first)
    torch.manual_seed(123)  # what came before a run must not matter
    logs = [train(model, seed=seed).log for model, seed in [(first, 5), (second, 5), (other, 6)]]
    assert same(adapter(first), adapter(second))
    assert not same(adapter(first), adapter(other))
    assert not same(adapter(first), start)
    without_clock = [[{key: value for key, value in line.items() if key not in CLOCK} for line in log] for log in logs]
    assert without_clock[0] == without_clock[1] != without_clock[2]


def test_dropout_changes_a_run():
    models = [adapted(lora_dropout=p) for p in (0.0, 0.5)]
    for model in models:
        train(model)
    assert not same(*map(adapter, models))


def test_the_base_never_changes():
    model = adapted(lora_dropout=0.1)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}
    learnt = adapter(model)
    train(model, weight_decay=0.1)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in base.items())
    assert all(not torch.equal(after[name], tensor) for name, tensor in learnt.items())


def test_evaluations_and_saves_do_not_change_a_run(tmp_path):
    plain, watched = adapted(lora_dropout=0.3), adapted(lora_dropout=0.3)
    train(plain)
    train(watched, eval_dataset=examples(3), output_dir=tmp_path, eval_steps=1, save_steps=1, logging_steps=3)
    assert same(adapter(plain), adapter(watched))


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_gradient_checkpointing_computes_every_layer_again_and_changes_no_bit(gradient_checkpointing):
    plain, model, forwards = adapted(lora_dropout=0.3), adapted(lora_dropout=0.3), []
    model.model.layers[0].register_forward_pre_hook(lambda *_: forwards.append(None))
    train(plain, max_steps=3)
    train(model, max_steps=3, gradient_checkpointing=gradient_checkpointing)
    assert len(forwards) == (6 if gradient_checkpointing else 3)
    assert same(adapter(plain), adapter(model))


def test_long_gradients_are_cut_to_the_norm():
    start, cut, whole = adapter(adapted()), adapted(), adapted()
    lines = [train(model, max_steps=1, max_grad_norm=norm).log[0] for model, norm in [(cut, 1e-12), (whole, 1e12)]]
    assert lines[0]["grad_norm"] == lines[1]["grad_norm"] > 1e-3  # before the cut
    for name, tensor in adapter(cut).items():  # AdamW's ε outweighs so short a gradient: the step all but vanishes
        assert (tensor - start[name]).abs().max() < 1e-5
    assert any((tensor - start[name]).abs().max() > 5e-3 for name, tensor in adapter(whole).items())


def test_weight_decay_shrinks_what_has_no_gradient_yet():
    start, model = adapter(adapted()), adapted()
    train(model, max_steps=1, learning_rate=0.1, weight_decay=0.5)
    for name, tensor in adapter(model).items():
        if "lora_A" in name:  # at the start lora_B is zero, and with it the gradient of lora_A
            assert rms_error(tensor, 0.95 * start[name]) < 1e-6, name


def test_no_gradient_of_one_step_reaches_the_next():
    dataset = examples(4)
    # So small a step moves nothing that shows: the same batch has the same gradient at every step.
    result = train(adapted(), dataset, per_device_train_batch_size=4, num_train_epochs=3, learning_rate=1e-9, max_grad_norm=1e9)
    norms = [line["grad_norm"] for line in result.log]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-3)


def test_every_example_is_seen_once_an_epoch():
    dataset = examples(7)
    result = train(adapted(), dataset, num_train_epochs=3)
    assert result.tokens == 3 * sum(len(example.ids) for example in dataset)
    assert result.steps == 3 * 4
    assert result.seconds > 0


# What a run writes


def test_the_log_on_disk_is_the_log_that_is_returned(tmp_path):
    result = train(adapted(), output_dir=tmp_path / "new" / "run", eval_dataset=examples(3), eval_steps=3)
    lines = [json.loads(line) for line in (tmp_path / "new" / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines == result.log
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4]
    keys = ["step", "loss", "learning_rate", "grad_norm", "tokens", "seconds", "tokens_per_second", "memory"]
    assert all(list(line) == keys for line in training)
    assert training[-1]["tokens"] == result.tokens
    evaluations = [line for line in lines if "loss" not in line]
    assert all(list(line) == ["step", "eval_loss", "eval_perplexity"] for line in evaluations)


@pytest.mark.parametrize(("logging_steps", "steps"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (5, [5]), (100, [5])])
def test_the_log_has_a_line_every_logging_steps_and_for_the_last_step(logging_steps, steps):
    result = train(adapted(), examples(10), logging_steps=logging_steps)
    assert [line["step"] for line in result.log] == steps


@pytest.mark.parametrize(("eval_steps", "steps"), [(0, [5]), (2, [2, 4, 5]), (5, [5]), (100, [5])])
def test_evaluation_comes_every_eval_steps_and_at_the_end(eval_steps, steps):
    model, unseen = adapted(), examples(12)[10:]
    result = train(model, examples(10), eval_dataset=unseen, eval_steps=eval_steps)
    evaluations = [line for line in result.log if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == steps
    final = lora.evaluate(model, unseen, progress=False)
    assert (evaluations[-1]["eval_loss"], evaluations[-1]["eval_perplexity"]) == (final.loss, final.perplexity)


def test_the_adapter_at_the_end_is_the_models(tmp_path):
    model = adapted()
    train(model, output_dir=tmp_path, base="some/base")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "log.jsonl", "training_args.json"]
    loaded = lora.load_adapter(tiny_model(tiny_config()), tmp_path / "adapter")
    assert same(adapter(loaded), adapter(model))
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"


@pytest.mark.parametrize(("save_total_limit", "kept"), [(1, [8]), (2, [6, 8]), (100, [2, 4, 6, 8])])
def test_the_latest_checkpoints_are_kept(tmp_path, save_total_limit, kept):
    train(adapted(), output_dir=tmp_path, per_device_train_batch_size=1, num_train_epochs=1.25, save_steps=2,
          save_total_limit=save_total_limit)  # fmt: skip
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(["adapter", "log.jsonl", "training_args.json", *(f"checkpoint-{step}" for step in kept)])


def test_a_checkpoint_holds_the_weights_after_its_step(tmp_path):
    whole, part = adapted(lora_dropout=0.3), adapted(lora_dropout=0.3)
    train(whole, output_dir=tmp_path, save_steps=2, lr_scheduler_type="linear", warmup_ratio=1)
    # At warmup_ratio 1 step i of n has the rate i/n: half as many steps at half the rate are the first half of the run.
    train(part, max_steps=2, learning_rate=5e-3, lr_scheduler_type="linear", warmup_ratio=1)
    saved = lora.load_adapter(tiny_model(tiny_config()), tmp_path / "checkpoint-2")
    assert same(adapter(saved), adapter(part))


def test_a_run_in_the_folder_of_an_unfinished_one_is_refused_before_training(tmp_path):
    train(adapted(), output_dir=tmp_path, per_device_train_batch_size=1, save_steps=6)
    model = adapted()
    start = adapter(model)
    with pytest.raises(FileExistsError, match="holds checkpoint-6 of an earlier run: resume it"):
        train(model, output_dir=tmp_path, save_steps=2)
    assert same(adapter(model), start)
    assert (tmp_path / "checkpoint-6").is_dir()


# What ends a run


def test_a_loss_that_is_not_finite_ends_the_run_with_the_last_good_adapter(tmp_path):
    good, model = adapted(), adapted()
    train(good, max_steps=1, learning_rate=1e30)
    expected = f"step 2: loss nan .*the weights stay those of step 1, saved in {re.escape(str(tmp_path / 'adapter'))}"
    with pytest.raises(FloatingPointError, match=expected):
        train(model, output_dir=tmp_path, learning_rate=1e30)
    assert same(adapter(model), adapter(good))
    saved = adapter(lora.load_adapter(tiny_model(tiny_config()), tmp_path / "adapter"))
    assert same(saved, adapter(good))
    assert all(tensor.isfinite().all() for tensor in saved.values())
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1]


def test_a_gradient_that_is_not_finite_ends_the_run_with_the_last_good_adapter(tmp_path):
    good, model, calls = adapted(), adapted(), []

    def poison(gradient):
        calls.append(None)
        return gradient * math.inf if len(calls) == 3 else gradient

    model.model.layers[1].mlp.down_proj.lora_B.register_hook(poison)
    settings = {"lr_scheduler_type": "linear", "warmup_ratio": 1}
    train(good, max_steps=2, learning_rate=5e-3, **settings)  # the first half of the run below
    with pytest.raises(FloatingPointError, match=r"step 3: loss \d.* gradient norm (inf|nan) must be finite"):
        train(model, output_dir=tmp_path, max_steps=4, learning_rate=1e-2, **settings)
    assert same(adapter(model), adapter(good))
    assert same(adapter(lora.load_adapter(tiny_model(tiny_config()), tmp_path / "adapter")), adapter(good))


def test_a_first_step_that_is_not_finite_leaves_the_model_as_it_was():
    model = adapted()
    start = adapter(model)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"step 1: loss nan .*those of step 0\. Lower learning_rate"):
        train(model)
    assert same(adapter(model), start)


def test_without_data_or_anything_to_train_no_run_starts(tmp_path):
    message = "training needs at least one conversation and one trainable parameter"
    with pytest.raises(ValueError, match=message):
        lora.train(adapted(), [], config(), output_dir=tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        train(adapted().requires_grad_(False), output_dir=tmp_path / "run")
    assert not list(tmp_path.iterdir())


def assert_no_step_was_taken(model, before, tmp_path):
    assert same(dict(model.state_dict()), before)
    assert not list(tmp_path.iterdir())


def test_a_model_without_adapter_is_refused_an_output_dir_before_training(tmp_path):
    model = tiny_model(tiny_config())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="output_dir takes adapters, and the model has none"):
        train(model, output_dir=tmp_path / "run")
    assert_no_step_was_taken(model, before, tmp_path)
    train(model, max_steps=1)  # in memory anything may be trained


def test_an_adapter_folder_that_holds_other_files_is_refused_before_training(tmp_path):
    model = adapted()
    start = adapter(model)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):  # it could not be replaced at the end, and the run would be lost
        train(model, output_dir=tmp_path)
    assert same(adapter(model), start)


def test_what_an_adapter_cannot_hold_is_refused_an_output_dir_before_training(tmp_path):
    model = adapted(target_modules=["o_proj"])
    model.lm_head.weight.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"lm_head\.weight"):  # trained, and then left out of what is saved
        train(model, output_dir=tmp_path / "run")
    assert_no_step_was_taken(model, before, tmp_path)


def test_gradient_checkpointing_is_refused_where_the_model_has_none():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(260, 4)
            self.head = lora.Linear(4, 260)

        def forward(self, input_ids, labels):
            logits = self.head(self.embed(input_ids))[:, :-1]
            return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())

    train(Plain(), max_steps=1)
    with pytest.raises(ValueError, match="gradient_checkpointing needs a model"):
        train(Plain(), max_steps=1, gradient_checkpointing=True)


def test_loraplus_moves_only_B_further():
    """AdamW's first step is the learning rate in every element, whatever the gradient; A has none before B moves."""
    start, plain, plus = adapter(adapted()), adapted(), adapted()
    train(plain, max_steps=1, max_grad_norm=1e9)
    train(plus, max_steps=1, max_grad_norm=1e9, loraplus_lr_ratio=4.0)
    for name, tensor in adapter(plus).items():
        moved, expected = tensor - start[name], adapter(plain)[name] - start[name]
        assert rms_error(moved, 4 * expected if name.endswith("lora_B") else expected) < 1e-5, name


def test_what_is_saved_with_the_adapter_may_be_trained_along(tmp_path):
    model = adapted(modules_to_save=["lm_head"])
    before = model.lm_head.weight.detach().clone()
    train(model, output_dir=tmp_path, max_steps=2)
    assert not torch.equal(model.lm_head.weight, before)
    loaded = lora.load_adapter(tiny_model(tiny_config()), tmp_path / "adapter")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
