"""What each command of the command line does, with the library's public verbs; cli.py says what can be typed."""

import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

import minilora as lora
from minilora import phi3
from minilora.adapters.adapter_files import read_adapter_config
from minilora.adapters.config import LoraConfig
from minilora.adapters.export import export_adapter
from minilora.adapters.injection import find_targets
from minilora.adapters.inspection import Inspection, inspect_adapter, misfits
from minilora.adapters.layers import adapted_layers
from minilora.adapters.peft_config import read_peft_config
from minilora.adapters.trainable import count_parameters
from minilora.adapters.tying import TiedLinear
from minilora.config import RunConfig, read_run_config
from minilora.data.encoding import Example, shuffled_batches
from minilora.data.lengths import describe_padding
from minilora.data.preparation import count_shared, gather, prepare
from minilora.data.showing import show_batch
from minilora.extras import require_extras
from minilora.files import remove_folder
from minilora.kernels import arithmetic, backend
from minilora.reporting.report import compare_runs, report_run, write_report
from minilora.reporting.runs import read_run
from minilora.training.checkpoint import find_checkpoints, find_resumed
from minilora.training.config import TrainConfig
from minilora.training.distributed import in_turn, joined, rank, wait_for_all, world_size
from minilora.training.planning import batches_of, describe_plan
from minilora.training.questions import measure
from minilora.training.recorder import best_evaluation

PROBE = "The key is under the mat, and the tea is ready in three minutes."  # what merge is measured on


def demo(args: Namespace) -> None:
    from minilora.demo.demo import run  # its extra packages are needed by no other command

    run(args.output, args.model and _checkpoint(args, phi3.CHECKPOINT_FILES), args.max_steps, args.quantize)


@joined()
def train(args: Namespace) -> None:
    run = read_run_config(args.config, args.set)
    require_extras([*run.training.eval_metrics, *run.training.trackers])
    training = replace(run.training, detect_anomaly=run.training.detect_anomaly or args.detect_anomaly)
    output = None if args.plan else _output_of_training(args, run)
    checkpoint = find_resumed(args.resume, output) if args.resume and not args.plan else None
    if run.without_effect:
        print(f"without effect here, there is one way only: {', '.join(run.without_effect)}")
    if run.load_in_4bit:
        args.quantize = "nf4"
    tokenizer = phi3.load_tokenizer(_checkpoint(args))
    conversations, held_out = gather(args.data, run.training.seed, args.eval_share)
    dataset = prepare(conversations, tokenizer, run, args.drop_long)
    print(describe_padding(dataset, run.training))
    if args.plan:
        return _tell_plan(args, run, training, dataset)
    eval_dataset = questions = None
    if args.eval_data or args.eval_share:
        print("to evaluate on:")
        held_out += gather(args.eval_data, run.training.seed)[0]
        eval_dataset = prepare(held_out, tokenizer, run, args.drop_long)
        questions = lora.Questions(held_out, partial(phi3.generate_batch, tokenizer=tokenizer))
        print(f"{count_shared(held_out, conversations)} of them are trained on too")
    make = partial(_adapted, args, run)
    model = in_turn(make) if run.fsdp else make()
    if checkpoint:
        print(f"going on from {checkpoint}")
    base = args.model
    if rank() == 0:
        given_up = () if checkpoint else (*find_checkpoints(output), output / "base")  # by overwrite_output_dir
        for earlier in filter(Path.exists, given_up):
            remove_folder(earlier)
        base = _base_of(args, model, output)
    wait_for_all()
    result = lora.train(model, dataset, training, eval_dataset, output, base, resume=checkpoint or False, questions=questions)
    lines = [line for line in result.log if "loss" in line]
    losses = " → ".join(f"{line['loss']:.4f} (step {line['step']})" for line in lines[:: max(1, len(lines) - 1)])
    print(f"{result.tokens} tokens in {result.seconds:.0f} s; loss {losses}")
    if result.skipped:
        print(f"{result.skipped} of {result.steps} steps were skipped, since loss or gradient was not finite: see the log")
    if eval_dataset:
        told = best_evaluation(result.log, training) if training.load_best_model_at_end else result.log[-1]
        metrics = "".join(f", {name} {told[f'eval_{name}']:.4f}" for name in training.eval_metrics)
        print(
            f"evaluation: loss {told['eval_loss']:.4f}, perplexity {told['eval_perplexity']:.2f}{metrics}, at step {told['step']}"
        )
    if rank() == 0:
        write_report(report_run(read_run(output)), output / "report.html")
    print(f"wrote {output / 'adapter'}, {output / 'log.jsonl'} and {output / 'report.html'}")


