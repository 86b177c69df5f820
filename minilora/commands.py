"""What each command of the command line does, with the library's public verbs; cli.py says what can be typed."""

import sys
from argparse import Namespace
from pathlib import Path

import torch

import minilora as lora
from minilora import phi3
from minilora.adapter import read_adapter_config, read_adapter_tensors
from minilora.config import LoraConfig, read_run_config
from minilora.data import Example
from minilora.injection import find_targets
from minilora.trainable import count_parameters


def demo(args: Namespace) -> None:
    from minilora.demo import run  # its extra packages are needed by no other command

    run(args.output, args.model, args.max_steps)


def train(args: Namespace) -> None:
    run = read_run_config(args.config, args.set)
    output = args.output or (run.output_dir and Path(run.output_dir))
    if not output:
        raise ValueError("name a folder for the adapter with --output, or output_dir in [training]")
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} must be a folder, and is a file: choose another --output")
    if (output / "adapter").exists() and not run.overwrite_output_dir:
        raise FileExistsError(
            f"{output / 'adapter'} exists: choose another --output, or allow it to be replaced with "
            "--set training.overwrite_output_dir=true"
        )
    if run.without_effect:
        print(f"without effect here, there is one way only: {', '.join(run.without_effect)}")
    _check_folders(args)
    tokenizer = phi3.load_tokenizer(args.model)
    dataset = _examples(args.data, tokenizer, run.max_seq_length, args.drop_long)
    eval_dataset = args.eval_data and _examples(args.eval_data, tokenizer, run.max_seq_length, args.drop_long)
    model = _load(args, bf16=run.bf16)
    torch.manual_seed(run.training.seed)  # lora_A starts at random
    lora.inject(model, run.peft, None if args.adapter_dtype == "model" else torch.float32)
    lora.mark_only_lora_as_trainable(model)
    print(describe_adapter(model, run.peft))
    result = lora.train(model, dataset, run.training, eval_dataset, output, base=str(args.model))
    lines = [line for line in result.log if "loss" in line]
    losses = " → ".join(f"{line['loss']:.4f} (step {line['step']})" for line in lines[:: max(1, len(lines) - 1)])
    print(f"{result.tokens} tokens in {result.seconds:.0f} s; loss {losses}")
    last = result.log[-1]
    if "eval_loss" in last:
        print(f"evaluation: loss {last['eval_loss']:.4f}, perplexity {last['eval_perplexity']:.2f}")
    print(f"wrote {output / 'adapter'} and {output / 'log.jsonl'}")


def eval(args: Namespace) -> None:
    _check_folders(args)
    tokenizer = phi3.load_tokenizer(args.model)
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, not {args.batch_size}")
    examples = _examples(args.data, tokenizer, args.max_length, args.drop_long)
    found = lora.evaluate(_load(args), examples, args.batch_size)
    print(f"loss {found.loss:.4f}, perplexity {found.perplexity:.2f}, over {found.tokens} target tokens; nothing was written")


def generate(args: Namespace) -> None:
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    settings = {name: getattr(args, name) for name in names}
    phi3.Sampling(**settings)  # a wrong setting is told before the model is loaded
    _check_folders(args)
    tokenizer = phi3.load_tokenizer(args.model)
    model = _load(args)
    messages = [{"role": "system", "content": args.system}] if args.system else []
    if args.prompt is not None:
        _answer(model, tokenizer, [*messages, {"role": "user", "content": args.prompt}], settings)
        return
    print("a chat: end it with Ctrl-D")
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            print()
            return
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": _answer(model, tokenizer, messages, settings)})


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
    _check_folders(args)
    model = lora.load_adapter(phi3.load(args.model), args.adapter)
    lora.merge(model)
    phi3.save(model, args.output, tokenizer_from=args.model)
    print(f"wrote {args.output}: a plain checkpoint, weights in {_dtype_of(model)}")


