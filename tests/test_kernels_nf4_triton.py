"""NF4's Triton kernels without a GPU: bit for bit what plain PyTorch gives, right inside a product, sound, and lean."""

import pytest
import torch
import torch.nn.functional as F
from helpers import rms_error
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_linear_cases import TOLERANCE, run, slices_of, tensors_of
from without_gpu import SHARED_LIMIT, Compiled, MemoryFault, compiling, counting, interpreting, planted

from minilora.kernels import lora_linear_torch, lora_linear_triton, nf4, nf4_triton, tiles
from minilora.kernels.dropout import draw_seed
from minilora.kernels.lora_linear import lora_linear, lora_linear_reference
from minilora.kernels.nf4_tensor import NF4Tensor

ARCHS = (80, 89, 90)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FROZEN = (True, False, True, True, False)  # the gradients of a step: x, lora_A, lora_B
QKV = ((0, 3072), (3072, 6144), (6144, 9216))
LAYERS = {
    "qkv": (9216, 3072),
    "o": (3072, 3072),
    "gate_up": (16384, 3072),
    "down": (3072, 8192),
    "odd": (3071, 3072),
}  # N, K of Phi-3-mini


# ── right ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def values_of(kind: str, n: int) -> torch.Tensor:
    """(n,) float32: usual values, values at ties between levels, zeros, and values too small for a normal scale."""
    if kind == "ties":
        midpoints = (nf4.LEVELS[1:] + nf4.LEVELS[:-1]) / 2
        scales = torch.rand(-(-n // 64)).repeat_interleave(64)[:n]
        values = midpoints[torch.arange(n) % 15] * scales
        values[::64] = scales[::64]
        return values
    return torch.randn(n) * {"usual": 0.02, "zeros": 0.0, "tiny": 1e-39}[kind]


sizes = st.sampled_from([1, 2, 63, 64, 65, 127, 4095, 4096, 4161, 9000])
kinds = st.sampled_from(["usual", "ties", "zeros", "tiny"])


@settings(max_examples=40)
@given(sizes, kinds, st.sampled_from(DTYPES), st.integers(0, 2**31))
def test_codes_scales_and_values_equal_those_of_plain_pytorch_bit_for_bit(n, kind, dtype, seed):
    torch.manual_seed(seed)
    values = values_of(kind, n).to(dtype)
    codes, absmax = nf4.quantize_blocks(values)
    with interpreting():
        ours = nf4_triton.quantize_blocks(values)
        back = nf4_triton.dequantize_blocks(codes, absmax, n, dtype)
    assert torch.equal(ours[0], codes)
    assert torch.equal(ours[1], absmax)
    assert torch.equal(back, nf4.dequantize_blocks(codes, absmax, n, dtype))
    assert kind != "usual" or rms_error(back, values) < 0.2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "kernel"), [(3, "gemm_nf4_kernel"), (40, "gemm_kernel")])
def test_a_weight_and_a_layer_without_an_adapter_go_by_these_kernels(dtype, M, kernel):
    weight, x, dy, bias = (torch.randn(*shape).to(dtype) for shape in ((65, 64), (M, 64), (M, 65), (65,)))
    expected = NF4Tensor.quantize(weight)
    with interpreting() as launches:
        quantised = NF4Tensor.quantize(weight)
        values = quantised.dequantize()
        x.requires_grad_()
        y = F.linear(x, quantised, bias)
        (dx,) = torch.autograd.grad(y, x, dy)
    assert all(torch.equal(part, same) for part, same in zip(quantised.parts, expected.parts, strict=True))
    assert torch.equal(values, expected.dequantize())
    assert rms_error(y, F.linear(x.double(), values.double(), bias.double())) <= TOLERANCE[dtype]
    assert rms_error(dx, dy.double() @ values.double()) <= TOLERANCE[dtype]
    names = [launch.kernel for launch in launches]
    assert names[0] == "quantize_kernel"
    assert names.count(kernel) == 2


