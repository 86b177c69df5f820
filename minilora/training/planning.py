"""What a run will need, before any weight is loaded: the memory at the peak of a step, and the time of all steps.

Letters as in phi3.model; N = B·T tokens of a batch, n of them with a loss, d bytes an element, L layers, P weights of their
projections. In bytes, for a model whose base is frozen:

    fixed      d · weights (about half a byte where 4-bit) + adapter · (1 itself + 1 gradient + 2 moments of AdamW)
    kept       N · d · L · (2C + (H + 2Hkv)·D + H·D + 2I)                    until backward, which makes the rest again
               N · d · (L·C + that of one layer, and what its adapted projections read)           with checkpointing
    transient  the larger of a chunk of logits with the gradient of the head's input, and the backward of one MLP
    peak       fixed + kept + holes in the heap of a CPU + transient

    FLOPs      N · (4·P + 6·adapter + 7·L·T·H·D) in the layers, and 4·n·V·C in the head

of which checkpointing takes the forward's 2·P + 2·adapter + 2·L·T·H·D twice. The rates are found by running one layer of random
weights, with backward and without, and one chunk of the head, on the device itself. Source of the counting: Kaplan et al. 2020,
"Scaling Laws for Neural Language Models", table 1; a frozen weight has no gradient, so that its backward costs what its forward
does.
"""

import copy
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minilora.adapters.layers import Linear, adapted_layers
from minilora.data.encoding import Example, shuffled_batches
from minilora.data.packing import pack
from minilora.kernels.arithmetic import product_dtype
from minilora.kernels.cross_entropy import chunk_rows, head_cross_entropy
from minilora.kernels.nf4 import BLOCK
from minilora.kernels.nf4_tensor import NF4Tensor
from minilora.training.config import TrainConfig
from minilora.training.loop import total_steps

# glibc's heap keeps holes between tensors, as shares of what all layers would keep: measured on the demo's model at 4 × 128
# tokens, where that is 358 MB, 48 MB, and 112 with checkpointing. With this variable at 65536 in the environment, each tensor has
# pages of its own, and there are none.
HOLES, HOLES_CHECKPOINTED = 0.15, 0.3
THRESHOLD = "MALLOC_MMAP_THRESHOLD_"
REMADE = ("qkv_proj", "gate_up_proj", "down_proj")  # what these read is not kept but made again (kernels.remade)
CALIBRATED = 512  # tokens that the layer is timed with, at most; beyond, a product takes its time by the token
SECONDS = 1.0  # spent on each of the rates at least, after a first run that counts for nothing


class Batch(NamedTuple):
    """The sizes of one batch."""

    rows: int  # B
    length: int  # T, that of the longest row
    targets: int  # n

    @property
    def tokens(self) -> int:
        """N, padding included."""
        return self.rows * self.length


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step, over what Python and its packages take."""

    weights: int
    adapter: int
    gradients: int
    moments: int
    activations: int
    holes: int
    transient: int

    @property
    def peak(self) -> int:
        return self.weights + self.adapter + self.gradients + self.moments + self.activations + self.holes + self.transient


class Rates(NamedTuple):
    """FLOPs a second."""

    layers: float  # forward and backward
    forward: float  # of the layers alone, as checkpointing runs it first
    head: float


def batches_of(dataset: Sequence[Example], config: TrainConfig) -> list[Batch]:
    """All batches of a run, in its order."""
    rows = pack(dataset, config.max_seq_length) if config.packing else dataset
    count = total_steps(len(rows), config) * config.gradient_accumulation_steps
    drawn = islice(shuffled_batches(rows, config.per_device_train_batch_size, config.seed), count)
    return [Batch(len(batch), max(len(row.ids) for row in batch), sum(sum(row.mask[1:]) for row in batch)) for batch in drawn]


def memory(model: nn.Module, batch: Batch, config: TrainConfig, device: str = "cpu", quantize: str | None = None) -> Memory:
    """The equations above.

    Args:
        model: a Phi3ForCausalLM with its adapter, in the dtypes of the run; best on the meta device, where it has no memory.
        quantize: "nf4" where the projections of the layers will be 4-bit.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
    adapter = sum(parameter.nbytes for parameter in trained)
    heap = torch.device(device).type == "cpu" and THRESHOLD not in os.environ
    share = HOLES_CHECKPOINTED if config.gradient_checkpointing else HOLES
    return Memory(
        weights=sum(_stored(weight, quantize and name.endswith("_proj.weight")) for name, weight in frozen.items()),
        adapter=adapter,
        gradients=adapter,
        moments=2 * adapter,
        activations=kept(model, batch, config, device),
        holes=round(share * kept(model, batch, replace(config, gradient_checkpointing=False), device)) if heap else 0,
        transient=transient(model, batch, config, device),
    )


def _stored(weight: Tensor, four_bit: bool | None) -> int:
    """Bytes of a weight; of a 4-bit one those of NF4Tensor's parts."""
    blocks = math.ceil(weight.numel() / BLOCK)
    return math.ceil(weight.numel() / 2) + blocks + 4 * math.ceil(blocks / 256) + 4 if four_bit else weight.nbytes


