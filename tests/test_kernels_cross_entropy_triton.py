"""The Triton kernel of cross-entropy without a GPU: right by the interpreter, sound by its machine code, lean by its bytes."""

import pytest
import torch
from helpers import rms_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from without_gpu import MemoryFault, compiling, counting, interpreting, planted

from minilora.kernels import cross_entropy, cross_entropy_triton
from minilora.kernels.cross_entropy import IGNORE, cross_entropy_reference, head_cross_entropy

# Of each element of dZ, which is rounded once: half a unit in the last place; in float32 that of an exponential far out.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def inputs(M, V, dtype=torch.float32, device="cpu", seed=0, scale=3.0):
    """Logits and labels: the first is ignored, every second is the last id."""
    torch.manual_seed(seed)
    logits, labels = (scale * torch.randn(M, V, device=device)).to(dtype), torch.randint(V, (M,), device=device)
    labels[1::2], labels[:1] = V - 1, IGNORE
    return logits, labels


def step(steps, *sizes, **how):
    """Losses and dZ by the steps of a module."""
    logits, labels = inputs(*sizes, **how)
    return steps.losses_and_dlogits_(logits, labels), logits


@settings(max_examples=20)
@given(
    st.integers(1, 5),
    st.sampled_from([1, 2, 3, 40, 257, 4095, 4096, 4097, 9000]),
    st.sampled_from(list(TOLERANCE)),
    st.sampled_from([1.0, 30.0]),
    st.integers(0, 2**31),
)
def test_losses_and_gradients_equal_those_of_float64(M, V, dtype, scale, seed):
    logits, labels = inputs(M, V, dtype, seed=seed, scale=scale)
    double = logits.double().requires_grad_()
    expected = nn.functional.cross_entropy(double, labels, ignore_index=IGNORE, reduction="none")
    expected.sum().backward()
    with interpreting():
        losses = cross_entropy_triton.losses_and_dlogits_(logits, labels)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-6, atol=1e-6)  # of one id the loss is 0
    torch.testing.assert_close(logits.double(), double.grad, rtol=TOLERANCE[dtype], atol=1e-7)
    assert losses[0] == 0
    assert not logits[0].any()


class Transposed(nn.Sequential):
    """Its logits are no contiguous matrix."""

    def forward(self, x):
        return super().forward(x).T.contiguous().T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [lambda linear: linear, nn.Sequential, Transposed], ids=["linear", "any", "transposed"])
def test_a_head_over_it_equals_the_float64_reference(kind, dtype):
    torch.manual_seed(0)
    head = nn.Linear(24, 300).to(dtype)
    labels = torch.where(torch.rand(70) < 0.3, IGNORE, torch.randint(300, (70,)))
    x = torch.randn(70, 24).to(dtype).requires_grad_()
    double = nn.Linear(24, 300, dtype=torch.float64)
    double.load_state_dict({name: value.double() for name, value in head.state_dict().items()})
    wide = x.detach().double().requires_grad_()
    expected = cross_entropy_reference(double, wide, labels)
    with interpreting() as launches:
        loss = head_cross_entropy(kind(head), x, labels)
    assert [launch.kernel for launch in launches] == ["cross_entropy_kernel"]
    found = [loss, *torch.autograd.grad(loss, [x, head.weight, head.bias])]
    expected = [expected, *torch.autograd.grad(expected, [wide, double.weight, double.bias])]
    errors = [rms_error(one, other) for one, other in zip(found, expected, strict=True)]
    assert max(errors) < (2e-6 if dtype == torch.float32 else 1e-2), errors


def test_a_logit_of_minus_infinity_has_no_probability_and_large_ones_stay_finite():
    logits = torch.tensor([[float("-inf"), 1.0, 2.0], [3e4, -3e4, 0.0]])
    with interpreting():
        losses = cross_entropy_triton.losses_and_dlogits_(logits, torch.tensor([2, 1]))
    assert losses.tolist() == pytest.approx([0.3132617, 6e4])
    torch.testing.assert_close(logits, torch.tensor([[0.0, 0.2689414, -0.2689414], [1.0, -1.0, 0.0]]))