def _adapted(args: Namespace, run: RunConfig) -> phi3.Phi3ForCausalLM:
    """The base with a fresh adapter, which alone is to learn; split over the processes if the run says so."""
    model = _load(args, bf16=run.bf16, home="cpu" if run.fsdp else None)
    torch.manual_seed(run.training.seed)  # lora_A starts at random
    dtype = None if args.adapter_dtype == "model" else torch.float32
    original = phi3.Checkpoint(args.model, args.revision).tensor if run.peft.init_lora_weights == "loftq" else None
    lora.inject(model, run.peft, dtype, original=original)
    lora.mark_only_lora_as_trainable(model)
    print(describe_adapter(model, run.peft))
    if run.fsdp:
        lora.shard_base(model, _device(args.device).partition(":")[0])
        print(f"the base is split over {world_size()} processes")
    return model


def _tell_plan(args: Namespace, run: RunConfig, training: TrainConfig, dataset: list[Example]) -> None:
    """What the run will need, found on a model without weights."""
    device, dtype = _placed(args.device, args.dtype, run.bf16)
    folder = _checkpoint(args)
    quantize = "nf4" if args.quantize or phi3.is_4_bit(folder) else None
    model = _on_meta(folder).to(dtype)
    plain = replace(run.peft, init_lora_weights=True, loftq_config={})  # how an adapter starts needs weights
    lora.inject(model, plain, None if args.adapter_dtype == "model" else torch.float32)
    lora.mark_only_lora_as_trainable(model)
    print(describe_adapter(model, run.peft))
    print(describe_plan(model, batches_of(dataset, training), training, device, quantize))
    print("nothing was loaded, trained or written")


def _output_of_training(args: Namespace, run: RunConfig) -> Path:
    """The folder that a run writes into; an earlier run there is told, unless it is to be resumed or replaced."""
    output = args.output or (run.output_dir and Path(run.output_dir))
    if not output and isinstance(args.resume, Path):
        output = args.resume.parent
    if not output:
        raise ValueError("name a folder for the adapter with --output, or output_dir in [training]")
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} must be a folder, and is a file: choose another --output")
    present = [path for path in (*find_checkpoints(output), output / "adapter") if path.exists()]
    if present and not args.resume and not run.overwrite_output_dir:
        raise FileExistsError(
            f"{present[-1]} exists: choose another --output, go on with --resume, or allow it to be replaced with "
            "--set training.overwrite_output_dir=true"
        )
    return output


def _base_of(args: Namespace, model: phi3.Phi3ForCausalLM, output: Path) -> str:
    """The base that the adapter belongs to; one that LoftQ changed is saved, since no other has its weights."""
    if model.lora_config.loftq_config.get("loftq_iter", 1) == 1:
        return args.model
    base = output / "base"
    if not base.exists():  # it does where the run is resumed
        with lora.disable_adapter(model):
            phi3.save(model, base, tokenizer_from=phi3.fetch(args.model, args.revision, phi3.TEXT_FILES))
        print(f"LoftQ changed the 4-bit base, which the adapter needs: wrote {base}")
    return str(base)


