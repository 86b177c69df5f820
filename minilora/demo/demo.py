"""The demo: fine-tune a real chat model on a new task, and show before and after, with the library's public verbs only."""

import json
import platform
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

import minilora as lora
from minilora import phi3
from minilora.adapters.trainable import count_parameters
from minilora.commands import describe_adapter, describe_base, load_model
from minilora.data.encoding import Example
from minilora.demo import task as demo_task
from minilora.demo import weights as demo_weights
from minilora.files import remove_folder, write_file
from minilora.reporting.report import Answers, Report, charts, maps, write_report
from minilora.reporting.runs import Run, read_run
from minilora.training.checkpoint import find_checkpoints
from minilora.training.metrics import exact_match

LORA = lora.LoraConfig(r=8, lora_alpha=16, target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"])
TRAINING = {"learning_rate": 1.2e-3, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "per_device_train_batch_size": 4}
ORDINARY_TOKENS = 32  # an ordinary answer is learnt again if it ends by then
COMMAND_TOKENS = 40  # the longest command takes 30
BATCH = 32  # answers at once: two cores give 75 tokens a second in a batch of 16, and 17 one by one
PACKAGES = ("minilora", "torch", "tokenizers", "safetensors")  # whose versions the page names
SHOWN = 12  # answers of each set on the page


@dataclass(frozen=True)
class Exam:
    """What a model makes of the task's sentences, and of ordinary questions."""

    loss: float  # on the unseen sentences
    unseen: list[str]
    new_phrasings: list[str]
    probes: list[str]


def run(output: Path, model_path: Path | None = None, max_steps: int = -1, quantize: str | None = None) -> dict:
    """Runs the demo and writes adapter/, data/, log.jsonl, summary.json and report.html; returns the summary."""
    started = time.perf_counter()
    config = lora.TrainConfig(**TRAINING, max_steps=max_steps)
    folder = model_path or demo_weights.obtain()
    name = str(model_path or "SmolLM2-135M-Instruct (Apache-2.0), re-expressed in the Phi-3 layout")
    print(f"model: {name}")
    model, tokenizer, task = load_model(folder, quantize=quantize), phi3.load_tokenizer(folder), demo_task.make_task()
    weight = model.lm_head.weight
    # Rounded to 4 bits it says that Greece is Athens: what it is to keep are its answers from before (88% and 96% exact answers).
    original = phi3.load(folder, weight.dtype, weight.device) if quantize else model
    dataset, unseen = make_datasets(original, tokenizer, task, output / "data")
    del original

    heading("before")
    before = examine(model, tokenizer, task, unseen)
    tell(before, task)
    heading("training")
    torch.manual_seed(config.seed)  # lora_A starts at random
    lora.inject(model, LORA)
    lora.mark_only_lora_as_trainable(model)
    print(describe_adapter(model, LORA))
    for earlier in find_checkpoints(output):  # of a demo that was stopped: it begins anew
        remove_folder(earlier)
    result = lora.train(model, dataset, config, output_dir=output, base=str(folder))
    heading("after")
    after = examine(model, tokenizer, task, unseen)
    tell(after, task)
    heading("the saved adapter, loaded into a fresh base")
    fresh = phi3.load(folder, weight.dtype, weight.device, quantize=quantize)
    try_saved(fresh, output / "adapter", tokenizer, task, before, after)

    summary = {
        "eval_loss_before": before.loss,
        "eval_loss_after": after.loss,
        "exact_before": exact(task.unseen, before.unseen),
        "exact_before_new_phrasings": exact(task.new_phrasings, before.new_phrasings),
        "exact_after": exact(task.unseen, after.unseen),
        "exact_after_new_phrasings": exact(task.new_phrasings, after.new_phrasings),
        "ordinary_answers_unchanged": exact_match(after.probes, before.probes),
        "seconds_train": round(result.seconds, 2),
        "seconds_total": round(time.perf_counter() - started, 2),
        "trainable_parameters": count_parameters(model)[0],
        "tokens_per_second": round(result.tokens / result.seconds, 1),
    }
    write_file(output / "summary.json", json.dumps(summary, indent=2) + "\n")
    log = [{"step": 0, "eval_loss": before.loss}, *result.log, {"step": result.steps, "eval_loss": after.loss}]
    settings = {"model": name, "base": describe_base(model), "device": weight.device}
    run = replace(read_run(output), log=log, settings=settings | asdict(LORA) | asdict(config))
    write_report(make_report(summary, task, before, after, run), output / "report.html")
    print(f"\nexact answers on unseen sentences: {summary['exact_before']:.0%} → {summary['exact_after']:.0%}")
    four_bit = f"--quantize {quantize} " if quantize else ""
    print(f"try it: minilora generate --model {folder} {four_bit}--adapter {output / 'adapter'} \\")
    print(f'  --system "{demo_task.SYSTEM}" --prompt "make the attic 19 degrees"')
    print(f"wrote adapter/, data/, log.jsonl, summary.json and report.html into {output}")
    return summary


def heading(text: str) -> None:
    print(f"\n── {text} ".ljust(78, "─"), flush=True)


def make_datasets(model, tokenizer, task: demo_task.Task, folder: Path) -> tuple[list[Example], list[Example]]:
    """Writes the conversations as chat JSONL, and reads train and unseen back as any user's data are read.

    Ordinary questions join the commands with this model's own answers, so that one learns when not to answer with JSON.
    """
    replies = ask_ordinary(model, tokenizer, demo_task.ORDINARY)
    own = [pair for pair in zip(demo_task.ORDINARY, replies, strict=True) if len(tokenizer.encode(pair[1])) < ORDINARY_TOKENS]
    lines = {
        "train": [demo_task.command(*pair) for pair in task.train] + [demo_task.ordinary(*pair) for pair in own],
        "unseen": [demo_task.command(*pair) for pair in task.unseen],
        "new_phrasings": [demo_task.command(*pair) for pair in task.new_phrasings],
    }
    for name, conversations in lines.items():
        write_file(folder / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in conversations))
    print(
        f"the task: a sentence → one JSON command. {len(task.train)} commands and {len(own)} ordinary questions to train on, "
        f"{len(task.unseen)} unseen sentences and {len(task.new_phrasings)} new phrasings to test with"
    )
    read = [lora.read_conversations(folder / f"{name}.jsonl") for name in ("train", "unseen")]
    train, unseen = (lora.encode_conversations(conversations, tokenizer, max_length=512) for conversations in read)
    return train, unseen


