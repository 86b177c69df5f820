"""The Triton kernel of rope without a GPU: right by the interpreter, sound by its machine code, lean by its bytes."""

import pytest
import torch
from elementwise_cases import assert_equals_reference, gpu_dtypes, rope_cases
from helpers import rms_error
from hypothesis import given, settings
from without_gpu import MemoryFault, compiling, counting, interpreting, planted

from minilora.kernels import rope, rope_triton


@settings(max_examples=15)
@given(rope_cases(gpu_dtypes))
def test_values_and_gradient_equal_the_float64_reference(case):
    with interpreting() as launches:
        assert_equals_reference(case)
    assert [launch.kernel for launch in launches] == 3 * ["turn_kernel"]


def step(turn, B, T, heads, kv_heads, D, half, dtype=torch.float32, device="cpu", tables=None):
    """qkv turned, and its gradient; each row of the batch at positions of its own unless tables is 1."""
    torch.manual_seed(0)
    rand = lambda *shape: torch.randn(shape, device=device).to(dtype)  # noqa: E731
    qkv, cos, sin = rand(B, T, (heads + 2 * kv_heads) * D), rand(tables or B, 1, T, half), rand(tables or B, 1, T, half)
    dq, dk, dv = (rand(B, T, count, D).transpose(1, 2) for count in (heads, kv_heads, kv_heads))
    rope.forward(turn, qkv, cos, sin, heads, kv_heads)
    return [qkv, rope.backward(turn, dq, dk, dv, cos, sin)]


def test_no_rows_launch_nothing():
    with interpreting() as launches:
        assert [result.shape for result in step(rope_triton.turn, 0, 5, 2, 1, 6, 2)] == [(0, 5, 24), (0, 5, 24)]
    assert launches == []


def test_it_is_a_torch_operation_in_order():
    qkv, cos, sin = torch.randn(2, 3, 32), torch.randn(1, 1, 3, 3), torch.randn(1, 1, 3, 3)
    dq, dkv = torch.randn(2, 2, 3, 8), torch.randn(2, 1, 3, 8)
    with interpreting():
        torch.library.opcheck(torch.ops.minilora.rope_.default, (qkv, cos, sin, 2, 1))
        torch.library.opcheck(torch.ops.minilora.rope_backward.default, (dq, dkv, dkv, cos, sin))


MUTANTS = {
    "it turns the other way": ("tl.where(rd < HALF, -sin, sin)", "tl.where(rd < HALF, sin, -sin)", 1),
    "neighbours are paired": ("tl.where(rd < HALF, rd + HALF, rd - HALF)", "rd ^ 1", 1),
    "the rest turns too": ("mask=turns, other=1.0", "mask=turns, other=0.5", 1),
    "all rows have the first one's positions": ("COS + b * stride_cb", "COS", 1),
    "the sine has another row": ("SIN + b * stride_sb", "SIN", 1),
    "all tokens have the first one's position": ("+ t * stride_ct", "", 1),
    "heads are blocks": ("tl.program_id(1) * BH + tl.arange(0, BH)", "tl.arange(0, BH)", 1),
    "it writes past the last head": ("(rh < H)[:, None] &", "(rh <= H)[:, None] &", 1),
    "the partner is forgotten": ("+ other * sin[None, :]", "", 1),
    "a row's stride is another's": ("X + b * stride_xb", "X + b * stride_ob", 1),
}


def faults_of(turn) -> list[str]:
    case = 2, 3, 140, 10, 10, 3  # more heads than a program turns
    try:
        with interpreting():
            found = step(turn, *case)
    except MemoryFault as fault:
        return [str(fault)]
    return [f"{error:.1e}" for error in map(rms_error, found, step(rope.turn, *case)) if not error < 5e-7]


def test_the_kernel_itself_passes_where_mutants_must_not():
    assert faults_of(rope_triton.turn) == []


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_fault_is_found(name, tmp_path):
    assert faults_of(planted(rope_triton, *MUTANTS[name], tmp_path).turn)


def test_offsets_reach_past_2_to_the_31_elements():
    """Rows of x lie 2³⁰ elements apart, in memory that is reserved and never touched but where the rows are."""
    torch.manual_seed(0)
    x, cos, sin = torch.randn(4, 2, 3, 8).half(), torch.randn(4, 1, 3, 4).half(), torch.randn(4, 1, 3, 4).half()
    far = torch.empty(3 * 2**30 + 48, dtype=torch.float16).as_strided(x.shape, (2**30, 24, 8, 1)).copy_(x)
    with interpreting():
        rope_triton.turn(far, cos, sin, out := torch.empty_like(x))
    rope.turn(x.double(), cos.double(), sin.double(), expected := torch.empty_like(x, dtype=torch.float64))
    assert rms_error(out, expected) < 1e-3


def test_bytes_are_those_of_the_closed_form_and_counted_alike():
    B, T, heads, kv_heads, D, half = 2, 4, 6, 2, 96, 48
    with interpreting() as launches:
        step(rope_triton.turn, B, T, heads, kv_heads, D, half, torch.bfloat16, tables=1)
    tables = 2 * 2 * T * half
    expected = [2 * 2 * B * T * turned * D + tables for turned in (heads + kv_heads, heads, kv_heads)]
    assert [sum(launch.bytes.values()) for launch in launches] == expected
    with counting(90) as traffic:
        step(rope_triton.turn, B, T, heads, kv_heads, D, half, torch.bfloat16, "meta", tables=1)
    assert traffic.bytes["turn_kernel"] == sum(expected)


SHIPPED = [
    (32, 32, 96, 48, torch.bfloat16),  # Phi-3-mini
    (24, 8, 128, 48, torch.bfloat16),  # Phi-4-mini
    (40, 10, 128, 64, torch.float32),
]


def loads_before_stores(ptx: str) -> bool:
    """Whether a barrier of all threads stands after the last load and before the first store, so that out may be x."""
    barrier = ptx.rfind("bar.sync", 0, ptx.index("st.global"))
    return ptx.rindex("ld.global") < barrier


@pytest.mark.parametrize("arch", [80, 89, 90])
@pytest.mark.parametrize(("heads", "kv_heads", "D", "half", "dtype"), SHIPPED)
def test_the_kernel_is_sound_machine_code(arch, heads, kv_heads, D, half, dtype):
    with compiling(arch) as compiled:
        step(rope_triton.turn, 2, 2048, heads, kv_heads, D, half, dtype, "meta")
    assert len(compiled) == 3
    for kernel in compiled:
        assert kernel.spill_instructions == kernel.stack == 0
        assert kernel.registers <= 64
        assert ".v4" in kernel.ptx
        assert loads_before_stores(kernel.ptx)
        assert not loads_before_stores(kernel.ptx.replace("bar.sync", "nop"))
