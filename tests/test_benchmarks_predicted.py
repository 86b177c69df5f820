"""The prediction follows its own laws, and counts what a step launches."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers import tiny_config
from without_gpu import counting, interpreting

from benchmarks import bench_predicted, bench_train_step, protocol
from benchmarks.bench_predicted import CASES, GPUS, PEFT, REACHED, launches, parts
from minilora.adapters.trainable import count_parameters

T = 512


@pytest.fixture(scope="module")
def counted():
    return {case: parts(*case, T) for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_a_step_of_four_layers_launches_what_the_first_and_three_more_do(case, counted):
    one, layer = Counter(launches(*case, T, 1)), Counter(counted[case]["layer"])
    assert Counter(launches(*case, T, 4)) == one + layer + layer + layer
    assert layer.total() > 40


def test_a_step_run_by_the_interpreter_launches_the_kernels_that_are_counted():
    config = tiny_config(num_hidden_layers=1, num_key_value_heads=4)
    with interpreting() as launched:
        _, loss = bench_train_step.ours(config, "bfloat16", 4, "cpu")
        loss(torch.ones(1, 4, dtype=torch.int64)).backward()
    with counting(90) as traffic:
        _, loss = bench_train_step.ours(config, "bfloat16", 4, "meta")
        loss(torch.empty(1, 4, dtype=torch.int64, device="meta")).backward()
    kernels = Counter(launch.kernel for launch in traffic.operations if bench_predicted.is_triton(launch.kernel))
    assert kernels == Counter(launch.kernel for launch in launched)
    assert kernels["gemm_kernel"] == 7  # of four projections, forward and to their inputs, but to the embedding's output


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_the_counted_flops_are_those_of_mfu(case, counted):
    config, (adapter, _) = bench_predicted.CONFIG, count_parameters(bench_predicted.model_of_ours())
    C, I, L, r = config.hidden_size, config.intermediate_size, config.num_hidden_layers, bench_train_step.R  # noqa: E741
    if case[0] == "Unsloth":
        widths = 4 * 2 * C + 3 * (C + I)  # N + K of its seven projections; dY B is made twice, and (X A)ᵀ again
        expected = bench_train_step.model_flops(config, 0, T) + 8 * L * T * r * widths
    else:
        expected = bench_train_step.model_flops(config, adapter, T)
        expected -= 2 * T * (sum(config.qkv_sizes.values()) + r) * C  # the embedding's output needs no gradient
    # Eager attention leaves out no half of a product; flash attention makes Q Kᵀ again.
    expected += (6 if "eager" in case[0] else 1) * L * T * T * C
    assert sum(launch.flops for launch in counted[case]["step"]) == expected


@pytest.mark.parametrize("name", GPUS)
def test_no_step_is_faster_than_its_products_at_the_peak(name, counted):
    gpu = GPUS[name]
    for case in CASES:
        products = sum(launch.flops for launch in counted[case]["step"] if "attention" not in launch.kernel)
        assert gpu.kernels(counted[case]["step"]) > products / (gpu.flops * REACHED[name][0])
        assert gpu.step(counted[case]["step"]) >= gpu.host(counted[case]["step"])


@pytest.mark.parametrize("name", GPUS)
def test_each_kind_of_product_has_its_share_of_the_peak(name):
    gpu, (products, triton, attention) = GPUS[name], REACHED[name]
    rates = [gpu.rate(kernel) / gpu.flops for kernel in ("mm", "gemm_kernel", "_scaled_dot_product_flash_attention")]
    assert rates == pytest.approx([products, products * triton, attention])


@pytest.mark.parametrize("name", GPUS)
def test_at_the_same_rate_of_products_ours_is_faster_than_eager(name, counted):
    gpu = replace(GPUS[name], triton=1.0)
    ours, peft = counted["ours", "bfloat16"], counted[PEFT]
    for part in ("layer", "step"):
        assert gpu.step(ours[part]) < gpu.step(peft[part])
        assert gpu.kernels(ours[part]) < gpu.kernels(peft[part])


@pytest.mark.parametrize("name", GPUS)
def test_without_launches_to_pay_for_a_gpu_twice_as_fast_takes_half_the_time(name, counted):
    gpu = replace(GPUS[name], shortest=0.0, torch_launch=0.0, triton_launch=0.0)
    twice = replace(gpu, flops=2 * gpu.flops, bytes=2 * gpu.bytes)
    for case in CASES:
        assert gpu.step(counted[case]["step"]) == pytest.approx(2 * twice.step(counted[case]["step"]))


def test_the_level_is_the_least_share_that_is_enough(counted):
    gpu, ours = GPUS["A100"], counted["ours", "bfloat16"]["step"]
    seconds = gpu.step(counted[PEFT]["step"])
    share = bench_predicted.level(ours, seconds, gpu)
    assert replace(gpu, triton=share).step(ours) <= seconds < replace(gpu, triton=share - 0.01).step(ours)
    assert bench_predicted.level(ours, 0.0, gpu) is None


def test_the_committed_text_is_that_of_the_committed_rows():
    results = protocol.RESULTS
    rows = json.loads((results / "predicted.json").read_text())["rows"]
    assert bench_predicted.report(rows) == (results / "predicted.md").read_text(encoding="utf-8")


def test_the_report_says_that_it_is_no_measurement_and_tells_every_constant(counted, monkeypatch):
    monkeypatch.setattr(bench_predicted, "parts", lambda way, base, tokens: counted[way, base])
    rows = list(bench_predicted.predict(T))
    assert len(rows) == len(CASES) * len(GPUS) * 2
    assert next(row for row in rows if (row["way"], row["base"]) == PEFT)["over_peft"] == 1
    text = bench_predicted.report(rows)
    assert text.count("predicted, not measured") == 6
    assert "| 512 | ours | nf4 | " in text
    gpu = GPUS["A100"]
    assert f"torch · {gpu.torch_launch * 1e6:.0f} µs + launches of Triton · {gpu.triton_launch * 1e6:.0f} µs" in text
    assert f"No kernel takes less than {gpu.shortest * 1e6:.0f} µs" in text
    assert f"DRAM gives {gpu.dram} of its peak" in text
    for products, triton, attention in REACHED.values():
        assert all(f"{share:.2f}" in text.partition("## A whole step")[0] for share in (products, triton, attention))
