"""The benchmarks of single kernels compute what they compare, and say so where there is no GPU; here on tiny CPU tensors."""

import importlib
from dataclasses import replace

import pytest
import torch
from without_gpu import counting, interpreting

from benchmarks import bench_cross_entropy, bench_nf4, bench_rms_norm, bench_rope, bench_swiglu, protocol, timing

KERNELS = ("lora_linear", "rms_norm", "swiglu", "rope", "cross_entropy", "nf4")
PROBLEMS = {
    "rms_norm": lambda: bench_rms_norm.problem(4, 32, "cpu"),
    "swiglu": lambda: bench_swiglu.problem(4, 32, "cpu"),
    "rope": lambda: bench_rope.problem(6, 2, 8, "cpu"),
    "cross_entropy": lambda: bench_cross_entropy.problem(6, 16, 40, "cpu"),
    "quantise": lambda: bench_nf4.quantising("o", 8, 64, "cpu"),
    "dequantise": lambda: bench_nf4.dequantising("o", 8, 64, "cpu"),
    "layer": lambda: bench_nf4.layer("o", 4, 64, 64, "cpu"),
}


@pytest.mark.parametrize("name", [*KERNELS, "train_step"])
def test_without_a_gpu_a_gpu_benchmark_ends_cleanly_with_a_sentence_and_writes_nothing(name, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(protocol, "write", lambda *_: pytest.fail("something was written"))
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.bench_{name}").main()
    assert ended.value.code == 0
    assert capsys.readouterr().out == (
        f"benchmarks {name} measures a GPU, and torch sees no CUDA device here: run it on a machine with one\n"
    )


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_kernels_problem_is_measured_in_every_way(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    with interpreting():  # what Triton alone does
        rows = timing.measure(PROBLEMS[name](), "cpu", warmup=1, rounds=2)
    assert [row["way"] for row in rows][:3] == ["ours", "eager", "torch_compile"]
    assert all(0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"] and row["least_gb_per_s"] > 0 for row in rows)


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_kernel_that_computes_something_else_is_not_timed(name):
    problem = PROBLEMS[name]()
    reference, differs = problem.reference, replace(problem, ours=lambda *inputs: wrong(problem.reference(*inputs)))
    assert replace(problem, ours=reference).error() < timing.TOLERANCE
    with pytest.raises(ValueError, match=r"ours is off by .*; nothing was timed"):
        timing.measure(differs, "cpu")


def test_a_problem_that_fails_is_a_row_that_says_why(monkeypatch):
    def full(*inputs):
        raise torch.OutOfMemoryError("CUDA out of memory\nmore words")

    problem, written = PROBLEMS["swiglu"](), {}
    monkeypatch.setattr(timing, "require_cuda", lambda name: None)
    monkeypatch.setattr(timing, "measure", lambda problem, device: problem.step(problem.ours) or [problem.row | {"way": device}])
    monkeypatch.setattr(protocol, "write", lambda name, rows: written.update({name: rows}))
    timing.main("swiglu", lambda device: [problem, replace(problem, ours=full), problem])
    sizes = {"tokens": 4, "width": 32}
    assert written["swiglu"] == [sizes | {"way": "cuda"}, sizes | {"failed": "CUDA out of memory"}, sizes | {"way": "cuda"}]


def wrong(outputs):
    return tuple(output * 1.05 for output in outputs) if isinstance(outputs, tuple) else outputs * 1.05


@pytest.mark.parametrize("name", KERNELS[1:])
def test_at_true_size_no_less_is_moved_than_the_least(name, monkeypatch):
    """On no device, where launches are counted; the elementwise kernels move hardly more."""
    given = {}
    monkeypatch.setattr(timing, "main", lambda name, problems: given.update({name: problems}))
    importlib.import_module(f"benchmarks.bench_{name}").main()
    with counting(90):
        problems = list(given[name]("meta"))
        assert len(problems) >= 3
        assert all(problem.gradients or not problem.leaves for problem in problems)
    for problem in problems:
        with counting(90) as traffic:
            problem.step(problem.ours)
        assert problem.least <= traffic.total, problem.row
        if name in ("rms_norm", "swiglu", "rope"):
            assert traffic.total < 1.02 * problem.least, problem.row


def test_a_round_takes_each_run_once_in_turn_and_warm_ups_do_not_count():
    taken = []
    found = timing.paired({name: lambda name=name: taken.append(name) for name in "ab"}, "cpu", warmup=2, rounds=3)
    assert taken == list("ab" * 5)
    assert {name: len(rounds) for name, rounds in found.items()} == {"a": 3, "b": 3}


def test_gradients_are_part_of_what_must_agree():
    x = torch.randn(8, requires_grad=True)
    problem = timing.Problem({}, lambda x: x.detach() + 0 * x, lambda x: x, (x,), least=1)
    assert problem.error() == 1
