"""Where the time of a LoRA step on a CPU goes: each of its parts by itself, over the frozen products, beside the whole step.

The frozen products are the floor of `python -m benchmarks peers`. Attention and the adapter's products are not in it, though no
library can leave them out: what they take bounds what a step can come to. All is timed in one process, in turns; medians.
"""

import copy
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import protocol
from benchmarks.peers.case import MODELS, Case, make, write_checkpoint
from benchmarks.peers.floor import Floor
from benchmarks.peers.side import read_config
from minilora.adapters.layers import adapted_layers
from minilora.kernels import arithmetic, lora_linear_torch
from minilora.kernels.rms_norm import add_rms_norm
from minilora.kernels.rope import rope
from minilora.kernels.swiglu import swiglu
from minilora.phi3 import Phi3Config
from minilora.training.memory import keep_freed_memory

BFLOAT16 = "step, bfloat16 base"
CASES = Case("small"), Case("small", 1024, batch=1), Case("slice"), Case("slice", 1024, batch=1)
ROUNDS = 5


def main() -> None:
    """All cases, about five minutes on two CPU cores."""
    rows = [measure(case) for case in CASES]
    protocol.write("parts", rows)
    protocol.write_table("parts", table(rows))


def measure(case: Case, rounds: int = ROUNDS) -> dict:
    """Seconds of the step, of its frozen products and of each other part, and these over the products."""
    torch.set_num_threads(case.threads)
    keep_freed_memory()  # as lora.train does
    (model, ids), sizes = make(case), MODELS[case.model]
    floor = Floor(read_config(str(write_checkpoint(case.model))), case.batch, case.tokens)
    runs = {"step": step_of(model, ids), BFLOAT16: step_of(rounded(model), ids), "frozen products": lambda: floor.seconds()[0]}
    whole = set(runs)
    runs |= {name: _clocked(run) for name, run in parts(sizes, case).items()}
    adapters = {layer.weight.shape: layer for layer in adapted_layers(model).values()}  # of one decoder layer
    products = [_clocked(adapter_products(layer, case.batch * case.tokens)) for layer in adapters.values()]
    runs["adapter's products"] = lambda: sum(run() for run in products)
    for run in runs.values():
        run()
    found = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(run() * (1 if name in whole else sizes.num_hidden_layers))
    seconds = {name: statistics.median(times) for name, times in found.items()}
    row = {"model": case.model, "batch": case.batch, "tokens": case.tokens, "threads": case.threads, "r": case.r}
    row["bfloat16"] = arithmetic.describe(torch.bfloat16, ids.device)
    row |= {"seconds": seconds, "over_floor": {name: t / seconds["frozen products"] for name, t in seconds.items()}}
    print(json.dumps(row), flush=True)
    return row


def step_of(model: nn.Module, ids: Tensor) -> Callable[[], float]:
    """A step of AdamW on the adapters, that tells its seconds."""
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)

    def step() -> None:
        model(ids, labels=ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    return _clocked(step)


def rounded(model: nn.Module) -> nn.Module:
    """A copy whose base is in bfloat16."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data if parameter.requires_grad else parameter.data.bfloat16()
    return model


def parts(sizes: Phi3Config, case: Case) -> dict[str, Callable[[], None]]:
    """Those of one layer that are no linear layer, forward and backward."""
    B, T, C, D = case.batch, case.tokens, sizes.hidden_size, sizes.head_dim
    H, Hkv, half = sizes.num_attention_heads, sizes.num_key_value_heads, sizes.rotary_dim // 2
    q, k, v = (torch.randn(B, T, heads, D).transpose(1, 2).requires_grad_() for heads in (H, Hkv, Hkv))
    qkv, packed = torch.randn(B, T, (H + 2 * Hkv) * D), torch.randn(B, T, 2 * sizes.intermediate_size)
    x, delta, weight, angles = torch.randn(B, T, C), torch.randn(B, T, C), torch.randn(C), torch.rand(1, 1, T, half)

    def attention() -> None:
        _differentiated(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=Hkv != H))

    def elementwise() -> None:
        for _ in range(2):
            _differentiated(*add_rms_norm(x.requires_grad_(), delta, weight, sizes.rms_norm_eps))
        _differentiated(*rope(qkv.requires_grad_(), angles.cos(), angles.sin(), H, Hkv))
        _differentiated(swiglu(packed.requires_grad_()))

    return {"attention": attention, "norms, rotation, SwiGLU": elementwise}


def adapter_products(layer, M: int) -> Callable[[], None]:
    """What a layer's adapter multiplies for M rows, forward and backward; its B is zero still, so that nothing grows."""
    (N, K), A, B = layer.weight.shape, layer.lora_A.detach(), layer.lora_B.detach()
    x, y, whole = torch.randn(M, K), torch.randn(M, N), ((0, K),)

    def run() -> None:
        s = lora_linear_torch.down(x, A.T, whole, layer.scaling)
        y.addmm_(s, B.T)
        t, _ = lora_linear_torch.sweep(y, B, s, layer.slices, layer.scaling)
        x.addmm_(t, A)
        lora_linear_torch.outer(x, t, A.T, whole)

    return run


def _differentiated(*results: Tensor) -> None:
    torch.autograd.backward(results, results)


def _clocked(run: Callable[[], None]) -> Callable[[], float]:
    def clocked() -> float:
        begun = time.perf_counter()
        run()
        return time.perf_counter() - begun

    return clocked


def table(rows: list[dict]) -> str:
    """The parts over the frozen products, in Markdown."""
    names = [name for name in rows[0]["over_floor"] if name != "frozen products"]
    header = ["case", "frozen products, s", *(f"{name}, over these" for name in names)]
    return protocol.markdown(
        header,
        [
            [f"{row['model']}, {row['batch']} × {row['tokens']}", f"{row['seconds']['frozen products']:.3f}"]
            + [f"{row['over_floor'][name]:.2f}" for name in names]
            for row in rows
        ],
    )
