"""What backward makes again: the same gradients as if it had been kept, less memory, and no part where others decide."""

import weakref

import pytest
import torch
from helpers import peak_bytes
from torch import nn
from torch.utils.checkpoint import checkpoint

from minilora.kernels.remade import remade

made = []


def square(x):
    made.append(x.shape)
    return x.square()


@pytest.fixture(autouse=True)
def _forget():
    made.clear()


def run(x: torch.Tensor, w: torch.Tensor, keeps: bool) -> torch.Tensor:
    y = square(x)
    if keeps:
        return y @ w
    with remade(y, square, x):
        return y @ w


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_what_was_kept_bit_for_bit(dtype):
    x, w = torch.randn(5, 7).to(dtype).requires_grad_(), torch.randn(7, 3).to(dtype).requires_grad_()
    found, expected = (torch.autograd.grad(run(x, w, keeps).sum(), (x, w)) for keeps in (False, True))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert len(made) == 3  # forward twice, and once again in backward


def test_the_result_is_gone_after_forward_and_its_views_are_made_again_too():
    x, w = torch.randn(2, 3, 7, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    y = square(x)
    with remade(y, square, x):
        out = nn.functional.linear(y, w.T)  # keeps a view of y, (6, 7)
    there = weakref.ref(y)
    del y
    assert there() is None
    out.sum().backward()
    assert made == [(2, 3, 7)] * 2
    torch.testing.assert_close(w.grad, x.detach().square().flatten(0, 1).sum(0)[:, None].expand(7, 3))


def test_other_tensors_are_kept_as_they_are():
    x, w, v = (torch.randn(4, 4, requires_grad=True) for _ in range(3))
    y = square(x)
    with remade(y, square, x):
        out = (y[:2] @ w).sum() + (w @ v).sum() + (y.T @ v).sum()  # a part of y, and a view that is not contiguous
    out.backward()
    assert len(made) == 1
    torch.testing.assert_close(v.grad, w.detach().sum(0)[:, None].expand(4, 4) + x.detach().square().sum(1)[:, None].expand(4, 4))


def test_blocks_within_blocks_make_each_its_own():
    x, w, v = (torch.randn(4, 4, requires_grad=True) for _ in range(3))
    y = square(x)
    with remade(y, square, x):
        h = y @ w
        z = square(h)
        with remade(z, square, h):
            out = (z @ v).sum() + (y @ v).sum()
    found = torch.autograd.grad(out, (x, w, v))
    y = x.square()
    h = y @ w
    expected = torch.autograd.grad((h.square() @ v).sum() + (y @ v).sum(), (x, w, v))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert made.count((4, 4)) == 5  # y is made for each of the two that use it


def test_within_checkpointing_and_without_gradients_nothing_is_made_again():
    x, w = torch.randn(5, 7, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    checkpoint(run, x, w, False, use_reentrant=False).sum().backward()
    assert len(made) == 2  # as checkpointing does
    with torch.no_grad():
        run(x, w, False)
    assert len(made) == 3


def test_it_is_compiled_without_a_break():
    x, w = torch.randn(5, 7, requires_grad=True), torch.randn(7, 3, requires_grad=True)

    def plain(x, w):
        y = x.square()
        with remade(y, torch.square, x):
            return y @ w

    found, expected = (
        torch.autograd.grad(each(x, w).sum(), (x, w))
        for each in (torch.compile(plain, fullgraph=True, backend="aot_eager"), plain)
    )
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_an_error_inside_leaves_nothing_behind():
    x, w = torch.randn(5, 7, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    y = square(x)
    with pytest.raises(ValueError, match="inside"), remade(y, square, x):
        raise ValueError("inside")
    (y @ w).sum().backward()
    assert len(made) == 1


def test_it_spares_the_memory_of_what_it_makes_again():
    x, w = torch.randn(1000, 64, requires_grad=True), torch.randn(64, 64, requires_grad=True)

    def deep(keeps):
        h = x
        for _ in range(8):
            h = run(h, w, keeps)
        h.sum().backward()

    assert peak_bytes(lambda: deep(False)) < 0.7 * peak_bytes(lambda: deep(True))


def test_a_second_derivative_passes_through_what_is_made_again():
    x, w = torch.randn(5, 7, dtype=torch.float64, requires_grad=True), torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    found = []
    for keeps in (False, True):
        (dw,) = torch.autograd.grad(run(x, w, keeps).square().sum(), w, create_graph=True)
        found.append(torch.autograd.grad(dw.sum(), x)[0])
    torch.testing.assert_close(*found)
