"""The harness itself: what it catches, what it mends, what it counts."""

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from without_gpu import MemoryFault, compiling, counting, interpreting

from minilora.kernels.swiglu import swiglu


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
        a.view(2, 2, 8) @ b  # as one matrix, whose result is a view of another shape
        torch.t(a)  # a view moves nothing
        b.copy_(b)  # read once, and written once
    assert traffic.operations == [(4 * (32 + 16 + 8), 2 * 4 * 8 * 2, "mm"), (4 * (16 + 16), 0, "copy_")]


def test_our_own_operations_are_counted_by_what_they_launch():
    packed = torch.empty(4, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with counting(90) as traffic:
        y = swiglu(packed)
    assert traffic.operations == [(2 * (4 * 16 + 4 * 8), 0, "swiglu_kernel")]
    assert y.grad_fn is not None


def test_attention_is_counted_as_flash_attention():
    q, k, v = (torch.empty(1, 2, 64, 32, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in "qkv")
    with counting(90) as traffic:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).backward(q.detach())
    forward, backward = (operation for operation in traffic.operations if operation.flops)
    assert (forward.flops, backward.flops) == (2 * 2 * 64 * 64 * 32, 5 * 2 * 64 * 64 * 32)
    assert 4 * q.nbytes < forward.bytes < 4.2 * q.nbytes  # and the logarithms of its sums
    assert 8 * q.nbytes < backward.bytes < 8.2 * q.nbytes
    with counting(90), pytest.raises(AssertionError, match="only plain causal attention is counted"):
        F.scaled_dot_product_attention(q, k, v)


def test_of_a_table_only_what_is_picked_is_read():
    table, ids = torch.empty(1000, 8, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")
    with counting(90) as traffic:
        F.embedding(ids, table)
    assert traffic.operations == [(2 * 4 * 3 * 8, 0, "embedding")]


def test_lists_of_tensors_are_read_and_written_by_one_launch():
    ours, theirs = ([torch.empty(10, device="meta") for _ in range(3)] for _ in range(2))
    with counting(90) as traffic:
        torch._foreach_add_(ours, theirs)
    assert traffic.operations == [(3 * 3 * 40, 0, "_foreach_add_")]


def test_what_has_no_values_answers_with_yes_and_a_mask_picks_all():
    x = torch.empty(6, 2, device="meta")
    with counting(90) as traffic:
        mask = x[:, 0] > 0
        assert mask.any()
        assert x[mask].shape == (6, 2)
    assert [operation.kernel for operation in traffic.operations] == ["gt", "any", "clone"]