def info(args: Namespace) -> None:
    if (args.path / "adapter_config.json").exists():
        config = read_adapter_config(args.path)
        sizes = [tensor.numel() for tensor in read_adapter_tensors(args.path).values()]
        print(f"{args.path}: a LoRA adapter, {_settings(config)}; {sum(sizes):,} parameters for {len(sizes) // 2} layers")
        return
    if not (args.path / "config.json").exists():
        raise FileNotFoundError(f"{args.path} must hold config.json (a checkpoint) or adapter_config.json (an adapter)")
    with torch.device("meta"):
        config = phi3.Phi3Config.read(args.path / "config.json")
        model = phi3.Phi3ForCausalLM(config)
    head = "head tied to the embedding" if config.tie_word_embeddings else "head of its own"
    print(f"{args.path}: Phi-3 with {count_parameters(model)[1]:,} parameters, {head}")
    print(f"  {config.num_hidden_layers} layers, hidden size {config.hidden_size}, MLP {config.intermediate_size}")
    print(f"  {config.num_attention_heads} heads of {config.head_dim}, {config.num_key_value_heads} of keys and values")
    window = config.sliding_window or "none"
    print(f"  vocabulary {config.vocab_size}, up to {config.max_position_embeddings} tokens, sliding window {window}")
    run = read_run_config(args.config, args.set)
    targets = find_targets(model, run.peft)
    trainable = sum(target.parameters for target in targets)
    print(f"an adapter of {_settings(run.peft)} would train {trainable:,} parameters in {len(targets)} layers")


def load_model(path: Path, device: str = "auto", dtype: str = "auto", bf16: bool | None = None) -> phi3.Phi3ForCausalLM:
    """Loads a checkpoint where and as the command line says, and prints both."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device} cannot be used: {error}") from None
    if dtype == "auto":
        bf16 = device.startswith("cuda") if bf16 is None else bf16
        dtype = "bfloat16" if bf16 else "float32"
    elif bf16 is not None and (dtype == "bfloat16") != bf16:
        raise ValueError(f"--dtype {dtype} and bf16 = {str(bf16).lower()} in [training] contradict one another")
    model = phi3.load(path, getattr(torch, dtype), device)
    where = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{device} ({torch.get_num_threads()} threads)"
    print(f"{path}: {count_parameters(model)[1]:,} parameters in {dtype} on {where}; kernels: plain PyTorch")
    return model


def _check_folders(args: Namespace) -> None:
    """A wrong folder is told before anything is loaded."""
    if not (args.model / "config.json").exists():
        hint = ": this is an adapter, for --adapter" if (args.model / "adapter_config.json").exists() else ""
        raise FileNotFoundError(f"--model {args.model} must be a checkpoint, a folder with config.json{hint}")
    if getattr(args, "adapter", None):
        read_adapter_config(args.adapter)


def _load(args: Namespace, bf16: bool | None = None) -> phi3.Phi3ForCausalLM:
    model = load_model(args.model, args.device, args.dtype, bf16)
    if getattr(args, "adapter", None):
        lora.load_adapter(model, args.adapter)
        print(f"adapter {args.adapter}: {_settings(model.lora_config)}")
    return model


def describe_adapter(model: phi3.Phi3ForCausalLM, config: LoraConfig) -> str:
    """What is trained, in one line."""
    trainable, total = count_parameters(model)
    dtype = next(str(parameter.dtype) for parameter in model.parameters() if parameter.requires_grad).removeprefix("torch.")
    return f"LoRA of {_settings(config)}, in {dtype}: {trainable:,} trainable parameters of {total:,} ({trainable / total:.2%})"


def _settings(config: LoraConfig) -> str:
    targets = config.target_modules if isinstance(config.target_modules, str) else ", ".join(config.target_modules)
    return f"r {config.r}, alpha {config.lora_alpha}, dropout {config.lora_dropout} on {targets}"


def _dtype_of(model: phi3.Phi3ForCausalLM) -> str:
    return str(model.lm_head.weight.dtype).removeprefix("torch.")


def _examples(path: Path, tokenizer: phi3.Tokenizer, max_length: int, drop_long: bool) -> list[Example]:
    conversations = lora.read_conversations(path)
    examples = lora.encode_conversations(conversations, tokenizer, max_length, drop_long)
    left_out = len(conversations) - len(examples)
    if not examples:
        raise ValueError(f"{path}: all {len(conversations)} conversations are longer than {max_length} tokens")
    lengths = [len(example.ids) for example in examples]
    targets = sum(sum(example.mask) for example in examples)
    print(
        f"{path}: {len(examples)} conversations of {min(lengths)} to {max(lengths)} tokens, {sum(lengths):,} in all, "
        f"{targets:,} of them the assistant's" + (f"; {left_out} longer than {max_length} left out" if left_out else "")
    )
    return examples
