"""Real runs of several processes: `python several_processes.py FOLDER` leaves in told.json how each process of each run ended.

Every process is forked from this one, which has imported torch already, and joins the others as those of torchrun do.
"""

import json
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from helpers import examples, tiny_config, tiny_model

import minilora as lora
from minilora import phi3
from minilora.data.conversations import Conversation
from minilora.kernels.nf4_tensor import NF4Tensor
from minilora.phi3.generation import generate_ids
from minilora.training import distributed, loop
from minilora.training.distributed import (
    after_first,
    broadcast,
    in_turn,
    joined,
    of_this_rank,
    rank,
    sum_gradients,
    summed,
    world_size,
)
from minilora.training.recorder import Recorder

DATA, HELD_OUT = examples(9), examples(12)[9:]  # 9 in batches of 4: of the last one no second process gets any
ASKED = [
    Conversation([{"role": "user", "content": text}, {"role": "assistant", "content": text}], "")
    for text in ("Hi", "Who?", "Why")
]
SETTINGS = {
    "learning_rate": 1e-2, "num_train_epochs": 2, "gradient_accumulation_steps": 1, "save_steps": 2, "save_total_limit": 9,
    "weight_decay": 0.1, "eval_steps": 2, "eval_max_new_tokens": 3,
}  # fmt: skip


def answer(model, conversations, max_new_tokens: int) -> list[str]:
    """Answers by bytes as tokens."""
    prompts = [list(messages[-1]["content"].encode()) for messages in conversations]
    steps = generate_ids(model, prompts, frozenset(), phi3.Sampling(max_new_tokens))
    return [str(ids) for ids in zip(*steps, strict=True)]