def kept(model: nn.Module, batch: Batch, config: TrainConfig, device: str = "cpu") -> int:
    """Bytes that the layers keep for backward."""
    sizes, d, L = model.config, model.lm_head.weight.element_size(), model.config.num_hidden_layers
    a = product_dtype(model.lm_head.weight.dtype, torch.device(device)).itemsize  # of attention
    mask = batch.length * a if config.packing else 0  # once for all layers, T numbers for each token
    if not config.gradient_checkpointing:
        return batch.tokens * (mask + _kept_of_a_token(model, d, a, device))
    remade = sum(layer.in_features for layer in _adapted_projections(model, REMADE).values()) * d  # but for checkpointing
    return batch.tokens * (mask + sizes.hidden_size * d * L + (_kept_of_a_token(model, d, a, device) + remade) // L)


def _kept_of_a_token(model: nn.Module, d: int, a: int, device: str) -> int:
    sizes, H, L = model.config, model.config.num_attention_heads, model.config.num_hidden_layers
    packed = sum(sizes.qkv_sizes.values()), sum(sizes.gate_up_sizes.values())  # (H + 2Hkv)·D, 2I
    elements = L * (2 * sizes.hidden_size + packed[1])
    attention = L * (packed[0] + H * sizes.head_dim)
    statistics = L * 4 * (H + 2)  # in float32: the logarithms of attention's sums, and ρ of both norms
    masks = 0
    for path, layer in _adapted_projections(model).items():
        shared = path.endswith("o_proj") and a == d  # what o_proj reads is attention's output, kept already
        elements += (0 if shared or path.endswith(REMADE) else layer.in_features) + layer.lora_A.shape[0]
        masks += layer.in_features if layer.lora_dropout and torch.device(device).type == "cpu" else 0
    return elements * d + attention * a + statistics + masks


def _adapted_projections(model: nn.Module, names: tuple[str, ...] = ("",)) -> dict[str, Linear]:
    """The layers with adapters in the decoder, of these names."""
    layers = {path: layer for path, layer in adapted_layers(model).items() if isinstance(layer, Linear) and path.endswith(names)}
    return {path: layer for path, layer in layers.items() if layer is not model.lm_head}


def transient(model: nn.Module, batch: Batch, config: TrainConfig, device: str = "cpu") -> int:
    """Bytes that come and go at the peak, beside the activations: at the head, or in the backward of the last MLP."""
    sizes, d = model.config, model.lm_head.weight.element_size()
    rows, gpu = chunk_rows(batch.targets, device, sizes.vocab_size), torch.device(device).type != "cpu"
    # Logits become their own gradient; where they are not in float32 a CPU has a copy that is. Beside them lies all of dX.
    logits = rows * sizes.vocab_size * (d if d == 4 or gpu else d + 4) + (batch.tokens + rows) * sizes.hidden_size * d
    if config.gradient_checkpointing:  # the head is done before the last layer is computed again
        logits -= kept(model, batch, config, device) - batch.tokens * sizes.hidden_size * d * sizes.num_hidden_layers
    wide = 0 if d == 4 else 2 * (4 + d)  # of each half of gate_up: a copy in float32, and the gradient rounded back
    return max(logits, batch.tokens * sizes.intermediate_size * (d + 2 * 4 + wide))


# Time


def layer_flops(model: nn.Module, batch: Batch) -> float:
    """Of forward and backward through all layers."""
    frozen, trained, attention = _of_a_token(model, batch.length)
    return batch.tokens * (4 * frozen + 6 * trained + 7 * attention)


def forward_flops(model: nn.Module, batch: Batch) -> float:
    """Of the forward alone, which checkpointing runs once more."""
    return batch.tokens * 2 * sum(_of_a_token(model, batch.length))


def _of_a_token(model: nn.Module, length: int) -> tuple[int, int, int]:
    """P, the adapter's parameters, and L·T·H·D."""
    sizes = model.config
    layers = [(parameter.numel(), parameter.requires_grad) for parameter in model.model.layers.parameters()]
    frozen, trained = (sum(count for count, is_trained in layers if is_trained == wanted) for wanted in (False, True))
    return frozen, trained, sizes.num_hidden_layers * length * sizes.num_attention_heads * sizes.head_dim


def head_flops(model: nn.Module, targets: int) -> float:
    """Of forward and backward through a frozen head."""
    return 4.0 * targets * model.lm_head.weight.numel()


def calibrate(model: nn.Module, batch: Batch, device: str = "cpu", quantize: str | None = None) -> Rates:
    """The rates of one layer and of one chunk of the head, with random weights, in a few seconds.

    Args:
        model, quantize: as in memory.
        batch: one of the run's; its T decides how much of the work is attention's, and its B how much products are at once.
    """
    return Rates(*_layer_rates(model, batch, device, quantize), _head_rate(model, batch.targets, device))


def _layer_rates(model: nn.Module, batch: Batch, device: str, quantize: str | None) -> tuple[float, float]:
    sizes, dtype = model.config, model.lm_head.weight.dtype
    T = min(batch.length, CALIBRATED)
    batch = Batch(max(1, min(batch.rows, CALIBRATED // T)), T, 0)
    layer = _made_real(model.model.layers[0], device, quantize).train()
    tables = [torch.ones(1, 1, T, sizes.rotary_dim // 2, dtype=dtype, device=device) for _ in "cs"]
    x = torch.randn(batch.rows, T, sizes.hidden_size, dtype=dtype, device=device, requires_grad=True)
    delta = torch.zeros_like(x, requires_grad=True)  # which the layer may overwrite
    both = _time(lambda: sum(layer(x, delta, tables, None, None)).sum().backward(), device)
    alone = _time(torch.no_grad()(lambda: layer(x, delta, tables, None, None)), device)
    L = sizes.num_hidden_layers
    return layer_flops(model, batch) / L / both, forward_flops(model, batch) / L / alone


def _head_rate(model: nn.Module, targets: int, device: str) -> float:
    head = _made_real(model.lm_head, device, None).requires_grad_(False)
    rows = chunk_rows(targets, device, len(head.weight))
    x = torch.randn(rows, model.config.hidden_size, dtype=head.weight.dtype, device=device, requires_grad=True)
    labels = torch.zeros(rows, dtype=torch.long, device=device)
    return head_flops(model, rows) / _time(lambda: head_cross_entropy(head, x, labels).backward(), device)


def _made_real(module: nn.Module, device: str, quantize: str | None) -> nn.Module:
    """A copy of a module with random weights, 4-bit ones where they are asked for."""
    module = copy.deepcopy(module).to_empty(device=device)
    for name, parameter in list(module.named_parameters()):
        nn.init.normal_(parameter, std=0.02)
        if quantize and name.endswith("_proj.weight"):
            path, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(path), leaf, nn.Parameter(NF4Tensor.quantize(parameter), requires_grad=False))
    return module


def _time(run: Callable[[], None], device: str) -> float:
    """Seconds of the middle one of several runs: the quickest finds its memory warm, as a step does not."""
    taken, begun = [], time.perf_counter()
    while len(taken) < 3 or time.perf_counter() - begun < SECONDS:
        started = time.perf_counter()
        run()
        if device != "cpu":
            torch.accelerator.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def seconds(model: nn.Module, batches: Sequence[Batch], config: TrainConfig, rates: Rates) -> float:
    """Of all steps; evaluations, checkpoints and loading come on top."""
    layers = sum(layer_flops(model, batch) for batch in batches) / rates.layers
    if config.gradient_checkpointing:
        layers += sum(forward_flops(model, batch) for batch in batches) / rates.forward
    return layers + head_flops(model, sum(batch.targets for batch in batches)) / rates.head


# As text


def describe_plan(
    model: nn.Module, batches: Sequence[Batch], config: TrainConfig, device: str = "cpu", quantize: str | None = None
) -> str:
    """Memory and time of a run, as lines to read; checkpointing told both ways. Arguments as in memory and seconds."""
    largest = max(batches, key=lambda batch: memory(model, batch, config, device, quantize).peak)
    found = memory(model, largest, config, device, quantize)
    otherwise = replace(config, gradient_checkpointing=not config.gradient_checkpointing)
    rates = calibrate(model, largest, device, quantize)
    steps, needed = len(batches) // config.gradient_accumulation_steps, seconds(model, batches, config, rates)
    lines = {
        "weights": (found.weights, f"{_dtype(model)}{', 4-bit in the layers' if quantize else ''}"),
        "adapter": (found.adapter, "its gradients, and AdamW's moments, follow"),
        "gradients": (found.gradients, ""),
        "moments": (found.moments, ""),
        "activations": (found.activations, f"of the largest batch, {largest.rows} × {largest.length} tokens"),
        "holes": (found.holes, f"between them in glibc's heap; {THRESHOLD}=65536 in the environment closes them"),
        "transient": (found.transient, "the head's chunk of logits, or the backward of one MLP"),
        "peak": (found.peak, "beside what Python and its packages take"),
    }
    other = memory(model, largest, otherwise, device, quantize).peak, seconds(model, batches, otherwise, rates)
    return "\n".join(
        [
            f"plan for {device}, in MB:",
            *(f"  {name:12}{size / 1e6:12,.1f}  {remark}".rstrip() for name, (size, remark) in lines.items()),
            f"time: {steps:,} steps of {sum(batch.tokens for batch in batches) / steps:,.0f} tokens take {_clock(needed)}, at "
            f"{rates.layers / 1e9:,.0f} GFLOP/s in the layers and {rates.head / 1e9:,.0f} in the head",
            f"with gradient_checkpointing = {str(otherwise.gradient_checkpointing).lower()}: "
            f"{other[0] / 1e6:,.1f} MB and {_clock(other[1])}",
        ]
    )


def _dtype(model: nn.Module) -> str:
    return str(model.lm_head.weight.dtype).removeprefix("torch.")


def _clock(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
