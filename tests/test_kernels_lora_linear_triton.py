"""The Triton kernels without a GPU: right by the interpreter under guard, sound by their machine code, lean by their bytes."""

import pytest
import torch
from helpers import rms_error
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_linear_cases import TENSORS, TOLERANCE, assert_equals_reference, make_case, run, slices_of, tensors_of
from without_gpu import DRAM_RATE, SHARED_LIMIT, MemoryFault, compiling, counting, interpreting, planted

from minilora.kernels import lora_linear_torch, lora_linear_triton, tiles
from minilora.kernels.dropout import draw_seed
from minilora.kernels.lora_linear import backward, forward, lora_linear

ARCHS = (80, 89, 90)
LAYERS = {
    "qkv": (9216, 3072),
    "o": (3072, 3072),
    "gate_up": (16384, 3072),
    "down": (3072, 8192),
    "odd": (3071, 3070),
}  # N, K of Phi-3-mini
QKV = ((0, 3072), (3072, 6144), (6144, 9216))


# ── right ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@st.composite
def exact_cases(draw):
    """From one element to several tiles in every dimension, in whole numbers, which float32 adds without rounding."""
    M, K, N, R = (draw(st.sampled_from(sizes)) for sizes in ([1, 2, 40, 130], [1, 5, 64, 131], [1, 40, 129, 300], [1, 4, 17, 70]))
    seed, slices = draw(st.integers(0, 2**31)), draw(slices_of(N))
    torch.manual_seed(seed)
    inputs, dy, slices = tensors_of(M, N, K, R, slices, bias=draw(st.booleans()))
    inputs, dy = [t if t is None else (2 * t).round().clamp(-3, 3) for t in inputs], (2 * dy).round()
    if draw(st.booleans()):
        inputs[0] = inputs[0].T.contiguous().T
    if draw(st.booleans()):
        dy = torch.stack([dy, dy], dim=-1)[..., 0]
    return inputs, dy, slices, torch.tensor(seed), draw(st.sampled_from([0.0, 0.5, 0.75]))  # whose 1 / (1 − p) is whole


@settings(max_examples=40)
@given(exact_cases(), st.sampled_from(ARCHS))
def test_whole_numbers_give_the_equation_exactly_for_any_shape(case, arch):
    inputs, dy, slices, seed, dropout = case
    expected = run(lora_linear_torch, [t if t is None else t.double() for t in inputs], dy.double(), slices, seed, 2.0, dropout)
    with interpreting(arch):
        found = run(lora_linear_triton, inputs, dy, slices, seed, 2.0, dropout)
    assert all(torch.equal(one.double(), other) for one, other in zip(found, expected, strict=True))