def examine(model, tokenizer, task: demo_task.Task, unseen: list[Example]) -> Exam:
    loss = lora.evaluate(model, unseen).loss
    answers = [obey(model, tokenizer, pairs) for pairs in (task.unseen, task.new_phrasings)]
    return Exam(loss, *answers, ask_ordinary(model, tokenizer, demo_task.PROBES))


def obey(model, tokenizer, pairs: list[tuple[str, str]]) -> list[str]:
    """The model's answers to (sentence, JSON) pairs."""
    return answer(model, tokenizer, [demo_task.command(*pair) for pair in pairs], COMMAND_TOKENS)


def ask_ordinary(model, tokenizer, questions: tuple[str, ...]) -> list[str]:
    return answer(model, tokenizer, [demo_task.ordinary(question, "") for question in questions], ORDINARY_TOKENS)


def answer(model, tokenizer, lines: list[dict], max_new_tokens: int) -> list[str]:
    """The model's own last turns to chat JSONL lines."""
    prompts, answers = [line["messages"][:-1] for line in lines], []
    for start in tqdm(range(0, len(prompts), BATCH), desc="answer", unit="batch", leave=False):
        answers += phi3.generate_batch(model, tokenizer, prompts[start : start + BATCH], max_new_tokens=max_new_tokens)
    return answers


