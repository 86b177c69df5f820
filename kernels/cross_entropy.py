"""Cross-entropy of a vocabulary head over hidden states, without ever holding all logits.

    Z = head(X)        loss = (1/n) Σ_i (log Σ_v exp Z[i, v] − Z[i, label_i])        over the n rows whose label is not IGNORE

    dZ[i] = softmax(Z[i]) − onehot(label_i)        dX = (1/n) dZ W        dW = (1/n) dZᵀ X

for a linear head, Z = X Wᵀ; X (N, C), W (V, C). The logits of one chunk of rows are made, overwritten with dZ as their loss is
found, multiplied on, and dropped: a full (N, V) tensor of a 200k vocabulary would outweigh the model's activations many times.
So forward finds loss and gradients in one pass, dW only if W is trained, and backward scales them. Rows without a target are
left out of every product. Label smoothing and weights of classes are declined: fine-tuning a decoder uses neither.
Source: Bridle 1990, "Training Stochastic Model Recognition Algorithms as Networks", for dZ; Wijmans et al. 2024, "Cut Your
Losses in Large-Vocabulary Language Models", for the memory.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minilora.kernels import backend
from minilora.kernels.linear import Linear, linear

IGNORE = -100  # torch's own ignore_index: a label that asks for no loss
CHUNK = 256  # rows on a CPU at least; the head costs 1.03 × its bare products at 256 rows, 1.16 × at 128, 1.41 × at 64
LOGITS = 2**24  # and as many more as have so many logits, 64 MB; Phi-3-mini's head takes 1.75 ms a row of 256, 1.54 of 512
# Rows on a GPU. Each chunk reads W twice: in bfloat16, 1,024 rows multiply 1,024 times for a byte of it, where an H100 could 295
# times while it reads one, so that reading hides; and the logits of a 200k vocabulary take no more than 0.41 GB.
GPU_CHUNK = 1024


def chunk_rows(n: int, device: torch.device | str, V: int = LOGITS) -> int:
    """How many of n rows have their logits over V tokens at once, in as many chunks as are needed, all of a size.

    510 rows that could come 341 at a time come 255 at a time, in as many passes over W and three quarters of the memory.
    Where V is not known, no more come than of any vocabulary.
    """
    most = max(CHUNK, LOGITS // V) if torch.device(device).type == "cpu" else GPU_CHUNK
    return math.ceil(n / math.ceil(n / most))


def cross_entropy_reference(head: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor) -> Tensor:
    """The equation as plain differentiable PyTorch with full logits: the law the operation is held to."""
    return F.cross_entropy(_at_least_float32(head(x)), labels, ignore_index=IGNORE)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def losses_and_dlogits_(logits: Tensor, labels: Tensor) -> Tensor:
    """Every row's loss (M,) in PyTorch; the logits (M, V) become dZ. Both are 0 in rows of IGNORE."""
    wide, ignored = _at_least_float32(logits), (labels == IGNORE).nonzero().squeeze(1)
    at = labels.index_fill(0, ignored, 0)[:, None]
    chosen, top = wide.gather(1, at), wide.amax(dim=1, keepdim=True)
    torch.softmax(wide, dim=1, out=wide)  # a row at a time, in the cache, and one exponential an element
    losses = top - chosen - wide.amax(dim=1, keepdim=True).log()  # the largest probability is 1 / Σ exp(Z − top)
    wide.scatter_add_(1, at, wide.new_full((1, 1), -1).expand_as(at)).index_fill_(0, ignored, 0)
    if wide is not logits:
        logits.copy_(wide)
    return losses.squeeze(1).index_fill_(0, ignored, 0)


@torch.library.custom_op("minilora::cross_entropy_", mutates_args={"logits"})
def _in_place_op(logits: Tensor, labels: Tensor) -> Tensor:
    """losses_and_dlogits_ by the backend that runs for such logits, which must be contiguous."""
    if backend.choose(logits.device, logits.dtype)[0] == "torch":
        return losses_and_dlogits_(logits, labels)
    from minilora.kernels import cross_entropy_triton  # here, so that machines without Triton import all the rest

    with torch.cuda.device_of(logits):
        return cross_entropy_triton.losses_and_dlogits_(logits, labels)


@_in_place_op.register_fake
def _(logits, labels):
    return _at_least_float32(logits.new_empty(len(labels)))


@torch.library.custom_op("minilora::count_targets", mutates_args=())
def _count_targets(labels: Tensor) -> Tensor:
    """n, () int64; an operation, since torch.compile must not look into a tensor."""
    count = (labels != IGNORE).sum()
    if not count:
        raise ValueError(f"every label is {IGNORE} (ignored): a loss needs at least one target token")
    return count


@_count_targets.register_fake
def _(labels):
    return labels.new_empty(())


# A linear head: one opaque operation, whose body may choose rows by their labels.


