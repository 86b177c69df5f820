import json
import shutil

import pytest
from helpers import examples, tiny_config, tiny_model

import minilora as lora
from minilora.adapters.layers import adapted_layers
from minilora.reporting.runs import Run, by_module, differing, read_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run, its model, and the run's folder."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    model = lora.inject(tiny_model(tiny_config()), lora.LoraConfig(r=2, target_modules=["q_proj", "down_proj", "lm_head"]))
    lora.mark_only_lora_as_trainable(model)
    config = lora.TrainConfig(max_steps=4, save_steps=3, learning_rate=1e-2)
    return lora.train(model, examples(6), config, examples(2), folder, progress=False), model, folder


def test_a_run_is_read_as_it_was_written(trained):
    result, model, folder = trained
    run = read_run(folder)
    assert (run.name, run.log, run.norms_of) == ("first", result.log, "adapter")
    assert run.settings["r"] == 2
    assert run.settings["learning_rate"] == 1e-2
    assert run.points("loss") == [(line["step"], line["loss"]) for line in result.log if "loss" in line]
    assert [line["step"] for line in run.evaluations] == [4]
    layers = adapted_layers(model)
    assert run.norms.keys() == layers.keys()
    for path, layer in layers.items():
        assert run.norms[path] == pytest.approx(layer.delta().norm().item(), rel=1e-4)
        assert run.norms[path] > 0


def test_a_run_that_was_killed_is_read_from_its_newest_checkpoint(trained, tmp_path):
    _, _, folder = trained
    shutil.copytree(folder, tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "adapter")
    with open(tmp_path / "killed" / "log.jsonl", "a") as log:
        log.write('{"step": 5, "lo')
    run = read_run(tmp_path / "killed")
    assert run.norms_of == "checkpoint-3"
    assert run.log == read_run(folder).log
    assert run.norms != read_run(folder).norms


def test_a_run_before_its_first_save_has_a_log_only(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    run = read_run(tmp_path)
    assert (run.log, run.settings, run.norms) == ([{"step": 1, "loss": 2.0}], {}, {})


@pytest.mark.parametrize("line", ["no JSON", "[1]", '{"loss": 1}'])
def test_a_broken_line_is_named(tmp_path, line):
    (tmp_path / "log.jsonl").write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl:2 is broken"):
        read_run(tmp_path)


def test_a_folder_without_a_log_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must be the output folder of a run, and holds no log\.jsonl"):
        read_run(tmp_path)


def test_norms_are_sorted_by_module_and_layer():
    norms = {"model.layers.0.mlp.down_proj": 1.0, "model.layers.10.mlp.down_proj": 2.0, "lm_head": 3.0, "net.0": 4.0}
    assert by_module(norms) == ({"mlp.down_proj": {0: 1.0, 10: 2.0}}, {"lm_head": 3.0, "net.0": 4.0})


def test_only_settings_that_differ_are_compared():
    first, second = Run("a", [], {"r": 2, "seed": 0}, {}), Run("b", [], {"r": 4, "seed": 0, "x": 1}, {})
    assert differing([first, second]) == {"r": [2, 4], "x": ["—", 1]}
    assert json.dumps(differing([first, first])) == "{}"