@joined()
def eval(args: Namespace) -> None:
    tokenizer = phi3.load_tokenizer(_checkpoint(args))
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, not {args.batch_size}")
    require_extras(args.metrics)
    run = RunConfig(TrainConfig(max_seq_length=args.max_length))
    conversations = gather(args.data, run.training.seed)[0]
    examples, model = prepare(conversations, tokenizer, run, args.drop_long), _load(args)
    found = lora.evaluate(model, examples, args.batch_size)
    print(f"loss {found.loss:.4f}, perplexity {found.perplexity:.2f}, over {found.tokens} target tokens; nothing was written")
    if args.metrics:
        questions = lora.Questions(conversations, partial(phi3.generate_batch, tokenizer=tokenizer))
        for name, value in measure(questions.ask(model, args.max_new_tokens, args.batch_size), args.metrics).items():
            print(f"{name.removeprefix('eval_')} {value:.4f}, over the answers to {len(conversations)} conversations")


def report(args: Namespace) -> None:
    runs = [read_run(folder) for folder in args.runs]
    path = args.output or (Path("report.html") if len(runs) > 1 else args.runs[0] / "report.html")
    write_report(compare_runs(runs) if len(runs) > 1 else report_run(runs[0]), path)
    print(f"wrote {path}")


def data_stats(args: Namespace) -> None:
    run, tokenizer = _data_settings(args)
    examples = prepare(gather(args.data, run.training.seed)[0], tokenizer, run, drop_long=True)
    print(describe_padding(examples, run.training))


def data_show(args: Namespace) -> None:
    if args.batches < 1:
        raise ValueError(f"-n must be at least 1, not {args.batches}")
    run, tokenizer = _data_settings(args)
    training, decode = run.training, partial(tokenizer.decode, skip_special_tokens=False)
    examples = prepare(gather(args.data, training.seed)[0], tokenizer, run, drop_long=True)
    rows = lora.pack(examples, training.max_seq_length) if training.packing else examples
    batches = shuffled_batches(rows, training.per_device_train_batch_size, training.seed)
    for number, batch in enumerate(islice(batches, args.batches), start=1):
        print(f"\nbatch {number}\n{show_batch(batch, decode, colour=sys.stdout.isatty())}")


def _data_settings(args: Namespace) -> tuple[RunConfig, phi3.Tokenizer]:
    packing = ["training.packing = true"] if args.packing else []
    return read_run_config(args.config, [*args.set, *packing]), phi3.load_tokenizer(_checkpoint(args))


def generate(args: Namespace) -> None:
    settings, (model, tokenizer) = _sampling(args), _model_and_tokenizer(args)
    _answer(model, tokenizer, [*_opening(args), {"role": "user", "content": args.prompt}], settings)


def chat(args: Namespace) -> None:
    settings, (model, tokenizer) = _sampling(args), _model_and_tokenizer(args)
    history = _opening(args)
    print("a chat: /reset forgets what was said, /exit or Ctrl-D ends it")
    for line in _lines():
        if line == "/exit":
            return
        if line == "/reset":
            history = _opening(args)
            continue
        asked = [*history, {"role": "user", "content": line}]
        try:
            answer = _answer(model, tokenizer, asked, settings)
        except ValueError as error:  # too long for the model, or refused by the template: told before anything is computed
            print(f"minilora chat: not asked, {error}; or forget what was said with /reset", file=sys.stderr)
        else:
            history = [*asked, {"role": "assistant", "content": answer}]


