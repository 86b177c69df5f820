"""The Triton kernels of swiglu without a GPU: right by the interpreter, sound by their machine code, lean by their bytes."""

import pytest
import torch
from elementwise_cases import assert_equals_reference, gpu_dtypes, swiglu_cases
from helpers import rms_error
from hypothesis import given, settings
from without_gpu import MemoryFault, compiling, counting, interpreting, planted

from minilora.kernels import swiglu, swiglu_triton

KERNELS = ["swiglu_kernel", "swiglu_backward_kernel"]


@settings(max_examples=15)
@given(swiglu_cases(gpu_dtypes))
def test_value_and_gradient_equal_the_float64_reference(case):
    with interpreting() as launches:
        assert_equals_reference(case)
    assert [launch.kernel for launch in launches] == KERNELS


def step(steps, M, I, dtype=torch.float32, device="cpu"):  # noqa: E741
    torch.manual_seed(0)
    packed, dy = torch.randn(M, 2 * I, device=device).to(dtype), torch.randn(M, I, device=device).to(dtype)
    return [steps.forward(packed), steps.backward(dy, packed)]


def test_no_rows_launch_nothing():
    with interpreting() as launches:
        assert [result.shape for result in step(swiglu_triton, 0, 5)] == [(0, 5), (0, 10)]
    assert launches == []


def test_it_is_a_torch_operation_in_order():
    packed = torch.randn(3, 10)
    with interpreting():
        torch.library.opcheck(torch.ops.minilora.swiglu.default, (packed,))
        torch.library.opcheck(torch.ops.minilora.swiglu_backward.default, (packed[:, :5].contiguous(), packed))


MUTANTS = {
    "up is forgotten": ("(up * gate * tl.sigmoid(gate))", "(gate * tl.sigmoid(gate))", 1),
    "gate and up are swapped": ("(up * gate * tl.sigmoid(gate))", "(up * gate * tl.sigmoid(up))", 1),
    "only the first block is written": ("tl.program_id(1) * BI + tl.arange(0, BI)", "tl.arange(0, BI)", 2),
    "the block is written past the half": ("tl.store(Y + row * I + ri,", "tl.store(Y + row * I + ri + 1,", 1),
    "silu′ forgets the gate": ("(sigma + silu * (1 - sigma))", "sigma", 1),
    "silu′ forgets sigma": ("(sigma + silu * (1 - sigma))", "(silu * (1 - sigma))", 1),
    "the gradients are swapped": ("tl.store(DPACKED + at + I, (dy * silu)", "tl.store(DPACKED + at + I, (dy * up * silu)", 1),
    "the gradient of the gate forgets up": ("(dy * up * (sigma", "(dy * (sigma", 1),
}


def faults_of(steps) -> list[str]:
    try:
        with interpreting():
            found = step(steps, 3, 1030)
    except MemoryFault as fault:
        return [str(fault)]
    return [f"{error:.1e}" for error in map(rms_error, found, step(swiglu, 3, 1030)) if not error < 5e-7]


def test_the_kernels_themselves_pass_where_mutants_must_not():
    assert faults_of(swiglu_triton) == []


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_fault_is_found(name, tmp_path):
    assert faults_of(planted(swiglu_triton, *MUTANTS[name], tmp_path))


def test_bytes_are_those_of_the_closed_form_and_counted_alike():
    M, I = 8, 1536  # noqa: E741
    with interpreting() as launches:
        step(swiglu_triton, M, I, torch.bfloat16)
    expected = [2 * 3 * M * I, 2 * 5 * M * I]
    assert [sum(launch.bytes.values()) for launch in launches] == expected
    with counting(90) as traffic:
        step(swiglu_triton, M, I, torch.bfloat16, "meta")
    assert [traffic.bytes[name] for name in KERNELS] == expected


@pytest.mark.parametrize("arch", [80, 89, 90])
@pytest.mark.parametrize(("I", "dtype"), [(8192, torch.bfloat16), (17920, torch.float32)])
def test_each_kernel_is_sound_machine_code(arch, I, dtype):  # noqa: E741
    with compiling(arch) as compiled:
        step(swiglu_triton, 4096, I, dtype, "meta")
    assert [kernel.kernel for kernel in compiled] == KERNELS
    for kernel in compiled:
        assert kernel.spill_instructions == kernel.stack == 0
        assert kernel.registers <= 64, "a full processor of 2,048 threads has 32 for each, half a one 64"
        assert ".v4" in kernel.ptx
