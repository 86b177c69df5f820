"""What the benchmarks measure by is itself right: the checkpoint that one writes, the results that another reads."""

import json

import pytest
import torch
from helpers import tiny_config
from without_gpu import counting

from benchmarks import (
    bench_compiled,
    bench_drift,
    bench_family,
    bench_lines,
    bench_lora_linear,
    bench_parity,
    bench_parts,
    bench_plan,
    bench_qlora,
    bench_static,
    bench_true_size,
)
from benchmarks.peers.case import Case
from minilora import phi3
from minilora.adapters.trainable import count_parameters
from minilora.kernels import cross_entropy
from minilora.training import planning


def test_the_checkpoint_of_true_size_is_that_of_phi_3_mini():
    with torch.device("meta"):
        model = phi3.Phi3ForCausalLM(bench_true_size.PHI_3_MINI)
    assert count_parameters(model)[1] == 3_821_079_552


def test_a_checkpoint_written_tensor_by_tensor_is_loaded(tmp_path):
    written = bench_true_size.write_checkpoint(tiny_config(), tmp_path, shard_bytes=40_000)
    model = phi3.load(tmp_path)
    assert model.config == tiny_config(original_max_position_embeddings=1024)
    assert len(written["shards"]) == len(list(tmp_path.glob("*.safetensors"))) == 2
    assert written["parameters"] * 2 == written["weight_bytes"] == sum(p.nbytes for p in model.parameters())
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        spread = 0 if name.endswith("norm.weight") else 0.02
        assert abs(parameter.float().std() - spread) < 0.002, name


def test_both_sides_of_the_qlora_benchmark_take_the_same_step(tmp_path, capsys):
    config = tiny_config(hidden_size=64, intermediate_size=128, original_max_position_embeddings=1024)
    bench_true_size.write_checkpoint(config, tmp_path, shard_bytes=10**9)
    found = {}
    for side in bench_qlora.SIDES:
        bench_qlora.run(side, "train", str(tmp_path), "float32")
        found[side] = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert found[side]["peak_memory_bytes"] >= found[side]["import_bytes"] > 10**8
    ours, theirs = (row["loss"] for row in found.values())
    assert ours == pytest.approx(theirs, rel=1e-2)  # the rest of theirs is in bfloat16
    assert ours > 1


def test_the_qlora_benchmark_trains_beside_each_base(tiny_checkpoint):
    rows = {row["way"]: row for row in bench_qlora.quality(tiny_checkpoint, max_steps=1)}
    plain, four_bit, loftq = rows.values()
    assert rows.keys() == bench_qlora.WAYS.keys()
    assert (
        plain["perplexity"] == plain["perplexity_at_the_start"] != four_bit["perplexity"] == four_bit["perplexity_at_the_start"]
    )
    assert loftq["perplexity"] == four_bit["perplexity"] != loftq["perplexity_at_the_start"]
    assert all(row["eval_loss_after"] < row["eval_loss_before"] for row in rows.values())


REPORT = """
<testsuites><testsuite>
  <testcase name="test_the_config_is_read[phi-4]" time="1.5" />
  <testcase name="test_logits_of_one[phi-4-mini]" time="0.25" />
  <testcase name="test_logits_of_one[bfloat16-phi-4-mini]" time="0.25"><skipped /></testcase>
  <testcase name="test_logits_of_two[phi-4]" time="0"><failure /></testcase>
  <testcase name="test_the_cache[phi-4-mini-token by token]" time="0"><error /></testcase>
  <testcase name="test_the_template_masks[phi-4-reasoning]" time="0" />
  <testcase name="test_logits_of_nobody[phi-44]" time="0" />
  <testcase name="test_logits_of_nobody" time="0" />
</testsuite></testsuites>
"""