@settings(max_examples=20)
@given(st.sampled_from([1, 255, 256, 257, 1100]), st.integers(0, 2**31))
def test_scales_are_expanded_as_in_plain_pytorch_bit_for_bit(b, seed):
    torch.manual_seed(seed)
    parts = nf4.compress(torch.rand(b))
    with interpreting():
        assert torch.equal(nf4_triton.expand(*parts), nf4.expand(*parts))


def test_nothing_at_all_is_quantised_without_a_launch():
    with interpreting() as launches:
        codes, absmax = nf4_triton.quantize_blocks(torch.empty(0))
        assert nf4_triton.dequantize_blocks(codes, absmax, 0, torch.float16).shape == (0,)
    assert (len(codes), len(absmax), launches) == (0, 0, [])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter's own divisions
@pytest.mark.parametrize(("value", "kinds"), [("nan", "1 NaN and 0 infinite"), ("-inf", "0 NaN and 1 infinite")])
def test_values_that_are_not_finite_are_refused(value, kinds):
    values = torch.randn(200)
    values[150] = float(value)
    with interpreting(), pytest.raises(ValueError, match=f"must be finite in float32, not {kinds} of 200 values"):
        nf4_triton.quantize_blocks(values)


def step_of(M, N, K, R, slices=None, dtype=torch.float32, device="cpu", bias=True):
    """A step's tensors with a 4-bit weight; the same in float64, with what the weight stands for; dy and the slices."""
    inputs, dy, slices = tensors_of(M, N, K, R, slices, dtype, device=device, bias=bias)
    inputs[1] = NF4Tensor.quantize(inputs[1])
    plain = [None if t is None else (t.dequantize() if isinstance(t, NF4Tensor) else t).double() for t in inputs]
    return inputs, plain, dy, slices


def errors_of(steps, inputs, plain, dy, *constants) -> list[float]:
    expected = run(lora_linear_torch, plain, dy.double(), *constants, needed=FROZEN)
    return [rms_error(*pair) for pair in zip(run(steps, inputs, dy, *constants, needed=FROZEN), expected, strict=True)]


@st.composite
def steps(draw):
    """Few tokens and many; rows of whole blocks, and others."""
    N = draw(st.sampled_from([33, 70, 192]))
    slices = draw(slices_of(N))
    if slices and sum(stop - start for start, stop in slices) < 32:
        slices = None
    M, K = draw(st.sampled_from([2, 16, 17, 32, 33, 70])), draw(st.sampled_from([64, 192, 129]))
    R, dtype, bias = draw(st.sampled_from([4, 16, 70])), draw(st.sampled_from(DTYPES)), draw(st.booleans())
    seed, dropout = draw(st.integers(0, 2**31)), draw(st.sampled_from([0.0, 0.4]))
    torch.manual_seed(seed)
    inputs, plain, dy, slices = step_of(M, N, K, R, slices, dtype, bias=bias)
    if draw(st.booleans()):
        inputs[0] = inputs[0].T.contiguous().T
    if draw(st.booleans()):
        dy = torch.stack([dy, dy], dim=-1)[..., 0]
    return inputs, plain, dy, slices, torch.tensor(seed), 1.5, dropout


@settings(max_examples=25)
@given(steps(), st.sampled_from(ARCHS))
def test_a_step_on_a_4_bit_weight_is_within_rounding_of_float64(case, arch):
    with interpreting(arch):
        errors = errors_of(lora_linear_triton, *case)
    assert all(error < TOLERANCE[case[0][0].dtype] for error in errors), errors


@pytest.mark.parametrize(
    ("M", "K", "kernels"),
    [
        (1, 128, ["expand", "gemm_nf4"]),
        (32, 128, ["expand", "gemm_nf4"]),
        (33, 128, ["expand", "dequantize", "gemm"]),
        (1, 96, ["expand", "dequantize", "gemm"]),
        (0, 128, []),
    ],
)
def test_few_tokens_dequantise_inside_the_product_and_many_before_it(M, K, kernels):
    inputs, _, dy, slices = step_of(M, 40, K, 4)
    with interpreting() as launches:
        run(lora_linear_triton, inputs, dy, slices, needed=(True, False, False, False, False))
    assert [launch.kernel.removesuffix("_kernel") for launch in launches if launch.kernel != "down_kernel"] == kernels * 2


