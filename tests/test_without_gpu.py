"""The harness itself: what it catches, what it mends, what it counts."""

import pytest
import torch
import triton
import triton.language as tl
from without_gpu import MemoryFault, compiling, counting, interpreting


@triton.jit
def copy_kernel(X, Y, N, LIMIT, STEP, B: tl.constexpr):
    at = tl.program_id(0) * STEP + tl.arange(0, B)
    tl.store(Y + at, tl.load(X + at, mask=at < LIMIT, other=0.0), mask=at < LIMIT)


def copy(x, y, limit, step=16):
    copy_kernel[(triton.cdiv(x.numel(), 16),)](x, y, x.numel(), limit, step, B=16)


def test_a_sound_kernel_passes_and_its_bytes_are_counted():
    x, y = torch.randn(64), torch.empty(64)
    with interpreting() as launches:
        copy(x, y, 64)
    assert torch.equal(x, y)
    assert launches[0].bytes == {"X": 256, "Y": 256}


@pytest.mark.parametrize(
    ("size", "limit", "step", "fault"),
    [(50, 51, 16, "loads what is no element"), (64, 64, 8, "stores to one address twice")],
)
def test_a_step_out_of_bounds_and_a_race_are_caught(size, limit, step, fault):
    x = torch.randn(size + 16)[:size]
    with pytest.raises(MemoryFault, match=f"copy_kernel {fault}"), interpreting():
        copy(x, torch.empty(size), limit, step)


def test_gaps_between_the_rows_of_a_view_are_out_of_bounds():
    with pytest.raises(MemoryFault, match="loads what is no element"), interpreting():
        copy(torch.randn(4, 32)[:, :16], torch.empty(64), 64)


def test_an_element_never_written_is_nan():
    with interpreting():
        y = torch.empty(64)
        copy(torch.randn(64), y, 60)
    assert y[60:].isnan().all()
    assert y[:60].isfinite().all()


@triton.jit
def unmasked_kernel(X, Y, N, B: tl.constexpr):
    at = tl.arange(0, B)
    tl.store(Y + at, tl.load(X + at, mask=at < N))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_masked_load_leaves_undefined_is_nan(dtype):
    with interpreting():
        y = torch.zeros(16, dtype=dtype)
        unmasked_kernel[(1,)](torch.ones(10, dtype=dtype), y, 10, B=16)
    assert y[10:].isnan().all()


@triton.jit
def arithmetic_kernel(A, B, Y, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :], tl.arange(0, N)
    a, b = tl.load(A + i), tl.load(B + i)
    tl.store(Y + i, (a * b + a - b).to(tl.bfloat16))
    tl.store(Y + N * N + i, tl.dot(a, b).to(tl.bfloat16))
    tl.store(Y + 2 * N * N + j, tl.exp(tl.load(A + j).to(tl.float32)).to(tl.bfloat16))


def test_bfloat16_is_computed_with_and_rounded_as_torch_does():
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    with interpreting():
        y = torch.empty(528, dtype=torch.bfloat16)
        arithmetic_kernel[(1,)](a, b, y, N=16)
    assert torch.equal(y[:256].view(16, 16), a * b + a - b)
    assert torch.equal(y[256:512].view(16, 16), (a.float() @ b.float()).bfloat16())
    assert torch.equal(y[512:], a[0].float().exp().bfloat16())


def test_triton_is_left_as_it_was():
    before = {name: vars(tl)[name] for name in ("load", "store", "dot", "arange", "zeros", "where")}
    with interpreting():
        copy(torch.ones(16), torch.empty(16), 16)
    assert all(vars(tl)[name] is function for name, function in before.items())
    with compiling(90) as compiled:
        copy(torch.ones(64, device="meta"), torch.empty(64, device="meta"), 64)
    assert compiled[0].registers > 0


def test_torchs_own_operations_are_counted_by_their_tensors():
    a, b = torch.empty(4, 8, device="meta"), torch.empty(8, 2, device="meta")
    with counting(90) as traffic:
        a @ b
        torch.t(a)  # a view moves nothing
        b.copy_(b)  # read once, and written once
    assert traffic.operations == [(4 * (32 + 16 + 8), 2 * 4 * 8 * 2, "mm"), (4 * (16 + 16), 0, "copy_")]