def test_results_are_counted_for_the_variant_and_the_column_in_their_names():
    rows = {row.pop("variant"): row for row in bench_family.read_report(REPORT)}
    nothing = {column: {} for column in ("config read", "logits", "gradients", "cache", "template", "save")} | {"seconds": 0}
    assert rows.keys() == set(bench_family.VARIANTS)
    assert rows["phi-4"] == nothing | {"config read": {"passed": 1}, "logits": {"failed": 1}, "seconds": 1.5}
    assert rows["phi-4-mini"] == nothing | {"logits": {"passed": 1, "skipped": 1}, "cache": {"failed": 1}, "seconds": 0.5}
    assert rows["phi-4-reasoning"] == nothing | {"template": {"passed": 1}}
    assert rows["phi-3-mini-4k"] == nothing


def test_the_table_is_ticked_only_where_every_test_passes():
    lines = bench_family.table(bench_family.read_report(REPORT)).splitlines()
    assert lines[0] == "| variant | config read | logits | gradients | cache | template | save |"
    assert lines[1].count("---") == 7
    (row,) = (line for line in lines if line.startswith("| phi-4 |"))
    assert row == "| phi-4 | ✓ 1 | ✗ 1 failed | ✗ no test | ✗ no test | ✗ no test | ✗ no test |"
    assert "| ✗ 1 skipped, 1 passed |" in next(line for line in lines if line.startswith("| phi-4-mini |"))


def test_every_way_that_the_layer_benchmark_times_computes_the_same():
    problem = bench_lora_linear.Problem(64, 48, 40, 8, dropout=0.05, device="cpu")
    for way in ("ours", "eager", "addmm", "peft"):
        assert problem.error(way) < bench_lora_linear.TOLERANCE, way
    assert problem.error("frozen") > 10 * bench_lora_linear.TOLERANCE


def test_the_static_benchmark_counts_what_every_way_moves():
    line = bench_static.roofline("o", dropout=0.0)
    assert 1 < line["ours bytes / least"] < line["eager_peft bytes / least"]
    step = bench_static.Step("o", 0.0)
    with counting(90) as traffic:
        step.frozen()
    M, (N, K) = bench_static.M, bench_static.LAYERS["o"]
    assert sum(operation.flops for operation in traffic.operations) == 4 * M * N * K
    kernels = bench_static.machine_code(80, "o", 0.05)
    assert [row["kernel"] for row in kernels] == ["down", "gemm", "sweep", "gemm", "outer"]


def test_the_static_benchmark_shows_where_a_4_bit_weight_is_dequantised():
    few, many = bench_static.roofline_nf4("o", 16), bench_static.roofline_nf4("o", bench_static.M)
    assert 0.25 < few["4-bit bytes / 16-bit"] < 0.5 < 1 < many["4-bit bytes / 16-bit"]
    kernels = [row["kernel"] for row in bench_static.machine_code_nf4(80, "o")]
    assert kernels == ["expand", "gemm_nf4", "expand", "gemm_nf4 of dX"] * 2 + ["expand", "dequantize", "gemm"] * 2


@pytest.mark.parametrize("name", bench_static.ELEMENTWISE)
def test_the_static_benchmark_counts_what_elementwise_operations_move(name):
    line = bench_static.elementwise(name)
    assert 1 <= line["ours bytes / least"] < 1.02
    assert line["eager bytes / least"] > 1.4
    assert not any(line[f"spilled bytes on sm_{arch}"] for arch in (80, 89, 90))


def test_a_compiled_step_is_held_to_the_plain_one(tmp_path, monkeypatch):
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path))
    row = bench_compiled.measure(Case("tiny", 16), rounds=1, how={"backend": "aot_eager"})
    assert row["error"] < 1e-6
    assert row["compiled_over_eager"] == row["seconds_compiled"] / row["seconds_eager"]


def test_the_parts_of_a_step_are_told_over_its_frozen_products(tmp_path, monkeypatch):
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path))
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    row = bench_parts.measure(Case("tiny", 16, threads=1), rounds=1)
    parts = {"attention", "norms, rotation, SwiGLU", "adapter's products"}
    assert row["over_floor"].keys() == {"step", bench_parts.BFLOAT16, "frozen products", *parts}
    assert row["over_floor"]["frozen products"] == 1
    assert all(0 < row["seconds"][name] < row["seconds"]["step"] for name in parts)
    line = bench_parts.table([row]).splitlines()[-1]
    assert line.startswith("| tiny, 2 × 16 | 0.0")
    assert line.count("|") == 8


