"""The command line: what can be typed, and how a fault ends it (one message, exit code 2)."""

import argparse
import signal
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args

from minilora.adapters.config import LoraConfig
from minilora.config import RUN_KEYS, RunConfig
from minilora.training.config import Metric, TrainConfig

DESCRIPTION = """LoRA fine-tuning of the Phi-3 family.

  minilora demo                          see it work on real weights, in minutes, on any machine
  minilora data stats chat.jsonl --model MODEL
  minilora train --model MODEL --data chat.jsonl --output out
  minilora report out                    the run as a page
  minilora generate --model MODEL --adapter out/adapter --prompt "Hello"
  minilora chat --model MODEL --adapter out/adapter

MODEL is a folder with a checkpoint, or the id of one on the Hugging Face hub: microsoft/Phi-3-mini-4k-instruct, say.
"""

DATA_HELP = """\
DATA is JSON Lines or Parquet (.parquet), one conversation a line, in any of these shapes:
  {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
  {"instruction": "...", "input": "...", "output": "..."}
  {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}
A line may have "tools" too, and turns of the role tool, for a model whose template writes them (Phi-4-mini's).
It is a file here, or files on the hub: hf://datasets/OWNER/NAME/PATH, where PATH may hold *. One or several are named, each as
NAME or NAME=WEIGHT: at weight 1 each of its conversations comes once an epoch, at 2 twice, at 0.3 three tenths of them, drawn
by training.seed. The loss is on the assistant's turns only, their end tokens included (training.assistant_only_loss).
"""

TRAIN_HELP = """Fine-tunes a LoRA adapter on conversations.

Settings come from a TOML file whose tables hold the keys of the Phi-3 cookbook's dictionaries, and from --set.
An example (the defaults are at the end):

  [training]                             [peft]
  learning_rate = 1e-4                   r = 16
  num_train_epochs = 1                   lora_alpha = 32
  per_device_train_batch_size = 8        lora_dropout = 0.05
  gradient_accumulation_steps = 1        target_modules = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
  lr_scheduler_type = "cosine"
  warmup_ratio = 0.1                     also q_proj, k_proj, v_proj, gate_proj, up_proj: slices of the fused layers
  max_seq_length = 2048                  [quantization]
  bf16 = true                            load_in_4bit = true     as --quantize nf4: a 4-bit base, "QLoRA"
"""

TRAIN_EPILOG = (
    DATA_HELP
    + """
Example:
  minilora train --model microsoft/Phi-3-mini-4k-instruct --data chat.jsonl --output out --set peft.r=16

OUTPUT holds, in the end: adapter/ (as PEFT, transformers and vLLM read it), report.html, log.jsonl, training_args.json, and
checkpoint-STEP/ every save_steps. training.report_to="tensorboard" or "wandb" (or a list) has others told of the figures too.
Ctrl-C and SIGTERM save a checkpoint first; the same command with --resume goes on, and ends as if nothing had happened.

Several GPUs or machines: torchrun --nproc-per-node 8 -m minilora train … takes per_device_train_batch_size conversations on
each of them a batch; training.fsdp=true splits a base that one cannot hold.

Defaults (a text is set in quotes: --set "training.lr_scheduler_type='linear'"):
"""
)

MERGE_HELP = """Adds an adapter to its base model, and saves the result as a plain checkpoint in the base's dtype.

An adapter that was trained beside a 4-bit base can be merged into either of two:

  --model MODEL                    the weights of MODEL as they are: the original base
  --model MODEL --quantize nf4     those weights rounded to 4 bits and dequantised, which the adapter was trained beside

With --quantize the command tells how far each of the two comes out from the unmerged 4-bit model.
"""

REPORT_HELP = """\
The page holds loss, learning rate, gradient norm, tokens a second and peak memory against the step, metrics and answers of the
evaluations over time, the norm of every ΔW by layer and module, and the settings; of several runs those that differ. It needs no
network and no other file.
"""

EXPORT_HELP = """Makes an adapter over for another reader, without the base model; every layer's ΔW stays the same.

  peft   as PEFT itself would write it, without what is minilora's own
  vllm   one rank for all layers (8, 16, 32, 64, 128, 256, 320 or 512, padded with zeros) and one scale (others folded into B),
         since vLLM skips rank_pattern and alpha_pattern without a word; it cannot apply DoRA, biases or modules saved whole
"""


