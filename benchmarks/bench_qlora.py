"""A 4-bit base beside a plain one: memory against transformers, PEFT and bitsandbytes, what its products cost on a CPU, and what
fine-tuning loses by it.

On the embedded model, in float32: `python -m benchmarks qlora`. Phi-3-mini at its true size is in bench_qlora_true_size.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

import minilora as lora
from benchmarks import protocol
from benchmarks.bench_lora_linear import LAYERS
from minilora import phi3
from minilora.data.encoding import Example
from minilora.demo import demo
from minilora.demo import task as demo_task
from minilora.demo import weights as demo_weights
from minilora.kernels.nf4_tensor import NF4Tensor

SIDES = ("minilora", "transformers + peft + bitsandbytes")
MEASURES = ("load", "train")
TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
SETTINGS = {"r": 16, "lora_alpha": 16, "target_modules": TARGETS}
TOKENS = 64  # of the training step
ROWS, ROUNDS = 512, 9  # of x, and of the timing of products
PROSE = 2048  # tokens of the README that the base's perplexity is found on
WAYS = {  # quantize, and how the adapter starts
    "16-bit base": (None, True),
    "4-bit base": ("nf4", True),
    "4-bit base, LoftQ": ("nf4", "loftq"),
}


def main() -> None:
    """All parts, minutes each on two CPU cores."""
    folder = demo_weights.obtain()
    protocol.write("qlora", [*products(), *memory(folder, dict.fromkeys(SIDES, "float32")), *quality(folder)])


# Products


def products() -> list[dict]:
    """For each layer of Phi-3-mini the time of its frozen products in float32, of a 4-bit weight over that of a plain one."""
    rows = []
    for layer, (N, K) in LAYERS.items():
        W = torch.randn(N, K) / 50
        quantized = NF4Tensor.quantize(W)
        forward, dX = (
            _medians([(torch.randn(ROWS, size), plain), (torch.randn(ROWS, size), four_bit)])
            for size, plain, four_bit in ((K, W.t(), quantized.t()), (N, W, quantized))
        )
        rows.append({"part": "products", "layer": layer, "rows": ROWS, "forward": forward[1] / forward[0], "dX": dX[1] / dX[0]})
        rows[-1]["both"] = (forward[1] + dX[1]) / (forward[0] + dX[0])
        print(json.dumps(rows[-1]), flush=True)
    return rows


def _medians(factors: list[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
    """Seconds of each product, in rounds that take turns; the first round is a warm-up."""
    seconds = [[] for _ in factors]
    for _ in range(ROUNDS + 1):
        for found, (left, right) in zip(seconds, factors, strict=True):
            started = time.perf_counter()
            torch.mm(left, right)
            found.append(time.perf_counter() - started)
    return [statistics.median(found[1:]) for found in seconds]


# Memory


def memory(folder: Path, compute: dict[str, str]) -> list[dict]:
    """For each side, in fresh processes, the peak of loading and of loading with one training step, over what imports take.

    Args:
        compute: for each side the dtype that products with 4-bit weights are taken in.
    """
    rows = []
    for side in SIDES:
        for measure in MEASURES:
            code = (
                f"from benchmarks import bench_qlora; bench_qlora.run({side!r}, {measure!r}, {str(folder)!r}, {compute[side]!r})"
            )
            output = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout
            rows.append({"part": "memory", "side": side, "measure": measure} | json.loads(output.splitlines()[-1]))
            print(json.dumps(rows[-1]), flush=True)
    return rows


def run(side: str, measure: str, folder: str, compute: str) -> None:
    """Takes one measurement in this process and prints it as the last line."""
    load, step = (load_ours, step_ours) if side == SIDES[0] else (load_theirs, step_theirs)
    if side != SIDES[0]:
        import bitsandbytes  # noqa: F401 (here and not later, so that its memory counts as an import's)
        import peft  # noqa: F401
        import transformers  # noqa: F401
    imports, started = protocol.memory("VmRSS"), time.perf_counter()
    model = load(folder, compute)
    found = {"compute": compute, "seconds_load": round(time.perf_counter() - started, 2)}
    if measure == "train":
        found |= {"tokens": TOKENS} | step(model)
    peak = protocol.memory("VmHWM")
    print(json.dumps(found | {"import_bytes": imports, "peak_memory_bytes": peak, "peak_over_imports": peak - imports}))


def _ids(vocabulary: int) -> torch.Tensor:
    return torch.randint(3, vocabulary // 2, (1, TOKENS), generator=torch.Generator().manual_seed(1))


def load_ours(folder: str, compute: str) -> phi3.Phi3ForCausalLM:
    """All weights in the dtype that is computed with."""
    return phi3.load(folder, getattr(torch, compute), quantize="nf4")


def step_ours(model: phi3.Phi3ForCausalLM) -> dict:
    lora.inject(model, lora.LoraConfig(**SETTINGS))
    lora.mark_only_lora_as_trainable(model)
    example = Example(_ids(model.config.vocab_size)[0].tolist(), [True] * TOKENS)
    result = lora.train(model, [example], lora.TrainConfig(max_steps=1, per_device_train_batch_size=1), progress=False)
    return {"seconds_step": round(result.seconds, 2), "loss": result.log[-1]["loss"]}


def load_theirs(folder: str, compute: str):
    """The rest of the model in the dtype of the checkpoint."""
    import transformers

    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=getattr(torch, compute), **settings)
    stored = phi3.Checkpoint(folder).tensor("model.norm.weight").dtype
    dtype = torch.float32 if compute == "float32" and stored == torch.float16 else stored  # a CPU has no float16 products
    return transformers.Phi3ForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config)


def step_theirs(model) -> dict:
    import peft

    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **SETTINGS)).train()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)
    ids, started = _ids(model.config.vocab_size), time.perf_counter()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    return {"seconds_step": round(time.perf_counter() - started, 2), "loss": loss.item()}


# Quality


def quality(folder: Path, max_steps: int = -1) -> list[dict]:
    """The demo's task learnt beside each base: the same data, seed and settings."""
    tokenizer, task, rows = phi3.load_tokenizer(folder), demo_task.make_task(), []
    with tempfile.TemporaryDirectory() as data:
        dataset, unseen = demo.make_datasets(phi3.load(folder, torch.float32), tokenizer, task, Path(data))
    config = lora.TrainConfig(**demo.TRAINING, max_steps=max_steps)
    for way, (quantize, start) in WAYS.items():
        model = phi3.load(folder, torch.float32, quantize=quantize)
        row = {"part": "quality", "way": way, "perplexity": perplexity(model, tokenizer)}
        torch.manual_seed(config.seed)
        lora.inject(model, replace(demo.LORA, init_lora_weights=start), original=phi3.Checkpoint(folder).tensor)
        lora.mark_only_lora_as_trainable(model)
        row |= {"perplexity_at_the_start": perplexity(model, tokenizer)}  # with the adapter, before it is trained
        row |= {"eval_loss_before": lora.evaluate(model, unseen).loss}
        result = lora.train(model, dataset, config)
        exam = demo.examine(model, tokenizer, task, unseen)
        rows.append(
            row
            | {
                "eval_loss_after": exam.loss,
                "exact_after": demo.exact(task.unseen, exam.unseen),
                "exact_after_new_phrasings": demo.exact(task.new_phrasings, exam.new_phrasings),
                "seconds_train": round(result.seconds, 1),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


@torch.no_grad()
def perplexity(model: phi3.Phi3ForCausalLM, tokenizer: phi3.Tokenizer) -> float:
    """Of English prose, the beginning of this project's README."""
    length = min(PROSE, model.config.max_position_embeddings)
    ids = torch.tensor([tokenizer.encode((protocol.ROOT / "README.md").read_text(encoding="utf-8"))[:length]])
    return model(ids, labels=ids).exp().item()