@st.composite
def rounded_cases(draw):
    """Sizes at which every intermediate has 32 numbers or more: one alone may cancel, and have any relative error."""
    dtypes = [(torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2, (torch.float16, torch.float32)]
    N = draw(st.sampled_from([64, 129, 300]))
    slices = draw(slices_of(N))
    if slices and sum(stop - start for start, stop in slices) < 32:
        slices = None
    return make_case(
        draw(st.sampled_from([(40,), (130,), (3, 50)])),
        draw(st.sampled_from([40, 64, 200])),
        N,
        draw(st.sampled_from([4, 16, 70])),
        slices,
        *draw(st.sampled_from(dtypes)),
        bias=draw(st.booleans()),
        layout=draw(st.sampled_from(["contiguous", "transposed", "strided"])),
        expanded=False,
        scaling=draw(st.sampled_from([1.0, 0.25, -1.5])),
        dropout=draw(st.sampled_from([0.0, 0.1, 0.6])),
        seed=draw(st.integers(0, 2**31)),
    )  # fmt: skip


@settings(max_examples=25)
@given(rounded_cases(), st.sampled_from(ARCHS))
def test_value_and_every_gradient_stay_within_rounding_of_the_float64_reference(case, arch):
    with interpreting(arch) as launches:
        assert_equals_reference(case)
    assert launches


def test_no_rows_at_all_give_empty_results_and_zero_gradients():
    inputs, dy, slices = tensors_of(0, 40, 24, 4)
    with interpreting() as launches:
        y, s, dx, dA, dB = run(lora_linear_triton, inputs, dy, slices)
    assert (y.shape, s.shape, dx.shape) == ((0, 40), (0, 4), (0, 24))
    assert not dA.any()
    assert not dB.any()
    assert {launch.kernel for launch in launches} <= {"outer_kernel"}


def test_a_run_repeats_bit_for_bit():
    inputs, dy, slices = tensors_of(300, 1104, 40, 4, ((0, 1050), (1050, 1104)), torch.bfloat16)
    with interpreting() as launches:
        first = run(lora_linear_triton, inputs, dy, slices, torch.tensor(9), dropout=0.3)
        again = run(lora_linear_triton, inputs, dy, slices, torch.tensor(9), dropout=0.3)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert any(launch.kernel == "sweep_kernel" for launch in launches)


@pytest.mark.parametrize(
    ("wanted", "kernels"),
    [
        ({"x"}, ["down", "gemm"]),
        ({"lora_A"}, ["down", "outer"]),
        ({"lora_B"}, ["outer"]),
        ({"lora_A", "lora_B"}, ["sweep", "outer"]),
        ({"x", "lora_A", "lora_B"}, ["sweep", "gemm", "outer"]),
        ({"weight", "bias"}, []),
    ],
    ids=lambda value: "+".join(sorted(value)),
)
def test_no_kernel_is_launched_that_nobody_asked_for_and_slices_share_each_launch(wanted, kernels):
    inputs, dy, slices = tensors_of(40, 48, 32, 2, ((0, 16), (16, 32), (32, 48)), bias=True)
    x, weight, lora_A, lora_B, _ = inputs
    with interpreting() as launches:
        _, s = forward(lora_linear_triton, *inputs, None, 1.0, 0.0, slices)
        assert [launch.kernel for launch in launches] == ["down_kernel", "gemm_kernel"]
        launches.clear()
        backward(lora_linear_triton, dy, x, s, weight, lora_A, lora_B, None, 1.0, 0.0, slices, [n in wanted for n in TENSORS])
    assert [launch.kernel.removesuffix("_kernel") for launch in launches] == kernels


def test_activation_checkpointing_makes_the_same_mask_again():
    inputs, dy, _ = tensors_of(70, 48, 40, 2)
    x, *others = (tensor for tensor in inputs if tensor is not None)

    def step(through):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(3)
        y = through(lambda x: lora_linear(x, *others, scaling=1.5, dropout=0.5), leaf)
        torch.rand(3)
        return y, *torch.autograd.grad(y, leaf, dy)

    with interpreting():
        plain = step(lambda function, x: function(x))
        again = step(lambda function, x: torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False))
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_float32_is_exact_unless_tf32_is_allowed(monkeypatch):
    inputs, dy, slices = tensors_of(64, 64, 64, 4)
    exact = run(lora_linear_torch, [t if t is None else t.double() for t in inputs], dy.double(), slices)
    with interpreting():
        ieee = run(lora_linear_triton, inputs, dy, slices)
        monkeypatch.setattr(lora_linear_triton, "precision", lambda: "tf32")
        tf32 = run(lora_linear_triton, inputs, dy, slices)
    for one, other, expected in zip(ieee, tf32, exact, strict=True):
        assert rms_error(one, expected) < 5e-7
        assert 1e-4 < rms_error(other, expected) < 3e-3


def test_offsets_reach_past_2_to_the_31_elements():
    """Rows of x and dy lie 2³⁰ elements apart, in memory that is reserved and never touched but where the rows are."""
    K, N, R, apart = 24, 40, 2, 2**30
    inputs, dy, slices = tensors_of(4, N, K, R, dtype=torch.float16)
    expected = run(lora_linear_torch, [t if t is None else t.double() for t in inputs], dy.double(), slices)
    room = torch.empty(3 * apart + K + N, dtype=torch.float16)
    far, far_dy = room.as_strided((4, K), (apart, 1)).copy_(inputs[0]), room.as_strided((4, N), (apart, 1), K).copy_(dy)
    with interpreting():
        found = run(lora_linear_triton, [far, *inputs[1:]], far_dy, slices)
    assert all(rms_error(one, other) < TOLERANCE[torch.float16] for one, other in zip(found, expected, strict=True))


# ── the tests can fail ───────────────────────────────────────────────────────────────────────────────────────────────

