"""The Triton kernels of rms_norm without a GPU: right by the interpreter, sound by their machine code, lean by their bytes."""

import pytest
import torch
from elementwise_cases import EPS, assert_equals_reference, gpu_dtypes, rms_norm_cases
from helpers import rms_error
from hypothesis import given, settings
from without_gpu import MemoryFault, compiling, counting, interpreting, planted

from minilora.kernels import rms_norm, rms_norm_triton

KERNELS = ["rms_norm_kernel", "rms_norm_backward_kernel"]


@settings(max_examples=15)
@given(rms_norm_cases(gpu_dtypes))
def test_values_and_gradients_equal_the_float64_reference(case):
    with interpreting() as launches:
        assert_equals_reference(case)
    assert [launch.kernel for launch in launches] == KERNELS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_are_rounded_as_those_of_pytorch(dtype):
    torch.manual_seed(0)
    x, delta, weight = torch.randn(20, 96).to(dtype), torch.randn(20, 96).to(dtype), torch.randn(96).to(dtype)
    with interpreting():
        y, rho, h = rms_norm_triton.forward(x, delta, weight, EPS)
    assert torch.equal(h, x + delta)
    expected, expected_rho = rms_norm.forward(h, weight, EPS)
    assert torch.equal(y, expected)
    assert rms_error(rho, expected_rho) < 1e-7


class InPyTorch:
    """The steps in PyTorch, called as those in Triton are."""

    @staticmethod
    def forward(x, delta, weight, eps):
        h = x if delta is None else x + delta
        return [*rms_norm.forward(h, weight, eps), *([] if delta is None else [h])]

    backward = staticmethod(rms_norm.backward)


def step(steps, M, C, dtype=torch.bfloat16, device="cpu", eps=EPS):
    """All that the four forms of the kernels give: forward with a delta and without, backward with its gradient and without."""
    torch.manual_seed(0)
    x, delta, dy, dh = (torch.randn(M, C, device=device).to(dtype) for _ in range(4))
    weight = torch.randn(C, device=device).to(dtype)
    y, rho, h = steps.forward(x, delta, weight, eps)
    alone = steps.forward(x, None, weight, eps)
    return [y, rho, h, steps.backward(dy, dh, h, rho, weight), *alone, steps.backward(dy, None, x, alone[1], weight)]


@pytest.mark.parametrize("C", [1, 2, 3])
def test_rows_of_a_few_features_are_right(C):
    with interpreting():
        found = step(rms_norm_triton, 5, C, torch.float32)
    for one, other in zip(found, step(InPyTorch, 5, C, torch.float32), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_no_rows_launch_nothing():
    with interpreting() as launches:
        assert [len(result) for result in step(rms_norm_triton, 0, 5)] == [0] * 7
    assert launches == []


def test_it_is_a_torch_operation_in_order():
    x, weight = torch.randn(3, 5), torch.randn(5)
    with interpreting():
        for delta in (None, x):
            torch.library.opcheck(torch.ops.minilora.rms_norm.default, (x, delta, weight, EPS))
            torch.library.opcheck(torch.ops.minilora.rms_norm_backward.default, (x, delta, x, torch.ones(3, 1), weight))


MUTANTS = {
    "the delta is not added": ("h.to(tl.float32) + tl.load(", "h.to(tl.float32) + 0 * tl.load(", 1),
    "the sum is not rounded": (".to(tl.float32)).to(h.dtype)\n", ".to(tl.float32))\n", 1),
    "the mean is a sum": ("axis=0) / C + eps", "axis=0) + eps", 1),
    "eps is forgotten": (" + eps)", ")", 1),
    "padding counts": ("wide * wide, axis=0) / C", "wide * wide, axis=0) / BC", 1),
    "the weight is forgotten": ("n * tl.load(W + rc, mask=inside, other=0.0).to(tl.float32)", "n", 1),
    "the row is written past its end": ("tl.store(Y + at, ", "tl.store(Y + at + 1, ", 1),
    "backward forgets the projection": ("g - n * (tl.sum(n * g, axis=0) / C)", "g", 1),
    "backward forgets the sum's gradient": ("dx += tl.load(", "dx += 0 * tl.load(", 1),
    "backward forgets the root": ("dx = rho * (", "dx = (", 1),
}


def faults_of(steps) -> list[str]:
    try:
        with interpreting():
            found = step(steps, 3, 37, eps=0.5)
    except MemoryFault as fault:
        return [str(fault)]
    errors = map(rms_error, found, step(InPyTorch, 3, 37, eps=0.5))
    return [f"{error:.1e}" for error in errors if not error < 1e-3]  # both round to bfloat16 once, and nearly always alike


def test_the_kernels_themselves_pass_where_mutants_must_not():
    assert faults_of(rms_norm_triton) == []


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_fault_is_found(name, tmp_path):
    assert faults_of(planted(rms_norm_triton, *MUTANTS[name], tmp_path))


def test_bytes_are_those_of_the_closed_form_and_counted_alike():
    M, C = 24, 1024
    with interpreting() as launches:
        step(rms_norm_triton, M, C)
    matrix, row, rhos = 2 * M * C, 2 * C, 4 * M
    expected = [tensors * matrix + row + rhos for tensors in (4, 2, 4, 3)]
    assert [sum(launch.bytes.values()) for launch in launches] == expected
    with counting(90) as traffic:
        step(rms_norm_triton, M, C, device="meta")
    assert [traffic.bytes[name] for name in KERNELS] == [sum(expected[:2]), sum(expected[2:])]


@pytest.mark.parametrize("arch", [80, 89, 90])
@pytest.mark.parametrize(("C", "dtype"), [(3072, torch.bfloat16), (5120, torch.float32)])
def test_each_kernel_is_sound_machine_code(arch, C, dtype):
    with compiling(arch) as compiled:
        step(rms_norm_triton, 4096, C, dtype, "meta")
    assert {kernel.kernel for kernel in compiled} == set(KERNELS)
    for kernel in compiled:
        assert kernel.spill_instructions == kernel.stack == 0
        assert kernel.registers <= 64, "16 warps of one row must leave room for another row"
        assert ".v4" in kernel.ptx
