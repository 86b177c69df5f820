"""Several processes, on one machine or on many, that train as one: torchrun starts them, torch.distributed joins them.

    batch = per_device_train_batch_size · processes examples, those that one process would take; rank k takes every
            world_size-th from the k-th on
    gradient of a step = Σ over ranks of the gradient of (loss summed over the rank's target tokens / target tokens of all)

So a step is the same however many processes take it, an epoch's smaller last batch included. DistributedDataParallel would
divide by ranks, where this divides by tokens; what else it does for an adapter is one all-reduce of a flat buffer, written here.

A base that one GPU cannot hold is split by torch's own FSDP2; what is trained stays whole on every rank, so that gradients,
optimizer and checkpoints know nothing of it. Outside a process group every function here is that of one process alone.
"""

import gc
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from importlib import import_module
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from minilora.adapters.switching import adapters_of
from minilora.kernels.nf4_tensor import NF4Tensor
from minilora.training.config import TrainConfig

T = TypeVar("T")
TIMEOUT = timedelta(minutes=10)  # who waits longer for another process takes it for lost


# The processes


def world_size() -> int:
    return dist.get_world_size() if _several() else 1


def rank() -> int:
    """This process's number, from 0 on: rank 0 alone prints and writes."""
    return dist.get_rank() if _several() else 0


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def joined() -> Iterator[None]:
    """Inside, the processes that torchrun started are one group, and only rank 0 prints; without torchrun nothing happens.

    Raises:
        ValueError: a machine with GPUs has fewer of them than processes.
        ConnectionError: another process has ended, or does not answer.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        _take_gpu(int(os.environ["LOCAL_RANK"]))
    import_module("torch._dynamo")  # as our operations do later: within a group, default arguments there would keep the group
    dist.init_process_group(backend, timeout=TIMEOUT)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere) if rank() else nullcontext():
        print(f"processes: {world_size()}, {os.environ['LOCAL_WORLD_SIZE']} of them on this machine, joined by {backend}")
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            raise ConnectionError(
                f"another process has ended or does not answer, and so this one stops too ({str(error).partition('. ')[0]}). "
                "What is saved is whole: see what that process told, and go on with --resume"
            ) from None
    # Gloo's threads end with the last that holds the group. One that still lets go of a tensor while Python ends aborts the
    # process, and torchrun's agents on other hosts, which had no fault, wait five minutes for that one's.
    gc.collect()  # a split base holds the group, in circles
    dist.destroy_process_group()  # not after an error: what is under way with a lost process would never end


def _take_gpu(local_rank: int) -> None:
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"each process needs a GPU of its own, and this machine has {torch.cuda.device_count()}: start as many with "
            "torchrun --nproc-per-node, or hide the GPUs with CUDA_VISIBLE_DEVICES="
        )
    torch.cuda.set_device(local_rank)


def title() -> str:
    """Which of several processes speaks; nothing where there is one."""
    return f" (rank {rank()} of {world_size()})" if _several() else ""


# Work shared out


def train_batch_size(config: TrainConfig) -> int:
    """Examples of a batch, over all processes."""
    return config.per_device_train_batch_size * world_size()


def of_this_rank(batch: Sequence[T]) -> tuple[Sequence[T], bool]:
    """This rank's part of a batch, and whether it counts.

    A rank that none is left for gets the first example again, which must not count: with FSDP no forward works without it.
    """
    part = batch[rank() :: world_size()]
    return (part, True) if part else (batch[:1], False)


def summed(*values: float) -> list[float]:
    """Each value added up over all ranks, in float64."""
    return _reduced(values, dist.ReduceOp.SUM) if _several() else list(values)


def largest(value: float) -> float:
    """The largest of all ranks' values."""
    return _reduced([value], dist.ReduceOp.MAX)[0] if _several() else value


def _reduced(values: Iterable[float], operation) -> list[float]:
    tensor = torch.tensor([*values], dtype=torch.float64)
    dist.all_reduce(tensor, operation)
    return tensor.tolist()


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Adds up every parameter's gradient over all ranks, by one all-reduce of one flat buffer for each dtype."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients) if _several() else ():
        alike = [gradient for gradient in gradients if gradient.dtype == dtype]
        flat = parameters_to_vector(alike)
        dist.all_reduce(flat)
        vector_to_parameters(flat, alike)


def broadcast(parameters: Iterable[nn.Parameter]) -> None:
    """Gives every rank the parameters of rank 0."""
    for parameter in parameters if _several() else ():
        dist.broadcast(parameter.data, src=0)


def wait_for_all() -> None:
    """Returns when every rank has come here."""
    if _several():
        summed(0.0)  # a barrier by gloo, whatever the device; dist.barrier would be one by NCCL


# A base that is split


def shard_base(model: nn.Module, device: str = "cpu") -> nn.Module:
    """Splits the frozen parameters evenly over all ranks, by torch's FSDP2; returns the model.

    A decoder layer's weights (any module's in an nn.ModuleList) are gathered when its forward or backward begins, and dropped
    when it ends; all else, embedding and head, are gathered for the whole step. What is trained stays whole on each rank. The
    model may lie on the CPU: at most one layer at a time is whole on the device.

    Args:
        device: "cuda" or "cpu", where this rank's part goes.

    Raises:
        ValueError: there is one process only, or weights are 4-bit.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # a second of imports, which all other runs are spared

    if world_size() == 1:
        raise ValueError("the base is split over several processes, and this is one: start them with torchrun")
    if any(isinstance(parameter, NF4Tensor) for parameter in model.parameters()):
        raise ValueError(
            "4-bit weights cannot be split over processes: give each the whole 4-bit base, without fsdp, or load 16-bit weights"
        )
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # which no operation here writes into
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for parameter in trained:
        parameter.data = parameter.data.to(device)
    mesh = init_device_mesh(device, (world_size(),))
    layers = [layer for module in model.modules() if isinstance(module, nn.ModuleList) for layer in module]
    for module in [*reversed(layers), model]:  # inner ones first
        fully_shard(module, mesh=mesh, ignored_params=trained)
        _follow(model)
    mesh._pg_registry.clear()  # the mesh outlives the model in torch's caches of DTensor, and must not keep the group with it
    return model


def _follow(model: nn.Module) -> None:
    """Gives the modules that adapters stand for the parameters that are in the model now: they would keep whole ones alive."""
    adapters = adapters_of(model)
    for path, layer in adapters[adapters.active].layers.items() if adapters.named else ():
        for name, _ in list(adapters.base[path].named_parameters(recurse=False)):
            setattr(adapters.base[path], name, getattr(layer, name))


def in_turn(make: Callable[[], T]) -> T:
    """What make returns, called in one process of a machine after the other: what it needs for a while is needed once."""
    for turn in range(int(largest(int(os.environ.get("LOCAL_WORLD_SIZE", 1))))):
        if turn == int(os.environ.get("LOCAL_RANK", 0)):
            made = make()
        wait_for_all()
    return made


def after_first(make: Callable[[], T]) -> T:
    """What make returns, called in one process of a machine, then in all others, which find what it left on the disk."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    try:
        made = make() if first else None
    finally:  # what fails in the first is left to fail in the others likewise
        wait_for_all()
    return made if first else make()
