"""Real runs of training, killed and resumed: `python killed_runs.py FOLDER` prints, as JSON, how each one ended.

Every run is a process of its own, forked from this one, which has imported torch already. It is ended by SIGKILL after a random
time, or, by an audit hook, just before a random one of its accesses to the disk, most of which belong to a save.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from helpers import examples, tiny_config, tiny_model

import minilora as lora
from minilora.training.checkpoint import find_checkpoints

CONFIG = lora.TrainConfig(
    learning_rate=1e-2, per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=4, save_steps=2,
    weight_decay=0.1, loraplus_lr_ratio=4.0, save_total_limit=1, eval_steps=5, load_best_model_at_end=True,
)  # fmt: skip
DISK = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "shutil.copymode"}
MOMENTS, ACCESSES = 20, 14  # of each kind of end


def train(folder: Path, stop_before: int | None) -> None:
    """What a process does: the run of this folder, from its newest checkpoint on if it has one; prints its accesses."""
    accesses = 0

    def count(event: str, _) -> None:
        nonlocal accesses
        if event in DISK:
            if accesses == stop_before:
                os.kill(os.getpid(), signal.SIGKILL)
            accesses += 1

    torch.manual_seed(0)
    model = lora.inject(tiny_model(tiny_config()), lora.LoraConfig(r=2, lora_dropout=0.3, target_modules=["q_proj", "down_proj"]))
    lora.mark_only_lora_as_trainable(model)
    sys.addaudithook(count)
    resume = bool(find_checkpoints(folder))
    lora.train(model, examples(7), CONFIG, examples(3), folder, progress=False, resume=resume)
    (folder.parent / "accesses").write_text(str(accesses))


def run(folder: Path, seconds: float | None = None, stop_before: int | None = None) -> bool:
    """Whether a process that runs in this folder comes to its end."""
    child = os.fork()
    if not child:
        try:
            train(folder, stop_before)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, -signal.SIGKILL):
        sys.exit(f"a run ended with status {status}")
    return status == 0


def outcome(folder: Path) -> tuple:
    """All that a run leaves behind but its clock: the adapter's bytes, the log, the names in its folder."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    log = [
        {name: value for name, value in line.items() if name not in ("seconds", "tokens_per_second", "memory")} for line in lines
    ]
    names = sorted(path.name for path in folder.iterdir())
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes(), log, names


def main(place: Path) -> None:
    torch.set_num_threads(1)
    train(place / "warm", None)  # imports what torch imports late, and starts no thread that a fork would lose
    started = time.perf_counter()
    assert run(place / "whole")
    whole, accesses = time.perf_counter() - started, int((place / "accesses").read_text())
    chance, expected = random.Random(0), outcome(place / "whole")
    ends = [{"seconds": chance.uniform(0.0, whole)} for _ in range(MOMENTS)]
    ends += [{"stop_before": number} for number in sorted(chance.sample(range(accesses), ACCESSES))]
    told = []
    for number, end in enumerate(ends):
        folder = place / str(number)
        while run(folder, **end):  # it came to its end before: the machine is quicker than it was
            shutil.rmtree(folder)
            end = {name: type(value)(value * chance.random()) for name, value in end.items()}
        resumed = bool(find_checkpoints(folder))
        assert run(folder)
        found = outcome(folder)
        same = [one == other for one, other in zip(found, expected, strict=True)]
        told.append(end | {"resumed": resumed, "same": same})
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