def train(folder: Path, resume=False, shard=False, dropout=0.0, **settings):
    """A run whose batches have four conversations, however many processes there are."""
    torch.manual_seed(rank())  # another start on each: that of rank 0 counts
    model = tiny_model(tiny_config())
    settings = SETTINGS | {"per_device_train_batch_size": 4 // world_size()} | settings
    lora.inject(model, lora.LoraConfig(r=2, lora_dropout=dropout, target_modules=["q_proj", "o_proj", "down_proj"]))
    lora.mark_only_lora_as_trainable(model)
    parts = None
    if shard:
        in_turn(lambda: lora.shard_base(model))
        frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        kept = [parameter for module in model.lora_adapters.base.values() for parameter in module.parameters()]
        assert all(hasattr(parameter, "to_local") for parameter in kept)  # no whole weight is kept alive
        parts = sum(parameter.to_local().numel() for parameter in frozen), sum(parameter.numel() for parameter in frozen)
    asked = lora.Questions(ASKED, answer)
    config = lora.TrainConfig(**settings)
    result = lora.train(model, DATA, config, HELD_OUT, folder, progress=False, resume=resume, questions=asked)
    told = {name: tensor.sum().item() for name, tensor in lora.lora_state_dict(model).items()}
    return {"log": result.log, "adapter": told, "parts": parts}


def small_laws(folder: Path):
    """What the collectives give."""
    here = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(here.weight, rank())
    here.weight.grad, here.bias.grad = torch.full((2, 2), 1.0 + rank()), torch.full((2,), 10.0)
    broadcast(here.parameters())
    sum_gradients(here.parameters())
    gradients = here.weight.grad.unique().tolist() + here.bias.grad.unique().tolist()
    weight = torch.nn.Parameter(NF4Tensor.quantize(torch.randn(64, 64)), requires_grad=False)
    here.register_parameter("rounded", weight)
    try:
        lora.shard_base(here)
    except ValueError as error:
        refused = str(error)
    came = folder / "came"
    found = after_first(lambda: came.exists() or came.touch())  # the first finds nothing and leaves a file to the others
    parts = of_this_rank([0, 1, 2]), of_this_rank([0])
    return [refused, gradients, here.weight.unique().tolist(), summed(1.0, rank()), *parts, found]


def only_rank_0_writes(folder: Path):
    """A run of which every other process notes each file that it opens to write, and each name that it changes."""
    touched = []

    def note(event: str, arguments) -> None:
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            touched.append([event, str(arguments[0])])

    if rank():
        sys.addaudithook(note)
    train(folder, max_steps=3)
    return touched


def dies(folder: Path):
    """Rank 1 is killed in the fourth step, after the checkpoint of the second."""
    in_step(4, lambda: os.kill(os.getpid(), signal.SIGKILL))
    return train(folder)


def hangs(folder: Path):
    """Rank 1 does nothing in the fourth step until rank 0 has ended."""
    told = folder.parent / f"{folder.name}.0.json"

    def wait() -> None:
        while not told.exists():
            time.sleep(0.1)

    in_step(4, wait)
    return train(folder)


def is_asked_to_end(folder: Path):
    """Rank 1 alone gets SIGTERM, in the third step."""
    in_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    return train(folder)


def in_step(step: int, act: Callable[[], None]) -> None:
    """Rank 1 does that before it notes the step."""
    noted = Recorder.step

    def acts(self, line, *arguments, **named):
        if line["step"] == step and rank() == 1:
            act()
        return noted(self, line, *arguments, **named)

    Recorder.step = acts


def is_infinite(folder: Path):
    """The weights of rank 1 alone turn infinite in the second step."""
    step = loop.clip_gradients

    def spoilt(parameters, max_norm):
        if rank() == 1:
            parameters[0].data.fill_(float("inf"))
        return step(parameters, max_norm)

    loop.clip_gradients = spoilt
    return train(folder)


def run(folder: Path, size: int, scenario, **settings) -> list[dict]:
    """How each of so many processes ended: its exit status, and what it returned or raised."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for number in range(size):
        child = os.fork()
        if not child:
            place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
            os.environ["TORCHELASTIC_RUN_ID"] = "test"
            told = folder.parent / f"{folder.name}.{number}.json"
            try:
                with joined():
                    returned = scenario(folder, **settings)
                threads = [name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm")]
                told.write_text(json.dumps({"returned": returned, "threads": threads}))
            except BaseException as error:
                told.write_text(json.dumps({"raised": [type(error).__name__, str(error), traceback.format_exc()]}))
                os._exit(1)
            os._exit(0)
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    files = [folder.parent / f"{folder.name}.{number}.json" for number in range(size)]
    ends = [json.loads(file.read_text()) if file.exists() else {} for file in files]
    return [{"status": status} | end for status, end in zip(statuses, ends, strict=True)]


def main(place: Path) -> None:
    torch.set_num_threads(1)
    told = {
        "one": run(place / "one", 1, train),
        "two": run(place / "two", 2, train),
        "four": run(place / "four", 4, train),
        "split": run(place / "split", 2, train, shard=True),
        "infinite": run(place / "infinite", 2, is_infinite),
        "best": run(place / "best", 2, train, load_best_model_at_end=True, learning_rate=1.0),
        "laws": run(place / "laws", 2, small_laws),
        "writes": run(place / "writes", 2, only_rank_0_writes),
        "dies": run(place / "dies", 2, dies),
        "ends": run(place / "ends", 2, is_asked_to_end),
        "dropout": run(place / "dropout", 2, train, dropout=0.3),
    }
    for name in ("dies", "ends"):
        told[f"{name} again"] = run(place / name, 1, train, resume=True)
    for name, source, size, settings in (
        ("four from two", "two", 4, {}),
        ("one from split", "split", 1, {}),
        ("split from one", "one", 2, {"shard": True}),
        ("dropout again", "dropout", 2, {"dropout": 0.3}),
        ("other batch", "two", 2, {"per_device_train_batch_size": 4}),
    ):
        shutil.copytree(place / source / "checkpoint-2", place / name / "checkpoint-2")
        told[name] = run(place / name, size, train, resume=True, **settings)
    distributed.TIMEOUT = timedelta(seconds=5)
    told["hangs"] = run(place / "hangs", 2, hangs)
    (place / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