def test_the_drift_benchmark_holds_each_way_to_float32(tiny_checkpoint, tmp_path):
    rows = bench_drift.drift(tiny_checkpoint, tmp_path, steps=2, every=2)
    assert [(row["way"], row["step"]) for row in rows] == [(way, 2) for way in bench_drift.WAYS]
    exact, base, both = rows
    assert exact["adapter_distance"] == exact["train_loss_distance"] == 0
    assert 1e-5 < base["train_loss_distance"] < 0.1
    assert 1e-3 < base["adapter_distance"] < 1
    assert 1e-3 < both["adapter_distance"] < 1
    assert all((tmp_path / way.replace(" ", "-") / "report.html").exists() for way in bench_drift.WAYS)
    assert (tmp_path / "compared.html").exists()


PARITY = """
<testsuites><testsuite>
  <testcase classname="tests.test_adapters_layers" name="test_linear_computes_as_loralib_does" time="1" />
  <testcase classname="tests.test_adapters_layers" name="test_linear_computes_as_loralib_does[a]" time="1"><failure /></testcase>
  <testcase classname="tests.test_adapters_adapter_files" name="test_transformers_and_peft_read_it[x]" time="1" />
  <testcase classname="tests.test_adapters_adapter_files" name="test_we_read_pefts_adapter" time="1" />
  <testcase classname="tests.test_adapters_adapter_files" name="test_a_file_is_whole[loralib]" time="1" />
  <testcase classname="tests.test_loralib" name="test_biases" time="1" />
  <testcase classname="tests.test_data_encoding" name="test_lines" time="1" />
</testsuite></testsuites>
"""


def test_parity_is_counted_for_the_room_of_the_file_and_the_library_in_the_name():
    rows = {row.pop("room"): row for row in bench_parity.read_report(PARITY)}
    assert rows == {
        "adapters/layers": {"loralib": {"passed": 1, "failed": 1}, "peft": {}, "transformers": {}},
        "adapters/adapter_files": {"loralib": {}, "peft": {"passed": 2}, "transformers": {"passed": 1}},
        "loralib": {"loralib": {"passed": 1}, "peft": {}, "transformers": {}},
    }
    lines = bench_parity.table(bench_parity.read_report(PARITY)).splitlines()
    assert lines[0] == "| room | loralib | peft | transformers |"
    assert lines[2:4] == ["| adapters/layers | ✗ 1 failed, 1 passed |  |  |", "| adapters/adapter_files |  | ✓ 2 | ✓ 1 |"]


def test_lines_are_counted_of_the_library_alone():
    ours, loralib, peft = bench_lines.count()
    assert {"layers", "embedding", "convolution", "injection", "adapter_files"} <= ours["files"].keys()
    assert not {"cli", "demo", "loop"} & ours["files"].keys()
    assert set(loralib["files"]) == {"__init__.py", "layers.py", "utils.py"}
    assert loralib["lines"] < ours["lines"] < peft["lines"] / 4
    assert bench_lines.table([loralib]).splitlines()[2].startswith("| loralib 0.1.2 | 3 | ")


def test_every_lever_is_planned_and_then_measured(monkeypatch, tiny_checkpoint, capsys):
    monkeypatch.setattr(planning, "SECONDS", 0.0)
    for changes in bench_plan.LEVERS.values():
        monkeypatch.setattr(cross_entropy, "CHUNK", cross_entropy.CHUNK)  # put back as it was when the test ends
        row = {}
        for part in (bench_plan.foretell, bench_plan.run):
            part(str(tiny_checkpoint), bench_plan.PLAIN | changes)
            row |= json.loads(capsys.readouterr().out.splitlines()[-1])
        assert row["planned_bytes"] > 0
        assert row["measured_seconds"] > 0
    assert bench_plan.cells({"lever": "none"} | row | {"planned_bytes": 11e6, "measured_bytes": 10e6})[:4] == [
        "none",
        "11",
        "10",
        "+10%",
    ]