MUTANTS = {  # what stands in the source, what a fault puts there, how many times it stands there
    "down forgets the mask": ("p = tl.where(keep_tile(tl.load(SEED), rm, n, threshold, BM, BN), p, 0.0)", "pass", 1),
    "outer forgets the mask": ("p = tl.where(keep_tile(tl.load(SEED), rm, first, threshold, BM, BN), p, 0.0)", "pass", 1),
    "gemm forgets the mask": ("acc = tl.where(keep_tile(tl.load(SEED), rm, first_n, threshold, BM, BN), acc, 0.0)", "pass", 1),
    "the mask moves with the tile": ("keep_tile(tl.load(SEED), rm, first_n", "keep_tile(tl.load(SEED), rm % BM, first_n", 1),
    "down and sweep forget f": ("(acc * factor)", "acc", 2),
    "gemm takes a wrong stride of x": ("X + m64[:, None] * stride_xm", "X + m64[:, None] * K", 2),
    "gemm takes a wrong stride of W": ("w_at += tl.cast(stride_wk, tl.int64) * BK", "w_at += BK", 1),
    "gemm forgets the bias": ("acc += tl.load(BIAS + n64)[None, :].to(tl.float32)", "pass", 1),
    "gemm forgets the rest of K": ("for k in range(0, K, BK):", "for k in range(0, K // BK * BK, BK):", 2),
    "gemm writes past the last column": ("(rm[:, None] < M) & (rn[None, :] < N))", "(rm[:, None] < M) & (rn[None, :] <= N))", 1),
    "gemm leaves out the last row": ("(rm[:, None] < M) & (rn[None, :] < N))", "(rm[:, None] < M - 1) & (rn[None, :] < N))", 1),
    "the update leaks past its slice": ("(rn >= START) & (rn < STOP)", "(rn >= START - 1) & (rn < STOP)", 1),
    "the update takes another slice's rows": ("n64 = (rn - START + ROW).to(tl.int64)", "n64 = (rn - START).to(tl.int64)", 1),
    "only the first ranks are added": ("tl.range(0, R, BR, num_stages=1)", "tl.range(0, BR, BR, num_stages=1)", 1),
    "slices are mixed up": ("row = tl.where(g == i, SLICES[i][2], row)", "row = tl.where(g == 0, SLICES[i][2], row)", 1),
    "shares of columns overlap": ("low = start + split * share", "low = start + split * (share - 1)", 1),
    "shares of rows overlap": ("low = tl.program_id(1) * share", "low = tl.program_id(1) * (share - 1)", 1),
    "sweep adds all rows into one place": ("tl.program_id(0).to(tl.int64) * stride_ds", "0 * stride_ds", 1),
    "rows are counted in 32 bits": ("rm.to(tl.int64)", "rm", 4),
    "partial sums are not added": ("partial.sum(dim=0)", "partial[0]", 1),
}


def faults_of(steps) -> list[str]:
    """What two cases, which between them run every line of the kernels, find wrong with them."""
    faults = []
    for M, N, K, R, slices in [(70, 1100, 40, 3, ((0, 1030), (1040, 1100))), (1100, 40, 70, 70, None)]:
        torch.manual_seed(0)
        inputs, dy, slices = tensors_of(M, N, K, R, slices, bias=True)
        inputs[0] = torch.randn(M, 2 * K)[:, :K]
        constants = slices, torch.tensor(5), 1.5, 0.4
        expected = run(lora_linear_torch, [t.double() for t in inputs], dy.double(), *constants)
        try:
            with interpreting():
                found = run(steps, inputs, dy, *constants)
        except MemoryFault as fault:
            faults.append(str(fault))
            continue
        faults += [f"{error:.1e}" for error in map(rms_error, found, expected) if not error < 5e-7]
    return faults


def test_the_kernels_themselves_pass_where_mutants_must_not():
    assert faults_of(lora_linear_triton) == []


@pytest.mark.parametrize("name", [name for name in MUTANTS if name != "rows are counted in 32 bits"])
def test_a_planted_fault_is_found(name, tmp_path):
    assert faults_of(planted(lora_linear_triton, *MUTANTS[name], tmp_path))