def _defaults() -> str:
    tables = (("training", TrainConfig), ("peft", LoraConfig))
    values = [(table, name, getattr(RunConfig(), name)) for table, names in RUN_KEYS.items() for name in names]
    values += [(table, field.name, getattr(config(), field.name)) for table, config in tables for field in fields(config)]
    return "\n".join(f"  {table}.{name} = {value!r}" for table, name, value in values)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("minilora", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, summary: str, description: str = "", epilog: str = "") -> argparse.ArgumentParser:
        formatter = argparse.RawDescriptionHelpFormatter
        return commands.add_parser(
            name, help=summary, description=description or summary, epilog=epilog, formatter_class=formatter
        )

    demo = command("demo", "fine-tune a small real chat model, before and after, in minutes")
    demo.add_argument(
        "--output", type=Path, default=Path("runs/demo"), metavar="DIR", help="where everything is written (%(default)s)"
    )
    demo.add_argument(
        "--model", metavar="MODEL", help="a Phi-3 checkpoint, folder or id, instead of the embedded SmolLM2 weights"
    )
    _revision(demo)
    _quantize(demo)
    demo.add_argument(
        "--max-steps", type=int, default=-1, metavar="N", help="train for fewer steps (the tests before and after stay)"
    )

    train = command("train", "fine-tune an adapter on conversations", TRAIN_HELP, TRAIN_EPILOG + _defaults())
    _model(train)
    train.add_argument("--data", nargs="+", required=True, metavar="DATA", help="conversations to train on")
    held_out = train.add_mutually_exclusive_group()
    held_out.add_argument("--eval-data", nargs="+", default=[], metavar="DATA", help="conversations to evaluate on")
    shared = "hold out about this share of the data to evaluate on, chosen by seed; conversations alike stay on one side"
    held_out.add_argument("--eval-share", type=float, default=0.0, metavar="SHARE", help=shared)
    train.add_argument("--output", type=Path, metavar="DIR", help="where adapter and log go (training.output_dir)")
    train.add_argument(
        "--adapter-dtype", choices=["float32", "model"], default="float32", help="dtype of the adapter (%(default)s)"
    )
    train.add_argument(
        "--resume", type=Path, nargs="?", const=True, default=False, metavar="CHECKPOINT",
        help="go on from a checkpoint; without a name from the newest one in the output folder",
    )  # fmt: skip
    train.add_argument(
        "--plan", action="store_true", help="tell the memory and time that it will need, load no weights and train nothing"
    )
    train.add_argument("--detect-anomaly", action="store_true", help="name the operation that gives the first NaN; slow")
    train.add_argument("--drop-long", action="store_true", help="leave out conversations over max_seq_length instead of stopping")
    _settings(train)

    evaluate = command(
        "eval", "loss and perplexity on conversations", "Evaluates a model, or a model with its adapter.", DATA_HELP
    )
    _model(evaluate, adapter=True)
    evaluate.add_argument("--data", nargs="+", required=True, metavar="DATA", help="conversations to evaluate on")
    evaluate.add_argument("--batch-size", type=int, default=8, metavar="N", help="conversations at once (%(default)s)")
    evaluate.add_argument(
        "--max-length", type=int, default=2048, metavar="N", help="tokens a conversation may have (%(default)s)"
    )
    evaluate.add_argument(
        "--metrics", nargs="+", choices=get_args(Metric), default=[], metavar="NAME",
        help="of the model's own answers to each last turn: exact_match, rougeL (pip install 'minilora[rouge]')",
    )  # fmt: skip
    evaluate.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="tokens of such an answer at most (%(default)s)"
    )
    evaluate.add_argument("--drop-long", action="store_true", help="leave out longer conversations instead of stopping")

    report = command(
        "report", "a page of a run, or of several side by side, as their folders hold them, finished or not", epilog=REPORT_HELP
    )
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the output folder of a run")
    where = "the page (RUN/report.html for one run, report.html for several)"
    report.add_argument("--output", type=Path, metavar="FILE", help=where)

    data = command("data", "look at conversations as training reads them").add_subparsers(required=True, metavar="WHAT")
    _data(data, "stats", "how long they are, what is too long, and how much of a batch is padding")
    show = _data(data, "show", "the first batches as text: what is learnt in colour, and the documents of packed rows")
    show.add_argument("-n", dest="batches", type=int, default=1, metavar="N", help="batches to show (%(default)s)")

    generate = command("generate", "answer one prompt")
    _model(generate, adapter=True)
    generate.add_argument("--prompt", required=True, metavar="TEXT", help="the question")
    _sampling(generate)

    chat = command("chat", "talk in the terminal, each answer knowing what was said before")
    _model(chat, adapter=True)
    _sampling(chat)

    merge = command(
        "merge", "add an adapter to its base model, and save the result as a plain checkpoint in the base's dtype", MERGE_HELP
    )
    _checkpoint(merge)
    _quantize(merge)
    merge.add_argument("--adapter", type=Path, required=True, metavar="DIR", help="the adapter")
    merge.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder for the merged model")
    merge.add_argument(
        "--untie", action="store_true", help="give head and embedding a weight each, for an adapter of one of the two"
    )

    export = command("export", "make an adapter over for another reader", EXPORT_HELP)
    export.add_argument("--adapter", type=Path, required=True, metavar="DIR", help="the adapter")
    export.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder for the adapter made over")
    export.add_argument("--for", dest="reader", choices=["peft", "vllm"], required=True, help="who shall read it")

    info = command("info", "what is in a checkpoint or an adapter, and what a LoRA config would train in it")
    info.add_argument("model", metavar="MODEL", help="a checkpoint or an adapter: a folder, or an id on the Hugging Face hub")
    info.add_argument(
        "--model", dest="base", metavar="BASE", help="of an adapter: a checkpoint, to see whether the adapter fits it"
    )
    _revision(info)
    _settings(info)
    return parser


