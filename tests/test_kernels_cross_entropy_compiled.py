"""The whole of a loss as torch.compile takes it where the head is no plain linear layer."""

import pytest
import torch
from helpers import rms_error
from torch import nn

from minilora.kernels.cross_entropy import CHUNK, IGNORE, head_cross_entropy


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_head_of_several_layers_compiles_without_a_break_and_gives_the_same(dynamic):
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 40, bias=False))
    head[0].requires_grad_(False)
    x, labels = torch.randn(CHUNK + 3, 24, requires_grad=True), torch.randint(40, (CHUNK + 3,))
    labels[::3] = IGNORE
    torch.compiler.reset()
    compiled = torch.compile(head_cross_entropy, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    found, expected = (
        (loss, *torch.autograd.grad(loss, (x, head[2].weight)))
        for loss in (run(head, x, labels) for run in (compiled, head_cross_entropy))
    )
    assert all(rms_error(one, other) < 1e-6 for one, other in zip(found, expected, strict=True))
    with torch.no_grad():
        assert rms_error(compiled(head, x, labels), expected[0]) < 1e-6
    with pytest.raises(ValueError, match="a loss needs at least one target token"):
        compiled(head, x, torch.full_like(labels, IGNORE))