def test_counting_rows_in_32_bits_is_found(tmp_path, monkeypatch):
    mutant = planted(lora_linear_triton, *MUTANTS["rows are counted in 32 bits"], tmp_path)
    monkeypatch.setitem(globals(), "lora_linear_triton", mutant)
    with pytest.raises((MemoryFault, AssertionError)):
        test_offsets_reach_past_2_to_the_31_elements()


# ── sound ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def compile_step(arch, M, layer, R, dropout, dtype=torch.bfloat16, slices=None):
    """The kernels of one training step of a layer of Phi-3-mini, as a launch on the arch would have them."""
    N, K = LAYERS[layer]
    inputs, dy, slices = tensors_of(M, N, K, R, slices, dtype, device="meta")
    seed = torch.empty((), dtype=torch.int64, device="meta") if dropout else None
    with compiling(arch) as compiled:
        run(lora_linear_triton, inputs, dy, slices, seed, dropout=dropout)
    return compiled


# Between them: every row of the table of tiles, with and without mask, slices, more blocks of ranks, unaligned rows, float16.
SHIPPED = [
    (4096, "o", 256, 0.05, torch.bfloat16, None),
    (4096, "odd", 16, 0.05, torch.bfloat16, None),
    (4096, "o", 16, 0.0, torch.bfloat16, None),
    (4096, "down", 16, 0.05, torch.bfloat16, None),
    (4096, "gate_up", 64, 0.0, torch.bfloat16, None),
    (4096, "qkv", 64, 0.05, torch.bfloat16, QKV),
    (4096, "qkv", 16, 0.05, torch.float16, QKV),
    (512, "o", 16, 0.05, torch.bfloat16, None),
    (4096, "qkv", 16, 0.05, torch.float32, QKV),
]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("M", "layer", "R", "dropout", "dtype", "slices"), SHIPPED)
def test_each_shipped_kernel_is_sound_machine_code(arch, M, layer, R, dropout, dtype, slices):
    compiled = compile_step(arch, M, layer, R, dropout, dtype, slices)
    assert {kernel.kernel for kernel in compiled} >= {"down_kernel", "gemm_kernel", "outer_kernel"}
    for kernel in compiled:
        assert kernel.spill_instructions == kernel.stack == 0, f"{kernel.kernel} spills registers"
        assert kernel.registers <= 255
        assert kernel.shared <= SHARED_LIMIT[arch]
        assert layer == "odd" or kernel.opcodes["LDGSTS"] >= 4, f"{kernel.kernel} waits for each of its loads"
        if dtype == torch.float32:
            continue  # without tensor cores, in IEEE arithmetic
        assert kernel.tensor_instructions, kernel.kernel
        if kernel.kernel == "gemm_kernel":
            assert layer == "odd" or kernel.issue_ratio < 1
            assert layer == "odd" or arch != 90 or kernel.loads_in_flight > 0, (
                "the products of the main loop wait for one another"
            )
        elif layer != "odd":
            assert kernel.issue_clocks < kernel.constants["BM"] * kernel.constants["BN"] * dtype.itemsize / DRAM_RATE[arch]


def test_tf32_uses_tensor_cores(monkeypatch):
    monkeypatch.setattr(lora_linear_triton, "precision", lambda: "tf32")
    for kernel in compile_step(90, 4096, "o", 16, 0.0, torch.float32):
        assert kernel.tensor_instructions
        assert kernel.spill_instructions == 0


# ── lean ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("slices", [None, ((0, 64), (64, 1088))])
def test_each_launch_moves_each_of_its_tensors_once(slices):
    """So that the bytes of any shape follow from its tensors, by which `counting` counts them."""
    inputs, dy, slices = tensors_of(256, 1088, 192, 8, slices, torch.bfloat16, bias=True)
    with interpreting() as launches:
        run(lora_linear_triton, inputs, dy, slices, torch.tensor(5), dropout=0.25)
    meta, dy, slices = tensors_of(256, 1088, 192, 8, slices, torch.bfloat16, bias=True, device="meta")
    with counting(90) as traffic:
        run(lora_linear_triton, meta, dy, slices, torch.empty((), dtype=torch.int64, device="meta"), dropout=0.25)
    for kernel in ("down_kernel", "gemm_kernel", "outer_kernel", "sweep_kernel"):
        counted = [sum(launch.bytes.values()) for launch in launches if launch.kernel == kernel]
        rest_of_sectors = 24 * sum("SEED" in launch.bytes for launch in launches if launch.kernel == kernel)  # a seed has 8 bytes
        assert sum(counted) - rest_of_sectors == traffic.bytes[kernel]