@torch.library.custom_op("minilora::linear_cross_entropy", mutates_args=())
def _linear_op(labels: Tensor, needed: list[bool], x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """The mean loss, and its gradients by those of x, weight and bias that are needed, in this order."""
    return of_linear(labels, needed, x, weight, bias)


def of_linear(labels, needed, x, weight, bias) -> list[Tensor]:
    gradients = [torch.zeros_like(tensor) if need else None for tensor, need in zip((x, weight, bias), needed, strict=True)]
    dx, dweight, dbias = gradients
    loss, share = _at_least_float32(x.new_zeros(())), 1 / _count_targets(labels).item()
    all_rows = (labels != IGNORE).nonzero().squeeze(1)
    for rows in all_rows.split(chunk_rows(len(all_rows), x.device, len(weight))):
        x_i = x[rows]
        dlogits = linear(x_i, weight, bias)
        loss += _in_place_op(dlogits, labels[rows]).sum()
        if dweight is not None:
            dweight.addmm_(dlogits.T, x_i, alpha=share)
        if dbias is not None:
            dbias.add_(dlogits.sum(dim=0), alpha=share)
        if dx is not None:
            dx[rows] = linear(dlogits, weight.t()).mul_(share)
        del dlogits  # before the next chunk's are made
    return [loss.mul_(share), *(gradient for gradient in gradients if gradient is not None)]


@_linear_op.register_fake
def _(labels, needed, x, weight, bias):
    gradients = [torch.empty_like(tensor) for tensor, need in zip((x, weight, bias), needed, strict=True) if need]
    return [_at_least_float32(x.new_empty(())), *gradients]


def _is_linear(head: nn.Module, x: Tensor) -> bool:
    """Whether head(x) is x Wᵀ + bias and nothing else."""
    hooks = head._forward_pre_hooks or head._forward_hooks or head._backward_pre_hooks or head._backward_hooks
    plain = type(head) in (nn.Linear, Linear) and type(head.weight) in (Tensor, nn.Parameter)  # no adapter, no 4 bits
    return plain and not hooks and not torch.is_autocast_enabled(x.device.type)


# Any other head, one with an adapter or a 4-bit weight: its gradients by autograd, from dZ.


def of_any(head, labels, needed, *inputs) -> list[Tensor]:
    """As of_linear, for any head and inputs = (x, *head.parameters())."""
    wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
    gradients, x, n = [torch.zeros_like(tensor) for tensor in wanted], inputs[0], _count_targets(labels)
    loss = _at_least_float32(x.new_zeros(()))
    all_rows = _rows(labels)
    for rows in all_rows.split(chunk_rows(len(all_rows), x.device)):
        x_i = x[rows].detach().requires_grad_()
        with torch.set_grad_enabled(bool(wanted)):
            logits = head(x_i)
        dlogits = logits.detach().contiguous()
        loss = loss + _in_place_op(dlogits, labels[rows]).sum()
        if wanted:
            found = torch.autograd.grad(logits, [x_i if tensor is x else tensor for tensor in wanted], dlogits)
            for tensor, gradient, part in zip(wanted, gradients, found, strict=True):
                gradient.index_add_(0, rows, part / n) if tensor is x else gradient.add_(part / n)
        del logits, dlogits  # before the next chunk's are made
    return [loss / n, *gradients]


def _rows(labels: Tensor) -> Tensor:
    """The numbers of the rows that have a target; of all, where torch.compile traces, which must not look into a tensor."""
    if torch.compiler.is_compiling():
        return torch.arange(len(labels), device=labels.device)
    return (labels != IGNORE).nonzero().squeeze(1)


class _MeanLoss(torch.autograd.Function):
    """Finds the loss and its gradients by x and by the head's parameters in one pass; backward scales them."""

    @staticmethod
    def forward(ctx, find, labels, needed, *inputs):
        loss, *gradients = find(labels, needed, *inputs)
        ctx.needed = needed
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        gradients = iter(ctx.saved_tensors)
        return None, None, None, *(next(gradients) * dloss if need else None for need in ctx.needed)


def _mean_loss(find: Callable[..., list[Tensor]], labels: Tensor, *inputs: Tensor | None) -> Tensor:
    needed = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in inputs]
    return _MeanLoss.apply(find, labels, needed, *inputs) if any(needed) else find(labels, needed, *inputs)[0]


def mean_loss_of_any(head: nn.Module, labels: Tensor, x: Tensor) -> Tensor:
    return _mean_loss(partial(of_any, head), labels, x, *head.parameters())


def head_cross_entropy(head: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """The mean loss of head(x) against labels, differentiable once in x and in the head's trainable parameters.

    It works under torch.compile without a graph break; heads other than nn.Linear then multiply the ignored rows too.

    Args:
        head: maps (n, C) to logits (n, V); called on at most chunk_rows at a time, or not at all where it is an nn.Linear. Its
            logits are overwritten: the last operation of any other head must not keep its result for backward.
        x: (N, C) hidden states.
        labels: (N,) int64 in 0..V−1, or IGNORE.

    Returns:
        A scalar, float32 (float64 for float64 hidden states).

    Raises:
        ValueError: no label asks for a loss (the mean over none would be NaN).
    """
    if _is_linear(head, x):
        return _mean_loss(_linear_op, labels, x, head.weight, head.bias)
    if torch.compiler.is_compiling():
        from minilora.kernels.cross_entropy_compiled import mean_loss_of_any as traced  # here: torch._dynamo takes 1.2 s

        return traced(head, labels, x)
    return mean_loss_of_any(head, labels, x)
