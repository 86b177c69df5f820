"""The demo's whole path on a tiny random model; that it learns is shown by its run on the real weights."""

import json

import pytest

from minilora.demo import demo


@pytest.fixture(scope="module")
def ran(tmp_path_factory, tiny_checkpoint):
    output = tmp_path_factory.mktemp("runs") / "demo"
    return output, demo.run(output, model_path=tiny_checkpoint, max_steps=2)


def test_the_demo_writes_all_that_it_promises(ran):
    output, _ = ran
    found = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    data = {f"data/{name}.jsonl" for name in ("train", "unseen", "new_phrasings")}
    adapter = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert found == data | adapter | {"log.jsonl", "training_args.json", "summary.json", "report.html"}


def test_the_summary_has_its_figures_and_is_what_was_returned(ran):
    output, summary = ran
    assert json.loads((output / "summary.json").read_text()) == summary
    names = (
        "eval_loss_before", "eval_loss_after", "exact_before", "exact_after", "exact_after_new_phrasings", "seconds_train",
        "seconds_total", "trainable_parameters", "tokens_per_second",
    )  # fmt: skip
    assert summary.keys() >= set(names)
    assert summary["eval_loss_after"] < summary["eval_loss_before"]  # two steps already move a random model
    assert summary["trainable_parameters"] == 2 * 8 * ((32 + 64) + (32 + 32) + (32 + 96) + (48 + 32))


def test_the_log_has_a_line_a_step(ran):
    output, _ = ran
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]


def test_the_demo_says_which_of_the_saved_adapters_answers_came_back(capsys, tmp_path, tiny_checkpoint):
    demo.run(tmp_path / "out", model_path=tiny_checkpoint, max_steps=1)
    said = capsys.readouterr().out
    for how in ("off: 100%", "on: 100%", "merged into the weights: 100%"):
        assert f"adapter {how}" in said


def test_the_demo_over_4_bits_says_so_on_its_page_too(capsys, tmp_path, tiny_checkpoint):
    demo.run(tmp_path / "out", model_path=tiny_checkpoint, max_steps=1, quantize="nf4")
    said = capsys.readouterr().out
    assert "4-bit base (NF4, double quantisation)" in said
    assert "adapter on: 100%" in said
    assert f"--model {tiny_checkpoint} --quantize nf4 --adapter" in said
    assert "4-bit base (NF4, double quantisation)" in (tmp_path / "out" / "report.html").read_text()


def test_exact_is_character_for_character():
    pairs = [("a", '{"x": 1}'), ("b", '{"x": 2}')]
    assert demo.exact(pairs, ['{"x": 1}', '{"x":2}']) == 0.5


def test_another_architecture_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="llama"):
        demo.run(tmp_path / "out", model_path=tmp_path)
    assert not (tmp_path / "out").exists()