@pytest.mark.parametrize(("M", "K"), [(20, 128), (40, 128), (20, 65)])
def test_lora_linear_and_its_gradients_on_a_4_bit_weight_are_those_of_what_it_stands_for(M, K):
    inputs, plain, dy, slices = step_of(M, 70, K, 4, ((0, 30), (40, 70)))
    results = []
    for operation, tensors in (lora_linear, inputs), (lora_linear_reference, plain):
        x, weight, lora_A, lora_B, bias = tensors
        leaves = [t.detach().requires_grad_() for t in (x, lora_A, lora_B, bias)]
        torch.manual_seed(3)
        more = {} if operation is lora_linear else {"seed": draw_seed(x.device)}
        with interpreting() as launches:
            y = operation(leaves[0], weight, *leaves[1:3], 1.5, leaves[3], 0.4, slices=slices, **more)
            results.append([y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))])
        assert bool(launches) == (operation is lora_linear)
    assert max(map(rms_error, *results)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("M", [20, 40])
def test_a_run_repeats_bit_for_bit(M):
    inputs, _, dy, slices = step_of(M, 130, 192, 4, dtype=torch.bfloat16)
    with interpreting():
        first, again = (run(lora_linear_triton, inputs, dy, slices, torch.tensor(9), 1.5, 0.3, FROZEN) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


def test_rows_of_x_reach_past_2_to_the_31_elements():
    N, K, apart = 40, 64, 2**30
    inputs, plain, dy, slices = step_of(4, N, K, 2, dtype=torch.float16)
    room = torch.empty(3 * apart + K + N, dtype=torch.float16)
    inputs[0] = room.as_strided((4, K), (apart, 1)).copy_(inputs[0])
    far_dy = room.as_strided((4, N), (apart, 1), K).copy_(dy)
    with interpreting():
        assert max(errors_of(lora_linear_triton, inputs, plain, far_dy, slices)) < TOLERANCE[torch.float16]


# ── the tests can fail ───────────────────────────────────────────────────────────────────────────────────────────────

MUTANTS = {  # what stands in the source of nf4_triton, what a fault puts there, how many times it stands there
    "the first value is in the low half": ("level(codes >> 4) * absmax[:, None], level(codes & 15)",
                                           "level(codes & 15) * absmax[:, None], level(codes >> 4)", 1),
    "quantising packs the halves the other way": ("16 * high + low", "16 * low + high", 1),
    "the low values miss their scale": ("level(codes & 15) * absmax[:, None]", "level(codes & 15)", 1),
    "two levels change places": ("_LEVELS[FIRST + 3], _LEVELS[FIRST + 2]", "_LEVELS[FIRST + 2], _LEVELS[FIRST + 3]", 1),
    "a tile has the scale of its row's first block": ("ABSMAX + at // _BLOCK", "ABSMAX + rows * width // _BLOCK", 1),
    "a tile has the scale of the next block": ("ABSMAX + at // _BLOCK", "ABSMAX + at // _BLOCK + 1", 1),
    "a tile starts at its row's first column": ("CODES + (at // 2)", "CODES + (rows * width // 2)", 1),
    "dequantising leaves out the last value": ("BLOCKS, _BLOCK), mask=at < n)", "BLOCKS, _BLOCK), mask=at < n - 1)", 1),
    "dequantising writes one value too many": ("BLOCKS, _BLOCK), mask=at < n)", "BLOCKS, _BLOCK), mask=at <= n)", 1),
    "quantising reads one value too many": ("mask=at < n, other=0.0", "mask=at <= n, other=0.0", 1),
    "quantising leaves out the last byte": ("mask=byte < bytes)", "mask=byte < bytes - 1)", 1),
    "programs share a block": ("tl.program_id(0).to(tl.int64) * BLOCKS", "tl.program_id(0).to(tl.int64) * (BLOCKS - 1)", 2),
    "a tie goes to the upper level": ("share > _MIDPOINTS[i]", "share >= _MIDPOINTS[i]", 1),
    "a short block is multiplied as the others": ("tl.div_rn(values, divisor[:, None])", "values * inverse[:, None]", 1),
    "a short block keeps a scale of zero": ("tl.where(short, divisor, absmax)", "absmax", 1),
    "groups of scales are shifted": ("NESTED + at // _GROUP", "NESTED + (at + 1) // _GROUP", 1),
    "the offset is forgotten": (" + tl.load(OFFSET)", "", 1),
    "the scale has a sign": ("& 0x7FFFFFFF", "& -1", 1),
}  # fmt: skip
MUTANTS_OF_THE_PRODUCT = {  # the same of lora_linear_triton
    "the rest of dY is forgotten": ("for k in range(0, K, BK):", "for k in range(0, K // BK * BK, BK):", 2),
    "rows past the end are read": ("((k + rk) % K)", "(k + rk)", 1),
    "x keeps what lies past the end": ("< K - k, other=0.0)\n        if TRANS", "<= K - k, other=0.0)\n        if TRANS", 1),
    "every step has the first columns": ("weight_tile(CODES, ABSMAX, n64, k, K", "weight_tile(CODES, ABSMAX, n64, 0, K", 1),
    "every step has the first rows": ("((k + rk) % K)", "(rk % K)", 1),
    "a tile of dX has the first columns": ("k64, first_n, N, x.dtype", "k64, 0, N, x.dtype", 1),
}  # fmt: skip


def faults_of(kernels, products) -> list[str]:
    """What a few cases, which between them run every line of the kernels, find wrong with them."""
    faults = []
    torch.manual_seed(0)
    for values in (values_of("usual", 4300), values_of("ties", 4096 + 63), values_of("zeros", 65)):
        expected = nf4.quantize_blocks(values)
        try:
            with interpreting():
                found = *kernels.quantize_blocks(values), kernels.dequantize_blocks(*expected, len(values), torch.float32)
        except MemoryFault as fault:
            faults.append(str(fault))
            continue
        expected = *expected, nf4.dequantize_blocks(*expected, len(values), torch.float32)
        faults += [f"{len(values)} values" for pair in zip(found, expected, strict=True) if not torch.equal(*pair)]
    scales = nf4.compress(torch.rand(300))
    with interpreting():
        if not torch.equal(kernels.expand(*scales), nf4.expand(*scales)):
            faults.append("scales")
    for M, N, K in [(20, 70, 128), (40, 70, 65)]:
        case = *step_of(M, N, K, 3, ((0, 30), (40, N))), torch.tensor(5), 1.5, 0.4
        try:
            with interpreting():
                faults += [f"{error:.1e}" for error in errors_of(products, *case) if not error < 5e-7]
        except MemoryFault as fault:
            faults.append(str(fault))
    return faults


def test_the_kernels_themselves_pass_where_mutants_must_not():
    assert faults_of(nf4_triton, lora_linear_triton) == []


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_fault_is_found(name, tmp_path, monkeypatch):
    mutant = planted(nf4_triton, *MUTANTS[name], tmp_path)
    for function in ("weight_tile", "dequantize", "expand"):
        monkeypatch.setattr(lora_linear_triton, function, getattr(mutant, function))
    assert faults_of(mutant, lora_linear_triton)


@pytest.mark.parametrize("name", MUTANTS_OF_THE_PRODUCT)
def test_a_fault_planted_in_the_product_is_found(name, tmp_path):
    assert faults_of(nf4_triton, planted(lora_linear_triton, *MUTANTS_OF_THE_PRODUCT[name], tmp_path))


# ── sound ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def meta_step(M, N, K, R, slices=None, dtype=torch.bfloat16):
    """A step's tensors on no device, with a 4-bit weight."""
    inputs, dy, slices = tensors_of(M, N, K, R, slices, dtype, device="meta", bias=True)
    empty = lambda *shape, as_: torch.empty(shape, dtype=as_, device="meta")  # noqa: E731
    scales = -(-N * K // nf4.BLOCK)
    parts = [empty(-(-N * K // 2), as_=torch.uint8), empty(scales, as_=torch.uint8)]
    parts += [empty(-(-scales // nf4.GROUP), as_=torch.float32), empty(as_=torch.float32)]
    inputs[1] = NF4Tensor(*parts, (N, K), dtype)
    return inputs, dy, slices


def products(M, N, K, R, dropout, dtype, slices) -> None:
    """Y and dX of a step on no device."""
    (x, weight, lora_A, lora_B, bias), dy, slices = meta_step(M, N, K, R, slices, dtype)
    s, t = x.new_empty(M, len(lora_A)), x.new_empty(M, len(lora_A))
    mask = lora_linear_triton.make_mask(M, K, dropout, torch.empty((), dtype=torch.int64, device="meta"))
    lora_linear_triton.gemm(x, weight, s, lora_B, slices, bias)
    lora_linear_triton.gemm(dy, weight.t(), t, lora_A.T, ((0, K),), mask=mask)


def assert_runs_well(kernel: Compiled, arch: int) -> None:
    assert kernel.spill_instructions == kernel.stack == 0, f"{kernel.kernel} spills registers"
    assert kernel.registers <= 255
    assert kernel.shared <= SHARED_LIMIT[arch]


# Between them: every tile, with and without mask, slices, more blocks of ranks, rows of dY that no wide load can take.
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("M", "layer", "R", "dropout", "dtype", "slices"),
    [
        (1, "o", 16, 0.0, torch.bfloat16, None),
        (16, "qkv", 16, 0.05, torch.float16, QKV),
        (32, "qkv", 64, 0.05, torch.bfloat16, QKV),
        (32, "down", 256, 0.05, torch.bfloat16, None),
        (32, "odd", 16, 0.05, torch.bfloat16, None),
        (16, "gate_up", 16, 0.05, torch.float32, None),
        (32, "o", 64, 0.05, torch.float32, None),
    ],
)
def test_each_product_that_dequantises_is_sound_machine_code(arch, M, layer, R, dropout, dtype, slices):
    with compiling(arch) as compiled:
        products(M, *LAYERS[layer], R, dropout, dtype, slices)
    assert [kernel.kernel for kernel in compiled] == ["expand_kernel", "gemm_nf4_kernel"] * 2
    for expand, kernel in zip(compiled[::2], compiled[1::2], strict=True):
        assert_runs_well(expand, arch)
        assert expand.opcodes["FFMA"] == 0  # which would round once where plain PyTorch rounds twice
        assert_runs_well(kernel, arch)
        assert kernel.opcodes["LDGSTS"] >= 4, "the product waits for each of its loads"
        if dtype != torch.float32:  # which has no tensor cores in IEEE arithmetic
            assert kernel.tensor_instructions
            weights = kernel.constants["BN"] * kernel.constants["BK"]
            assert layer == "odd" or len(kernel.loop) * kernel.constants["num_warps"] * 32 < 33 * weights  # tiles says 30


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("M", [16, 4096])
def test_each_product_of_a_layer_without_an_adapter_is_sound_machine_code(arch, M):
    N, K = LAYERS["o"]
    x, nothing = (torch.empty(M, size, dtype=torch.bfloat16, device="meta") for size in (K, 0))
    weight = NF4Tensor.quantize(torch.randn(N, K, dtype=torch.bfloat16)).to("meta")
    with compiling(arch) as compiled:
        for W in (weight, weight.t()):
            lora_linear_triton.gemm(x, W, nothing, torch.empty(N, 0, device="meta"), ())
    assert [kernel.kernel for kernel in compiled if kernel.kernel.startswith("gemm")] == 2 * [f"gemm{'_nf4' * (M < 33)}_kernel"]
    for kernel in compiled:
        assert_runs_well(kernel, arch)
        assert kernel.tensor_instructions or not kernel.kernel.startswith("gemm")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("n", "dtype"), [(3072 * 8192, torch.bfloat16), (3071 * 3069, torch.float32)], ids=["even", "odd"])
def test_quantising_and_dequantising_are_sound_machine_code(arch, n, dtype, monkeypatch):
    monkeypatch.setattr(nf4, "require_finite", lambda *_: None)  # nothing can be, on no device
    with compiling(arch) as compiled:
        nf4_triton.quantize_blocks(torch.empty(n, dtype=dtype, device="meta"))
        codes, absmax = (torch.empty(-(-n // m), dtype=of, device="meta") for m, of in ((2, torch.uint8), (64, torch.float32)))
        nf4_triton.dequantize_blocks(codes, absmax, n, dtype)
    assert [kernel.kernel for kernel in compiled] == ["quantize_kernel", "dequantize_kernel"]
    for kernel in compiled:
        assert_runs_well(kernel, arch)
        assert n % 2 or kernel.opcodes["LDG"] <= 4, "values and codes are not loaded 16 bytes at a time"


# ── lean ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_inside_the_product_the_weight_is_read_once_in_4_bits():
    M, N, K = 20, 192, 256
    inputs, _, dy, slices = step_of(M, N, K, 8, dtype=torch.bfloat16)
    with interpreting() as launches:
        run(lora_linear_triton, inputs, dy, slices, needed=FROZEN)
    for launch in (launch for launch in launches if launch.kernel == "gemm_nf4_kernel"):
        assert launch.bytes["CODES"] == N * K // 2
        assert launch.bytes["ABSMAX"] == N * K // 64 * 4
        assert launch.bytes["X"] + launch.bytes["Y"] == 2 * M * (N + K)


def test_before_the_product_codes_and_scales_are_read_once_and_the_weight_is_written_once():
    n = 128 * 320
    codes, absmax = nf4.quantize_blocks(torch.randn(n))
    with interpreting() as launches:
        nf4_triton.quantize_blocks(nf4_triton.dequantize_blocks(codes, absmax, n, torch.bfloat16))
    for launch in launches:
        assert launch.bytes == {"CODES": n // 2, "ABSMAX": n // 64 * 4, "VALUES": n * 2}


@pytest.mark.parametrize("layer", ["qkv", "o", "gate_up", "down"])
def test_the_way_that_is_chosen_for_few_tokens_moves_an_eighth_of_the_bytes(layer, monkeypatch):
    N, K = LAYERS[layer]
    (x, weight, _, lora_B, _), _, slices = meta_step(32, N, K, 16)
    update, moved, scales = x.new_empty(32, 16), {}, N * K // 64
    with counting(90):
        lora_linear_triton.gemm(x, weight, update, lora_B, slices)  # the table of scales is copied to a device once
    for inside in (True, False):
        monkeypatch.setattr(tiles, "dequantise_inside", lambda *_, inside=inside: inside)
        with counting(90) as traffic:
            lora_linear_triton.gemm(x, weight, update, lora_B, slices)
        moved[inside] = traffic.total
        assert sum(operation.flops for operation in traffic.operations) == 2 * 32 * N * (K + 16)
    assert moved[False] - moved[True] == 4 * N * K  # the buffer, written and read
    expanding = scales + scales // 256 * 4 + 4 + 256 * 4 + 4 * scales
    assert moved[True] == expanding + N * K // 2 + 4 * scales + 2 * 32 * (N + K + 16) + 4 * 16 * N


# ── on a GPU, where there is one ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here: the kernels cannot be launched")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N", "K"), [(1, 3072, 3072), (32, 9216, 3072), (512, 3072, 8192), (20, 333, 517)])
def test_launched_on_a_gpu_they_are_as_interpreted(M, N, K, dtype):
    inputs, plain, dy, slices = step_of(M, N, K, 16, dtype=dtype, device="cuda")
    assert max(errors_of(lora_linear_triton, inputs, plain, dy, slices)) < TOLERANCE[dtype]
    values = values_of("ties", 9000).to("cuda", dtype)
    codes, absmax = nf4.quantize_blocks(values)
    assert all(torch.equal(*pair) for pair in zip(nf4_triton.quantize_blocks(values), (codes, absmax), strict=True))
    assert torch.equal(
        nf4_triton.dequantize_blocks(codes, absmax, 9000, dtype), nf4.dequantize_blocks(codes, absmax, 9000, dtype)
    )