def _lines() -> Iterator[str]:
    """What is typed, line by line, until the end; empty lines are skipped."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            print()
            return
        if line:
            yield line


def _sampling(args: Namespace) -> dict:
    """The settings of the answers; a wrong one is told before the model is loaded."""
    settings = {field.name: getattr(args, field.name) for field in fields(phi3.Sampling)}
    phi3.Sampling(**settings)
    return settings


def _model_and_tokenizer(args: Namespace) -> tuple[phi3.Phi3ForCausalLM, phi3.Tokenizer]:
    tokenizer = phi3.load_tokenizer(_checkpoint(args))
    return _load(args), tokenizer


def _opening(args: Namespace) -> list[dict]:
    return [{"role": "system", "content": args.system}] if args.system else []


def _answer(model, tokenizer: phi3.Tokenizer, messages: list[dict], settings: dict) -> str:
    pieces = []
    for piece in phi3.stream(model, tokenizer, messages, **settings):
        pieces.append(piece)
        print(piece, end="", flush=True)
    print()
    return "".join(pieces)


def merge(args: Namespace) -> None:
    if args.output.exists() and any(args.output.iterdir()):
        raise FileExistsError(f"{args.output} must be new or empty: choose another --output")
    folder = _checkpoint(args, phi3.CHECKPOINT_FILES)
    ids = torch.tensor([phi3.load_tokenizer(folder).encode(PROBE)])
    elsewhere = _merged_into_original(folder, args.adapter, ids) if args.quantize else None
    model = phi3.load(folder, quantize=args.quantize)
    quantized = len(phi3.quantized_weights(model))
    with torch.no_grad():
        base = model(ids)
        unmerged = lora.load_adapter(model, args.adapter)(ids)
        if args.untie:
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
        lora.merge(model)
        phi3.dequantize(model)
        merged = model(ids)
    rounding = torch.finfo(model.lm_head.weight.dtype).eps / 2
    if quantized:
        print(f"merged into the dequantised values of {quantized} 4-bit weights, which the adapter was trained beside")
    print(
        f"merged in float32, each weight rounded once to {_dtype_of(model)} (by at most {rounding:.1e} of it)\n"
        f"logits of {ids.numel()} tokens, merged against unmerged: off by {_difference(merged, unmerged):.1e} of their RMS, "
        f"where the adapter itself moves them by {_difference(unmerged, base):.1e}"
    )
    if elsewhere is not None:
        print(f"merged into the original weights instead (without --quantize): off by {_difference(elsewhere, unmerged):.1e}")
    elif quantized:
        print("to merge into the original weights instead, name their checkpoint with --model")
    if model.config.tie_word_embeddings and model.lm_head.weight is not model.model.embed_tokens.weight:
        model.config = replace(model.config, tie_word_embeddings=False)
        print("head and embedding are apart now, and are saved so")
    phi3.save(model, args.output, tokenizer_from=folder)
    print(f"wrote {args.output}: a plain checkpoint, weights in {_dtype_of(model)}; {folder} still holds the base, unchanged")


def _merged_into_original(folder: Path, adapter: Path, ids: Tensor) -> Tensor | None:
    """Logits of the adapter merged into the checkpoint's own weights; None where those are 4-bit, or it started by LoftQ."""
    model = phi3.load(folder)
    if phi3.quantized_weights(model) or read_adapter_config(adapter).init_lora_weights == "loftq":
        return None
    with torch.no_grad():
        lora.merge(lora.load_adapter(model, adapter))
        return model(ids)


def _difference(logits: Tensor, reference: Tensor) -> float:
    """RMS(logits − reference) / RMS(reference), found in float64: beside it the logits' own dtype must not show."""
    logits, reference = logits.double(), reference.double()
    return float(torch.linalg.vector_norm(logits - reference) / torch.linalg.vector_norm(reference))


def export(args: Namespace) -> None:
    if args.output.exists() and any(args.output.iterdir()):
        raise FileExistsError(f"{args.output} must be new or empty: choose another --output")
    rescaled = export_adapter(args.adapter, args.output, args.reader)
    made = read_peft_config(args.output).lora
    print(f"wrote {args.output} for {args.reader}: r {made.r}, alpha {made.lora_alpha}")
    if rescaled:
        print(f"B of {len(rescaled)} layers was multiplied to share that scale, and rounded once: {', '.join(rescaled)}")


def info(args: Namespace) -> None:
    folder = _fetch(args, phi3.TEXT_FILES)
    if (folder / "adapter_config.json").exists():
        _tell_adapter(args, inspect_adapter(phi3.fetch(args.model, args.revision)))
    elif args.base:
        raise ValueError(f"--model is the base for an adapter, and {args.model} is none")
    else:
        _tell_checkpoint(args, folder)