def minimum(inputs, dy, results) -> tuple[int, int]:
    """Bytes of forward and of backward, were each tensor moved once."""
    size = lambda *tensors: sum(t.numel() * t.element_size() for t in tensors if t is not None)  # noqa: E731
    y, s, *gradients = results
    return size(*inputs, y), size(dy, *inputs[:4], s, *gradients)


@pytest.mark.parametrize(
    ("layer", "most_forward", "most_backward", "most_with_partial_sums"),
    [("qkv", 1.17, 1.42, 1.56), ("o", 1.37, 1.27, 1.40), ("gate_up", 1.11, 1.47, 1.62), ("down", 1.48, 1.12, 1.19)],
)
def test_bytes_stay_near_the_least_that_can_be(layer, most_forward, most_backward, most_with_partial_sums):
    N, K = LAYERS[layer]
    inputs, dy, slices = tensors_of(4096, N, K, 16, dtype=torch.bfloat16, device="meta")
    x, weight, lora_A, lora_B, _ = inputs
    constants = None, 2.0, 0.0, slices
    with counting(90) as there:
        y, s = forward(lora_linear_triton, *inputs, *constants)
    with counting(90) as back:
        gradients = backward(lora_linear_triton, dy, x, s, weight, lora_A, lora_B, *constants, [True, False, True, True, False])
    least_there, least_back = minimum(inputs, dy, [y, s, *gradients])
    assert round(there.total / least_there, 2) <= most_forward
    assert round((back.total - back.partial) / least_back, 2) <= most_backward
    assert round(back.total / least_back, 2) <= most_with_partial_sums


@pytest.mark.parametrize("R", [8, 16, 64, 256])
@pytest.mark.parametrize("layer", ["qkv", "o", "gate_up", "down"])
def test_one_sweep_is_chosen_where_it_moves_fewer_bytes(layer, R, monkeypatch):
    N, K = LAYERS[layer]
    inputs, dy, slices = tensors_of(4096, N, K, R, dtype=torch.bfloat16, device="meta")
    s = torch.empty(4096, R, dtype=torch.bfloat16, device="meta")
    moved = {}
    chosen = tiles.sweep_wins(2, R, aligned=True)
    for wins in (True, False):
        monkeypatch.setattr(tiles, "sweep_wins", lambda *_, wins=wins: wins)
        with counting(90) as traffic:
            lora_linear_triton.sweep(dy, inputs[3], s, slices, 2.0)
        moved[wins] = traffic.total
    assert moved[chosen] <= 1.05 * moved[not chosen]


# ── on a GPU, where there is one ─────────────────────────────────────────────────────────────────────────────────────

on_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch sees no CUDA device here: the kernels cannot be launched"
)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("M", "N", "K", "R", "slices"),
    [
        (4096, 9216, 3072, 16, QKV),
        (512, 3072, 8192, 64, None),
        (1, 3072, 3072, 8, None),
        (333, 1031, 517, 5, ((0, 1000), (1001, 1031))),
    ],
)
def test_launched_on_a_gpu_they_are_within_rounding_of_the_float64_steps(M, N, K, R, slices, dtype):
    inputs, dy, slices = tensors_of(M, N, K, R, slices, dtype, device="cuda", bias=True)
    seed = draw_seed("cuda")
    found = run(lora_linear_triton, inputs, dy, slices, seed, dropout=0.1)
    expected = run(lora_linear_torch, [t.double() for t in inputs], dy.double(), slices, seed, dropout=0.1)
    assert all(rms_error(one, other) < TOLERANCE[dtype] for one, other in zip(found, expected, strict=True))


@on_gpu
def test_compiled_on_a_gpu_the_operation_has_no_break_and_gives_the_same():
    (x, weight, lora_A, lora_B, _), _, _ = tensors_of(256, 512, 384, 8, dtype=torch.bfloat16, device="cuda")
    compiled = torch.compile(lora_linear, fullgraph=True)
    assert torch.equal(compiled(x, weight, lora_A, lora_B, 2.0), lora_linear(x, weight, lora_A, lora_B, 2.0))