def test_a_label_that_is_no_id_gives_nan_and_not_another_rows_loss():
    with interpreting():
        losses = cross_entropy_triton.losses_and_dlogits_(torch.randn(3, 7), torch.tensor([7, -1, 3]))
    assert losses.isnan().tolist() == [True, True, False]


def test_no_rows_launch_nothing():
    with interpreting() as launches:
        losses, _ = step(cross_entropy_triton, 0, 5)
    assert losses.shape == (0,)
    assert launches == []


MUTANTS = {
    "the last block is left out": ("for start in range(0, V, BV):", "for start in range(0, V - BV, BV):", 2),
    "padding counts as logits of 0": ('other=float("-inf")', "other=0.0", 2),
    "sums keep the scale of an old maximum": ("sums = sums * tl.exp(tops - higher)", "sums = sums", 1),
    "lanes are summed without their maxima": ("tl.sum(sums * tl.exp(tops - top), axis=0)", "tl.sum(sums, axis=0)", 1),
    "the loss forgets the maximum": ("top - chosen + tl.log(total)", "tl.log(total) - chosen", 1),
    "the loss forgets the label": ("top - chosen + ", "top + ", 1),
    "the gradient is not normalised": ("share * tl.exp", "tl.exp", 1),
    "the gradient forgets the label": ("== label, 1.0, 0.0)", "== label, 0.0, 0.0)", 1),
    "the label is found in the first block only": ("start + rv == label", "rv == label", 1),
    "an ignored row has a gradient": ("tl.where(wanted, dz, 0.0)", "dz", 1),
    "an ignored row has a loss": ("tl.where(wanted, top - chosen + tl.log(total), 0.0)", "top + tl.log(total)", 1),
    "the gradient is written past the row": ("tl.store(Z + start + rv,", "tl.store(Z + start + rv + 1,", 1),
}


def faults_of(steps) -> list[str]:
    try:
        with interpreting():
            found = step(steps, 4, 4500)
    except MemoryFault as fault:
        return [str(fault)]
    return [f"{error:.1e}" for error in map(rms_error, found, step(cross_entropy, 4, 4500)) if not error < 1e-6]


def test_the_kernel_itself_passes_where_mutants_must_not():
    assert faults_of(cross_entropy_triton) == []


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_fault_is_found(name, tmp_path):
    assert faults_of(planted(cross_entropy_triton, *MUTANTS[name], tmp_path))


def test_bytes_are_those_of_the_closed_form_and_counted_alike():
    M, V = 8, 4800
    with interpreting() as launches:
        step(cross_entropy_triton, M, V, torch.bfloat16)
    expected = 2 * 2 * M * V + 8 * M + 4 * M  # the logits there and back, labels, losses
    assert [sum(launch.bytes.values()) for launch in launches] == [expected]
    with counting(90) as traffic:
        step(cross_entropy_triton, M, V, torch.bfloat16, "meta")
    assert traffic.bytes["cross_entropy_kernel"] == expected


@pytest.mark.parametrize("arch", [80, 89, 90])
@pytest.mark.parametrize(
    ("V", "dtype"), [(32064, torch.bfloat16), (100352, torch.float32), (200064, torch.bfloat16), (50257, torch.float16)]
)
def test_the_kernel_is_sound_machine_code(arch, V, dtype):
    with compiling(arch) as compiled:
        step(cross_entropy_triton, 1024, V, dtype, "meta")
    (kernel,) = compiled
    assert kernel.spill_instructions == kernel.stack == 0
    assert kernel.registers <= 64, "two rows of 16 warps must share a processor"
    assert ".v4" in kernel.ptx or V % 8