def _tell_adapter(args: Namespace, found: Inspection) -> None:
    sizes, updates = [tensor.numel() for tensor in found.tensors.values()], found.updates
    print(
        f"{args.model}: a {found.kind} adapter, {_settings(found.config)}; {sum(sizes):,} parameters for {len(updates)} layers\n"
        f"made for {found.stored.base or 'a base that it does not name'}"
    )
    if found.stored.lora.ensure_weight_tying:
        print("what is tied shares one adapter, which the file holds for each")
    if found.config.init_lora_weights == "loftq":
        print("it started by LoftQ, and belongs to the 4-bit base: --quantize nf4")
    if found.stored.lora.init_lora_weights is not True:
        print(f"its base lacks the start by {found.stored.lora.init_lora_weights}, which loading finds again and subtracts")
    width = max(map(len, updates), default=0)
    for path, update in updates.items():
        print(f"  {path:{width}}  rank {update.rank:<4} scale {update.scaling:<8.4g} norm of ΔW {update.norm:.4g}")
    magnitudes = [name for name in found.others if name.endswith(".lora_magnitude_vector")]  # one a layer: too many to name
    if magnitudes:
        print(f"  and {len(magnitudes)} vectors of magnitudes")
    for name in sorted({*found.others} - {*magnitudes}):
        print(f"  and {name} {tuple(found.tensors[name].shape)}")
    if args.base:
        faults = misfits(found, _on_meta(phi3.fetch(args.base, files=phi3.TEXT_FILES)))
        if faults:
            raise ValueError(f"{args.model} does not fit {args.base}:\n  " + "\n  ".join(faults))
        print(f"it fits {args.base}: every name and every shape")


def _on_meta(folder: Path) -> phi3.Phi3ForCausalLM:
    """The model of a checkpoint without its weights."""
    with torch.device("meta"):
        return phi3.Phi3ForCausalLM(phi3.Phi3Config.read(folder / "config.json"))


def _tell_checkpoint(args: Namespace, folder: Path) -> None:
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{args.model} must hold config.json (a checkpoint) or adapter_config.json (an adapter)")
    model = _on_meta(folder)
    config = model.config
    head = "head tied to the embedding" if config.tie_word_embeddings else "head of its own"
    print(f"{args.model}: Phi-3 with {count_parameters(model)[1]:,} parameters, {head}")
    if phi3.is_4_bit(folder):
        print("  its weights are 4-bit (NF4, double quantisation): quantization_config in config.json")
    print(f"  {config.num_hidden_layers} layers, hidden size {config.hidden_size}, MLP {config.intermediate_size}")
    print(f"  {config.num_attention_heads} heads of {config.head_dim}, {config.num_key_value_heads} of keys and values")
    window = config.sliding_window or "none"
    print(f"  vocabulary {config.vocab_size}, up to {config.max_position_embeddings} tokens, sliding window {window}")
    run = read_run_config(args.config, args.set)
    layers = len(find_targets(model, run.peft))
    lora.mark_only_lora_as_trainable(lora.inject(model, run.peft))
    trainable, _ = count_parameters(model)
    print(f"an adapter of {_settings(run.peft)} would train {trainable:,} parameters in {layers} layers")


def load_model(
    path: Path | str,
    device: str = "auto",
    dtype: str = "auto",
    bf16: bool | None = None,
    revision: str | None = None,
    quantize: str | None = None,
    home: str | None = None,
) -> phi3.Phi3ForCausalLM:
    """Loads a checkpoint where and as the command line says, and prints both.

    Args:
        home: where the weights lie until they are split over the devices; the device itself when None.
    """
    device, dtype = _placed(device, dtype, bf16)
    model = phi3.load(path, dtype, home or device, revision, quantize)
    where = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{device} ({torch.get_num_threads()} threads)"
    print(f"{path}: {count_parameters(model)[1]:,} parameters in {_dtype_of(model)} on {where}")
    if phi3.quantized_weights(model) or dtype != torch.float32:
        print(describe_base(model))
    print(f"kernels: {backend.describe(torch.device(device), dtype)}")
    return model