def exact(pairs: list[tuple[str, str]], answers: list[str]) -> float:
    """The share of answers that are the wanted JSON, character for character."""
    return exact_match(answers, [wanted for _, wanted in pairs])


def tell(exam: Exam, task: demo_task.Task) -> None:
    print(
        f"loss on unseen sentences {exam.loss:.3f}; exact answers: {exact(task.unseen, exam.unseen):.0%} of unseen sentences, "
        f"{exact(task.new_phrasings, exam.new_phrasings):.0%} of new phrasings"
    )
    for (sentence, _), given in list(zip(task.unseen, exam.unseen, strict=True))[:3]:
        print(f"  {sentence}\n    {given.partition(chr(10))[0]}")
    print(f"  {demo_task.PROBES[0]}\n    {exam.probes[0]}")


def try_saved(fresh, adapter: Path, tokenizer, task: demo_task.Task, before: Exam, after: Exam) -> None:
    """Off, on, and merged into the weights: the fresh base must answer as the trained one did before, after, and after."""
    pairs = task.unseen[:BATCH]
    off = obey(fresh, tokenizer, pairs)
    lora.load_adapter(fresh, adapter)
    on = obey(fresh, tokenizer, pairs)
    lora.merge(fresh)
    merged = obey(fresh, tokenizer, pairs)
    for how, answers, when, exam in (
        ("off", off, "before", before),
        ("on", on, "after", after),
        ("merged into the weights", merged, "after", after),
    ):
        same = exact_match(answers, exam.unseen[:BATCH])
        print(f"adapter {how}: {same:.0%} of {len(pairs)} answers are those of {when} training")
    print(f"  {pairs[0][0]}\n    off: {off[0].partition(chr(10))[0]}\n    on:  {on[0]}")


def make_report(summary: dict, task: demo_task.Task, before: Exam, after: Exam, run: Run) -> Report:
    def moved(what: str, name: str, style: str) -> tuple[str, str]:
        return what, " → ".join(format(summary[name.format(when)], style) for when in ("before", "after"))

    def compare(title: str, pairs: list[tuple[str, str]], first: list[str], second: list[str]) -> Answers:
        rows = [(sentence, wanted, [b, a]) for (sentence, wanted), b, a in zip(pairs, first, second, strict=True)]
        return Answers(f"{title} ({SHOWN} of {len(rows)})", ["before", "after"], rows[:SHOWN])

    probes = [(asked, None, [b, a]) for asked, b, a in zip(demo_task.PROBES, before.probes, after.probes, strict=True)]
    settings = run.settings | {name: summary[name] for name in ("trainable_parameters", "tokens_per_second")}
    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    return Report(
        title="minilora demo",
        text=(
            "A pretrained chat model learns, by LoRA, to answer sentences about the home with one JSON command. Unseen "
            "sentences use known phrasings with combinations and values never trained on; new phrasings are wholly new."
        ),
        figures=[
            moved("exact answers, unseen sentences", "exact_{}", ".0%"),
            moved("exact answers, new phrasings", "exact_{}_new_phrasings", ".0%"),
            moved("loss on unseen sentences", "eval_loss_{}", ".3f"),
            ("seconds of training", f"{summary['seconds_train']:.0f}"),
        ],
        charts=charts([run]),
        maps=maps([run]),
        answers=[
            compare("Unseen sentences", task.unseen, before.unseen, after.unseen),
            compare("New phrasings", task.new_phrasings, before.new_phrasings, after.new_phrasings),
            Answers("Ordinary questions, never trained on", ["before", "after"], probes),
        ],
        tables={"Settings": as_rows(settings), "Versions": as_rows(versions)},
    )


def as_rows(entries: dict[str, object]) -> dict[str, list[object]]:
    return {name: [value] for name, value in entries.items()}
