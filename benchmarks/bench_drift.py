"""How far a long run in bfloat16 drifts from the same run in float32: the demo's task for 300 steps, evaluated on the way.

Each run leaves its folder in runs/drift, with report.html, and all of them compared.html.
"""

import json
from functools import partial
from pathlib import Path
from statistics import median

import torch

import minilora as lora
from benchmarks import protocol
from minilora import phi3
from minilora.adapters.inspection import Inspection, inspect_adapter, product_norm
from minilora.demo import demo
from minilora.demo import task as demo_task
from minilora.demo import weights as demo_weights
from minilora.reporting.report import compare_runs, report_run, write_report
from minilora.reporting.runs import read_run

WAYS = {  # dtypes of the base and of the adapter; the first is what the others are held to
    "float32": (torch.float32, torch.float32),
    "bfloat16 base": (torch.bfloat16, torch.float32),
    "bfloat16 base and adapter": (torch.bfloat16, torch.bfloat16),
}
STEPS, EVERY = 300, 50


def main() -> None:
    """All ways, about six minutes each on two CPU cores."""
    protocol.write("drift", drift(demo_weights.obtain(), Path("runs/drift")))


def drift(folder: Path, output: Path, steps: int = STEPS, every: int = EVERY) -> list[dict]:
    """A row for each way and evaluation: loss and exact answers on unseen sentences; the last with the adapter's distance."""
    tokenizer, task = phi3.load_tokenizer(folder), demo_task.make_task()
    dataset, unseen = demo.make_datasets(phi3.load(folder, torch.float32), tokenizer, task, output / "data")
    held_out = lora.read_conversations(output / "data" / "unseen.jsonl")
    questions = lora.Questions(held_out, partial(phi3.generate_batch, tokenizer=tokenizer))
    settings = {"max_steps": steps, "eval_steps": every, "eval_samples": len(held_out), "eval_metrics": ["exact_match"]}
    config = lora.TrainConfig(**demo.TRAINING, **settings, eval_max_new_tokens=demo.COMMAND_TOKENS)
    rows, runs, first = [], [], None
    for way, dtypes in WAYS.items():
        run = output / way.replace(" ", "-")
        train(folder, dtypes, dataset, config, run, eval_dataset=unseen, questions=questions)
        runs.append(read_run(run))
        write_report(report_run(runs[-1]), run / "report.html")
        adapter = inspect_adapter(run / "adapter")
        first = first or adapter
        found = [{"way": way} | figures(line) for line in runs[-1].evaluations]
        found[-1] |= {"adapter_distance": distance(adapter, first), "train_loss_distance": apart(runs[-1].log, runs[0].log)}
        rows += found
        print("\n".join(map(json.dumps, found)), flush=True)
    write_report(compare_runs(runs), output / "compared.html")
    print(f"wrote {output / 'compared.html'}")
    return rows


def train(folder: Path, dtypes: tuple[torch.dtype, torch.dtype], dataset, config: lora.TrainConfig, output: Path, **evaluated):
    base, adapter = dtypes
    model = phi3.load(folder, base)
    torch.manual_seed(config.seed)
    lora.inject(model, demo.LORA, adapter)
    lora.mark_only_lora_as_trainable(model)
    lora.train(model, dataset, config, output_dir=output, base=str(folder), **evaluated)


def figures(line: dict) -> dict:
    return {name: line[name] for name in ("step", "eval_loss", "eval_exact_match")}


def distance(adapter: Inspection, reference: Inspection) -> float:
    """‖ΔW − ΔW_ref‖ / ‖ΔW_ref‖, the median over the layers; without any ΔW, since B A − B' A' = [B, −B'] [A; A']."""
    found = []
    for path in reference.updates:
        (A, B), (A_ref, B_ref) = (factors(inspection, path) for inspection in (adapter, reference))
        found.append(product_norm(torch.cat([B, -B_ref], 1), torch.cat([A, A_ref])) / product_norm(B_ref, A_ref))
    return median(found)


def factors(adapter: Inspection, path: str) -> list[torch.Tensor]:
    return [adapter.tensors[f"{path}.{name}.weight"].double() for name in ("lora_A", "lora_B")]


def apart(log: list[dict], reference: list[dict]) -> float:
    """The RMS difference of two curves of the training loss over the RMS of the second."""
    ours, theirs = (torch.tensor([line["loss"] for line in lines if "loss" in line]).double() for lines in (log, reference))
    return float((ours - theirs).norm() / theirs.norm())