def _placed(device: str, dtype: str, bf16: bool | None) -> tuple[str, torch.dtype]:
    """The device and the dtype that the command line means, where it leaves them to be chosen too."""
    device = _device(device)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device} cannot be used: {error}") from None
    if dtype == "auto":
        bf16 = device.startswith("cuda") if bf16 is None else bf16
        dtype = "bfloat16" if bf16 else "float32"
    elif bf16 is not None and (dtype == "bfloat16") != bf16:
        raise ValueError(f"--dtype {dtype} and bf16 = {str(bf16).lower()} in [training] contradict one another")
    return device, getattr(torch, dtype)


def _device(device: str) -> str:
    """The device that --device means; of several processes each has a current GPU of its own."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def describe_base(model: phi3.Phi3ForCausalLM) -> str:
    """What of a 4-bit base is 4-bit, and what products are taken in, in one line."""
    weights, head = phi3.quantized_weights(model), model.lm_head.weight
    products = arithmetic.describe(head.dtype, head.device)
    if not weights:
        return f"{_dtype_of(model)} weights, {products}"
    layers = ", ".join(dict.fromkeys(name.split(".")[-2] for name in weights))
    count, size = sum(weight.numel() for weight in weights.values()), sum(p.nbytes for w in weights.values() for p in w.parts)
    return (
        f"4-bit base (NF4, double quantisation): {count:,} of the parameters, in {len(weights)} weights ({layers}), take "
        f"{size:,} bytes; {products}"
    )


def _fetch(args: Namespace, files: Iterable[str]) -> Path:
    """The folder of the model; the commit found on the hub is told, and stays the same to the end of the command."""
    folder = phi3.fetch(args.model, args.revision, files)
    if not Path(args.model).is_dir():
        print(f"{args.model}, {args.revision or 'main branch'}: commit {folder.name}")
        args.revision = folder.name
    return folder


def _checkpoint(args: Namespace, files: Iterable[str] = phi3.TEXT_FILES) -> Path:
    """The folder of a checkpoint; a wrong one, or a wrong adapter, is told before anything is loaded."""
    if getattr(args, "adapter", None):
        read_adapter_config(args.adapter)
    folder = _fetch(args, files)
    if not (folder / "config.json").exists():
        hint = ": this is an adapter, for --adapter" if (folder / "adapter_config.json").exists() else ""
        raise FileNotFoundError(f"--model {args.model} must be a checkpoint, with a config.json{hint}")
    return folder


def _load(args: Namespace, bf16: bool | None = None, home: str | None = None) -> phi3.Phi3ForCausalLM:
    model = load_model(args.model, args.device, args.dtype, bf16, args.revision, args.quantize, home)
    if getattr(args, "adapter", None):
        lora.load_adapter(model, args.adapter)
        print(f"adapter {args.adapter}: {_settings(model.lora_config)}")
    return model


def describe_adapter(model: phi3.Phi3ForCausalLM, config: LoraConfig) -> str:
    """What is trained, in one line."""
    trainable, total = count_parameters(model)
    dtype = next(str(parameter.dtype) for parameter in model.parameters() if parameter.requires_grad).removeprefix("torch.")
    tied = [path for path, layer in adapted_layers(model).items() if isinstance(layer, TiedLinear)]
    return (
        f"LoRA of {_settings(config)}, in {dtype}: {trainable:,} trainable parameters of {total:,} ({trainable / total:.2%})"
        + (f"; {', '.join(tied)} shares the embedding's" if tied else "")
    )


def _settings(config: LoraConfig) -> str:
    targets = config.target_modules if isinstance(config.target_modules, str) else ", ".join(config.target_modules)
    variants = [name for name in ("use_rslora", "use_dora", "lora_bias") if getattr(config, name)]
    variants += [config.init_lora_weights] if config.init_lora_weights is not True else []
    variants += [f"biases: {config.bias}"] if config.bias != "none" else []
    variants += [f"trained whole: {name}" for name in config.modules_to_save or []]
    return ", ".join([f"r {config.r}, alpha {config.lora_alpha}, dropout {config.lora_dropout} on {targets}", *variants])


def _dtype_of(model: phi3.Phi3ForCausalLM) -> str:
    return str(model.lm_head.weight.dtype).removeprefix("torch.")