def _data(commands, name: str, summary: str) -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(name, help=summary, description=summary, epilog=DATA_HELP, formatter_class=formatter)
    parser.set_defaults(command=f"data {name}")
    parser.add_argument("data", nargs="+", metavar="DATA", help="conversations")
    _checkpoint(parser)
    parser.add_argument("--packing", action="store_true", help="as --set training.packing=true")
    _settings(parser)
    return parser


def _checkpoint(parser: argparse.ArgumentParser) -> None:
    what = "a Phi-3 checkpoint: a folder with config.json, safetensors and tokenizer, or an id on the Hugging Face hub"
    parser.add_argument("--model", required=True, metavar="MODEL", help=what)
    _revision(parser)


def _revision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of an id on the hub (its main branch)")


def _quantize(parser: argparse.ArgumentParser) -> None:
    what = "round the weights of the layers to 4 bits as they are loaded: NF4 with double quantisation, the base of QLoRA"
    parser.add_argument("--quantize", choices=["nf4"], help=what)


def _model(parser: argparse.ArgumentParser, adapter: bool = False) -> None:
    _checkpoint(parser)
    _quantize(parser)
    if adapter:
        parser.add_argument("--adapter", type=Path, metavar="DIR", help="an adapter to load into it")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, …; auto takes CUDA where there is one (%(default)s)")
    dtypes = ["auto", "float32", "bfloat16"]
    parser.add_argument(
        "--dtype", choices=dtypes, default="auto", help="of the weights; auto: bfloat16 on CUDA, else float32 (%(default)s)"
    )


def _sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="tokens of an answer at most (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (%(default)s)")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample among the K likeliest tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample among the likeliest tokens that reach probability P")
    rarer = "above 1, tokens of prompt and answer so far get less likely (%(default)s)"
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="P", help=rarer)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (%(default)s)")


def _settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="a TOML file with the tables [training], [peft] and [quantization]"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="one setting over the file's, peft.r=16 say"
    )


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    import torch  # after parsing, so that --help and a mistyped option answer at once

    from minilora import commands
    from minilora.training import distributed

    try:
        getattr(commands, args.command.replace(" ", "_"))(args)  # "data show"
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        print(f"minilora {args.command}{distributed.title()}: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # what torch says of a CPU that has no more
            raise
        print(f"minilora {args.command}{distributed.title()}: out of memory: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"\nminilora {args.command}{distributed.title()}: {error if str(error) else 'stopped'}", file=sys.stderr)
        return 128 + getattr(error, "signal", signal.SIGINT)
    return 0
