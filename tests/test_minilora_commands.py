"""What each command does when all is well, and that it says what it uses and what it wrote."""

import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import load_in_transformers, rms_error, tiny_config, tiny_model

import minilora as lora
from minilora import phi3
from minilora.cli import main
from minilora.commands import PROBE
from minilora.config import read_run_config
from minilora.data.encoding import shuffled_batches
from minilora.kernels import arithmetic


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_checkpoint):
    """A folder with chat.jsonl, run.toml and the output of `minilora train` on them."""
    folder = tmp_path_factory.mktemp("run")
    lines = [
        {"messages": [{"role": "user", "content": f"What is {n} and 1?"}, {"role": "assistant", "content": str(n + 1)}]}
        for n in range(12)
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "run.toml").write_text(
        '[training]\nlearning_rate = 1e-2\nmax_steps = 3\nsave_steps = 2\nlog_level = "info"\n'
        '[peft]\nr = 4\nlora_alpha = 8\ntarget_modules = ["q_proj", "v_proj", "down_proj"]\n'
    )
    run(
        "train", "--model", tiny_checkpoint, "--data", folder / "chat.jsonl", "--eval-data", folder / "chat.jsonl",
        "--config", folder / "run.toml", "--output", folder / "out",
    )  # fmt: skip
    return folder


def run(*argv) -> None:
    assert main([str(arg) for arg in argv]) == 0


def test_train_writes_adapter_log_and_checkpoints(trained):
    names = sorted(path.name for path in (trained / "out").iterdir())
    assert names == ["adapter", "checkpoint-2", "log.jsonl", "report.html", "training_args.json"]
    lines = [json.loads(line) for line in (trained / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 3]
    assert "eval_perplexity" in lines[-1]
    questions = [f"What is {n} and 1?" for n in range(4)]
    assert [[sample["question"] for sample in line["samples"]] for line in (lines[0], lines[-1])] == [questions, questions]


def test_train_says_what_it_uses_and_what_it_wrote(trained, tiny_checkpoint, tmp_path, capsys):
    run(
        "train",
        "--model",
        tiny_checkpoint,
        "--data",
        trained / "chat.jsonl",
        "--config",
        trained / "run.toml",
        "--output",
        tmp_path,
    )
    said = capsys.readouterr().out
    for part in (
        "float32 on cpu",
        "kernels: plain PyTorch",
        "r 4, alpha 8",
        "in float32",
        "trainable parameters of",
        "12 conversations",
    ):
        assert part in said
    assert "without effect here, there is one way only: training.log_level" in said
    assert f"wrote {tmp_path / 'adapter'}" in said


@pytest.mark.parametrize(
    "settings", [[], ["--quantize", "nf4"], ["--dtype", "bfloat16", "--set", "peft.init_lora_weights='pissa'"]]
)
def test_a_plan_reads_no_weights_and_writes_nothing(trained, tiny_checkpoint, tmp_path, capsys, settings):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_checkpoint, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    run("train", "--model", bare, "--data", trained / "chat.jsonl", "--set", "training.max_steps=7", *settings, "--plan")
    said = capsys.readouterr().out
    assert "time: 7 steps of " in said
    figures = {
        line.split()[0]: line.split()[1] for line in said.partition("plan for cpu")[2].splitlines()[1:] if line[:2] == "  "
    }
    assert figures.keys() == {"weights", "adapter", "gradients", "moments", "activations", "holes", "transient", "peak"}
    assert "nothing was loaded, trained or written" in said
    assert [path.name for path in tmp_path.iterdir()] == ["bare"]


def test_train_holds_out_a_share_weighs_and_packs(trained, tiny_checkpoint, tmp_path, capsys):
    chat = trained / "chat.jsonl"
    run(
        "train", "--model", tiny_checkpoint, "--data", chat, f"{chat}=0.5", "--eval-share", 0.3, "--config", trained / "run.toml",
        "--output", tmp_path, "--set", "training.packing=true", "--set", "training.max_steps=-1",
    )  # fmt: skip
    said = capsys.readouterr().out
    held_out = int(re.search(r"12 conversations, (\d+) held out\n", said)[1])
    weighed = round(0.5 * (12 - held_out))
    assert f"12 conversations, {held_out} held out, {weighed} an epoch by the weight 0.5" in said
    assert "packing is on" in said
    assert "\n0 of them are trained on too" in said
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 1]  # all fit one row
    assert "eval_loss" in lines[2]


def test_train_says_how_much_of_the_evaluation_is_trained_on(trained, tiny_checkpoint, tmp_path, capsys):
    run(
        "train", "--model", tiny_checkpoint, "--data", trained / "chat.jsonl", "--eval-data", trained / "chat.jsonl",
        "--config", trained / "run.toml", "--output", tmp_path, "--set", "training.max_steps=1",
    )  # fmt: skip
    assert "\n12 of them are trained on too" in capsys.readouterr().out


def test_data_are_tokenised_by_the_first_command_and_read_back_by_those_that_follow(
    trained, tiny_checkpoint, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path / "cache"))
    chat, every = trained / "chat.jsonl", ["--set", "training.assistant_only_loss=false"]
    run("data", "stats", chat, "--model", tiny_checkpoint)
    assert "tokenised 12 conversations in " in capsys.readouterr().out
    settings = ["--data", chat, "--eval-data", chat, "--config", trained / "run.toml", "--output", tmp_path / "out"]
    for command in (
        ["data", "stats", chat, "--model", tiny_checkpoint, *every],
        ["data", "show", chat, "--model", tiny_checkpoint],
        ["train", "--model", tiny_checkpoint, *settings],
        ["train", "--model", tiny_checkpoint, *settings, "--resume"],
        ["eval", "--model", tiny_checkpoint, "--adapter", tmp_path / "out" / "adapter", "--data", chat],
    ):
        run(*command)
        said = capsys.readouterr().out
        assert f"tokens from cache {tmp_path / 'cache' / 'tokens'}" in said
        assert "tokenised 12" not in said
    adapter = "adapter/adapter_model.safetensors"
    assert (tmp_path / "out" / adapter).read_bytes() == (trained / "out" / adapter).read_bytes()


def test_loss_on_every_token_when_asked(trained, tiny_checkpoint, capsys):
    learnt = []
    for wanted in ("true", "false"):
        setting = f"training.assistant_only_loss={wanted}"
        run("data", "stats", trained / "chat.jsonl", "--model", tiny_checkpoint, "--set", setting)
        tokens, of_them = re.search(r"([\d,]+) tokens in all, ([\d,]+) of them learnt", capsys.readouterr().out).groups()
        learnt.append(tokens == of_them)
    assert learnt == [False, True]


def test_data_stats_counts_what_is_too_long_and_fails_for_none(trained, tiny_checkpoint, capsys):
    tokenizer = phi3.load_tokenizer(tiny_checkpoint)
    examples = lora.encode_conversations(lora.read_conversations(trained / "chat.jsonl"), tokenizer, 2048)
    limit = max(len(example.ids) for example in examples) - 1
    long = sum(len(example.ids) > limit for example in examples)
    run("data", "stats", trained / "chat.jsonl", "--model", tiny_checkpoint, "--set", f"training.max_seq_length={limit}")
    said = capsys.readouterr().out
    assert f"\n{long} longer than max_seq_length {limit}" in said
    assert f"{long} longer than {limit} left out, {12 - long} conversations stay" in said
    assert "packing is off" in said


def test_data_show_prints_the_batches_that_training_begins_with(trained, tiny_checkpoint, capsys):
    tokenizer = phi3.load_tokenizer(tiny_checkpoint)
    examples = lora.encode_conversations(lora.read_conversations(trained / "chat.jsonl"), tokenizer, 2048)
    batches = shuffled_batches(examples, 5, seed=3)
    settings = ["--set", "training.per_device_train_batch_size=5", "--set", "training.seed=3", "-n", 3]
    run("data", "show", trained / "chat.jsonl", "--model", tiny_checkpoint, *settings)
    said = capsys.readouterr().out.partition("\nbatch 1\n")[2]
    expected = [example for _ in range(3) for example in next(batches)]
    assert re.findall(r"What is \d+ and 1\?", said) == [
        re.search(r"What is \d+ and 1\?", tokenizer.decode(example.ids))[0] for example in expected
    ]
    assert said.count("<|im_end|>⟧") == len(expected) == 12
    run("data", "show", trained / "chat.jsonl", "--model", tiny_checkpoint, "--packing")
    assert capsys.readouterr().out.count("── document ") == 12


def test_eval_prints_what_the_library_finds(trained, tiny_checkpoint, capsys):
    model, tokenizer = phi3.load(tiny_checkpoint), phi3.load_tokenizer(tiny_checkpoint)
    lora.load_adapter(model, trained / "out" / "adapter")
    examples = lora.encode_conversations(lora.read_conversations(trained / "chat.jsonl"), tokenizer, 512)
    found = lora.evaluate(model, examples)
    run("eval", "--model", tiny_checkpoint, "--adapter", trained / "out" / "adapter", "--data", trained / "chat.jsonl")
    assert (
        f"loss {found.loss:.4f}, perplexity {found.perplexity:.2f}, over {found.tokens} target tokens" in capsys.readouterr().out
    )


def test_eval_measures_the_answers_by_the_metrics_named(trained, tiny_checkpoint, tmp_path, capsys):
    pytest.importorskip("rouge_score")
    model, tokenizer = phi3.load(tiny_checkpoint), phi3.load_tokenizer(tiny_checkpoint)
    ask = {"role": "user", "content": "What is 1 and 1?"}
    answer = phi3.generate(model, tokenizer, [ask], max_new_tokens=8)
    lines = [{"messages": [ask, {"role": "assistant", "content": text}]} for text in (answer, "something else")]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics = ["--metrics", "exact_match", "rougeL", "--max-new-tokens", 8]
    run("eval", "--model", tiny_checkpoint, "--data", tmp_path / "chat.jsonl", *metrics)
    said = capsys.readouterr().out
    assert "exact_match 0.5000, over the answers to 2 conversations" in said
    assert re.search(r"rougeL 0\.\d{4}, over", said)


def test_train_tells_the_metrics_of_the_answers(trained, tiny_checkpoint, tmp_path, capsys):
    chat, settings = trained / "chat.jsonl", ["training.eval_metrics=['exact_match']", "training.max_steps=1"]
    run(
        "train", "--model", tiny_checkpoint, "--data", chat, "--eval-data", chat, "--config", trained / "run.toml",
        "--output", tmp_path, *(f"--set={setting}" for setting in settings),
    )  # fmt: skip
    assert re.search(r"perplexity \d+\.\d\d, exact_match 0\.0000, at step 1\n", capsys.readouterr().out)


def test_report_writes_a_page_of_a_run_or_of_several(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run("report", trained / "out", "--output", "one.html")
    assert "wrote one.html" in capsys.readouterr().out
    assert Path("one.html").read_text() == (trained / "out" / "report.html").read_text()
    run("report", trained / "out", trained / "out")
    assert "wrote report.html" in capsys.readouterr().out
    assert Path("report.html").read_text().count("<th>out</th>") == 4  # figures and last answers; all settings are alike


def test_generate_prints_what_the_library_generates(trained, tiny_checkpoint, capsys):
    model, tokenizer = phi3.load(tiny_checkpoint), phi3.load_tokenizer(tiny_checkpoint)
    lora.load_adapter(model, trained / "out" / "adapter")
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "What is 2 and 1?"}]
    settings = {"max_new_tokens": 9, "temperature": 1.5, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 3}
    expected = "".join(phi3.stream(model, tokenizer, messages, **settings))
    options = [part for name, value in settings.items() for part in ("--" + name.replace("_", "-"), value)]
    adapter = trained / "out" / "adapter"
    run(
        "generate", "--model", tiny_checkpoint, "--adapter", adapter, "--system", "Add.", "--prompt", "What is 2 and 1?", *options
    )
    assert capsys.readouterr().out.endswith(f"\n{expected}\n")


@pytest.fixture
def chat(tiny_checkpoint, capsys, monkeypatch):
    """Types lines into a chat of short answers; returns what is printed after the opening, and what is said of faults."""

    def type_in(*lines, system=()) -> tuple[list[str], str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        capsys.readouterr()
        run("chat", "--model", tiny_checkpoint, "--max-new-tokens", 4, *system)
        said = capsys.readouterr()
        return said.out.partition("/exit or Ctrl-D ends it\n")[2], said.err

    return type_in


@pytest.fixture
def answers_to(tiny_checkpoint):
    """The answers to questions asked one after the other, with all that was said before."""
    model, tokenizer = phi3.load(tiny_checkpoint), phi3.load_tokenizer(tiny_checkpoint)

    def ask(*questions, system=None) -> list[str]:
        messages, answers = [{"role": "system", "content": system}] if system else [], []
        for question in questions:
            messages.append({"role": "user", "content": question})
            answers.append(phi3.generate(model, tokenizer, messages, max_new_tokens=4))
            messages.append({"role": "assistant", "content": answers[-1]})
        return answers

    return ask


def test_a_chat_remembers_what_was_said_and_ends_with_its_input(chat, answers_to):
    first, second = answers_to("one", "two")
    assert second != answers_to("two")[0]
    assert chat("one", "", "two") == (f"{first}\n{second}\n\n", "")


def test_exit_ends_a_chat(chat, answers_to):
    assert chat("one", "/exit", "two") == (f"{answers_to('one')[0]}\n", "")


def test_reset_forgets_all_but_the_system_message(chat, answers_to):
    first, second = answers_to("one", system="Count.") + answers_to("two", system="Count.")
    assert second != answers_to("two")[0]
    assert chat("one", "/reset", "two", system=["--system", "Count."])[0] == f"{first}\n{second}\n\n"


def test_a_question_that_passes_the_context_is_not_asked_and_the_chat_goes_on(chat, answers_to):
    long = "x" * 400  # the model's limit is 1024 tokens of one byte
    first, second, after = answers_to(long, long, "two")
    said, faults = chat(long, long, long, "two")
    assert said == f"{first}\n{second}\n{after}\n\n"
    assert re.fullmatch(
        r"minilora chat: not asked, the prompt of 1\d\d\d tokens and 4 new ones pass .*with /reset", faults.strip()
    )
    assert chat(long, long, long, "/reset", "two")[0] == f"{first}\n{second}\n{answers_to('two')[0]}\n\n"


def test_merge_writes_a_plain_checkpoint_that_answers_as_the_adapted_model(trained, tiny_checkpoint, tmp_path, capsys):
    run("merge", "--model", tiny_checkpoint, "--adapter", trained / "out" / "adapter", "--output", tmp_path / "merged")
    said = capsys.readouterr().out
    assert f"wrote {tmp_path / 'merged'}" in said
    assert f"{tiny_checkpoint} still holds the base, unchanged" in said
    merged, adapted = phi3.load(tmp_path / "merged"), lora.load_adapter(phi3.load(tiny_checkpoint), trained / "out" / "adapter")
    ids = torch.arange(40).view(2, 20)
    base = phi3.load(tiny_checkpoint)(ids)
    assert (merged(ids) - adapted(ids)).abs().max() < 1e-4 * (adapted(ids) - base).abs().max()
    assert phi3.load_tokenizer(tmp_path / "merged").encode("abc") == phi3.load_tokenizer(tiny_checkpoint).encode("abc")


def test_merge_saves_a_head_that_was_trained_apart_from_its_embedding(tiny_checkpoint, tmp_path, capsys):
    config = replace(phi3.load(tiny_checkpoint).config, tie_word_embeddings=True)

    def base():
        return tiny_model(config)

    phi3.save(base(), tmp_path / "base", tokenizer_from=tiny_checkpoint)
    settings = {"modules_to_save": ["lm_head"], "ensure_weight_tying": False}
    model = lora.inject(base(), lora.LoraConfig(r=2, target_modules=["o_proj"], **settings))
    torch.nn.init.normal_(model.lm_head.weight)
    lora.save_adapter(model, tmp_path / "adapter")
    run("merge", "--model", tmp_path / "base", "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged")
    assert "head and embedding are apart now, and are saved so" in capsys.readouterr().out
    ids = torch.arange(40).view(2, 20)
    assert (phi3.load(tmp_path / "merged")(ids) - model(ids)).abs().max() < 1e-5


@pytest.mark.parametrize("tying", [True, False])
def test_merge_keeps_a_tied_model_tied_and_unties_it_only_when_asked(tiny_checkpoint, tmp_path, capsys, tying):
    config = replace(phi3.load(tiny_checkpoint).config, tie_word_embeddings=True)
    phi3.save(tiny_model(config), tmp_path / "base", tokenizer_from=tiny_checkpoint)
    settings = {"r": 2, "target_modules": ["embed_tokens"], "ensure_weight_tying": tying}
    model = lora.inject(tiny_model(config), lora.LoraConfig(**settings))
    torch.nn.init.normal_(model.model.embed_tokens.lora_A)
    lora.save_adapter(model, tmp_path / "adapter")
    run("info", tmp_path / "adapter")
    assert ("what is tied shares one adapter" in capsys.readouterr().out) == tying
    argv = ["merge", "--model", tmp_path / "base", "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged"]
    if not tying:
        assert main([str(arg) for arg in argv]) == 2
        assert "ensure_weight_tying = True, or first give each module a weight of its own (minilora merge --untie)" in (
            capsys.readouterr().err
        )
        assert not (tmp_path / "merged").exists()
        argv.append("--untie")
    run(*argv)
    assert ("head and embedding are apart now" in capsys.readouterr().out) != tying
    merged, ids = phi3.load(tmp_path / "merged"), torch.arange(40).view(2, 20)
    assert merged.config.tie_word_embeddings == tying
    assert rms_error(merged(ids), model(ids)) < 1e-5
    assert rms_error(load_in_transformers(tmp_path / "merged")(ids).logits, model(ids)) < 1e-5
    assert rms_error(model(ids), tiny_model(config)(ids)) > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_measures_what_it_changed_on_the_given_weights(tiny_checkpoint, tmp_path, capsys, dtype):
    phi3.save(phi3.load(tiny_checkpoint, dtype), tmp_path / "base", tokenizer_from=tiny_checkpoint)
    model = lora.inject(phi3.load(tmp_path / "base"), lora.LoraConfig(r=2, lora_alpha=4, target_modules=["o_proj", "up_proj"]))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.1)
    lora.save_adapter(model, tmp_path / "adapter")
    run("merge", "--model", tmp_path / "base", "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged")
    said = capsys.readouterr().out
    ids = torch.tensor([phi3.load_tokenizer(tiny_checkpoint).encode(PROBE)])
    unmerged, merged = model(ids), phi3.load(tmp_path / "merged")(ids)
    base = phi3.load(tmp_path / "base")(ids)
    pattern = r"once to (\w+) .*\n.* of (\d+) tokens, .* off by (\S+) of their RMS, where the adapter itself moves them by (\S+)"
    found = re.search(pattern, said)
    assert found[1] == str(dtype).removeprefix("torch.")
    assert int(found[2]) == ids.numel()
    assert float(found[3]) == pytest.approx(rms_error(merged, unmerged), rel=0.1)
    assert float(found[4]) == pytest.approx(rms_error(unmerged, base), rel=0.1)
    assert 0 < float(found[3]) < 4 * torch.finfo(dtype).eps
    assert float(found[4]) > 0.01


def test_merge_refuses_a_folder_that_holds_files(trained, tiny_checkpoint, capsys):
    argv = ["merge", "--model", tiny_checkpoint, "--adapter", trained / "out" / "adapter", "--output", tiny_checkpoint]
    assert main([str(arg) for arg in argv]) == 2
    assert "must be new or empty" in capsys.readouterr().err


def test_info_tells_what_a_checkpoint_is_and_what_a_config_would_train(trained, tiny_checkpoint, capsys):
    run("info", tiny_checkpoint, "--config", trained / "run.toml")
    said = capsys.readouterr().out
    parameters = sum(parameter.numel() for parameter in phi3.load(tiny_checkpoint).parameters())
    model = lora.load_adapter(phi3.load(tiny_checkpoint), trained / "out" / "adapter")
    adapter = sum(tensor.numel() for tensor in lora.lora_state_dict(model).values())
    assert f"Phi-3 with {parameters:,} parameters" in said
    assert f"would train {adapter:,} parameters in 4 layers" in said


def test_info_tells_what_an_adapter_is(trained, capsys):
    run("info", trained / "out" / "adapter")
    said = capsys.readouterr().out
    assert "a LoRA adapter, r 4, alpha 8, dropout 0.0 on q_proj, v_proj, down_proj" in said
    fused = 2 * (8 * (32 + 64) + 4 * (48 + 32))  # q and v as one pair of rank 8 for qkv_proj; down_proj
    assert f"{fused:,} parameters for 4 layers" in said


def test_info_tells_the_base_and_the_norm_of_every_update(trained, tiny_checkpoint, capsys):
    run("info", trained / "out" / "adapter", "--model", tiny_checkpoint)
    said = capsys.readouterr().out
    assert f"made for {tiny_checkpoint}\n" in said
    model = lora.load_adapter(phi3.load(tiny_checkpoint), trained / "out" / "adapter")
    for path, module in model.named_modules():
        if isinstance(module, lora.Linear):
            line = next(line for line in said.splitlines() if line.split()[:1] == [path])
            assert line.split()[1:5] == ["rank", str(module.r * len(module.slices)), "scale", "2"]
            assert float(line.split()[-1]) == pytest.approx(float(module.delta().detach().norm()), rel=1e-3)
    assert f"it fits {tiny_checkpoint}" in said


def test_info_counts_magnitudes_and_names_modules_saved_whole(tmp_path, capsys):
    model = tiny_model(tiny_config())
    lora.inject(model, lora.LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=["lm_head"], use_dora=True))
    lora.save_adapter(model, tmp_path / "adapter")
    run("info", tmp_path / "adapter")
    said = capsys.readouterr().out.splitlines()
    assert "  and 2 vectors of magnitudes" in said
    assert "  and lm_head.weight (260, 32)" in said


def test_info_tells_all_misfits_of_a_base_at_once(trained, tmp_path, capsys):
    phi3.save(tiny_model(tiny_config(num_hidden_layers=1, intermediate_size=40)), tmp_path / "other")
    assert main(["info", str(trained / "out" / "adapter"), "--model", str(tmp_path / "other")]) == 2
    said = capsys.readouterr().err
    assert "does not fit" in said
    assert "model.layers.0.mlp.down_proj.lora_A.weight must have shape (4, 40), not (4, 48)" in said
    assert "model.layers.1.self_attn.qkv_proj.lora_A.weight is not part of the adapted model" in said


def test_variants_are_told(tiny_checkpoint, capsys):
    run("info", tiny_checkpoint, "--set", "peft.use_dora=true", "--set", 'peft.modules_to_save=["lm_head"]', "--set", "peft.r=4")
    assert "on all-linear, use_dora, trained whole: lm_head would train" in capsys.readouterr().out


def test_info_of_a_checkpoint_has_no_base(tiny_checkpoint, capsys):
    assert main(["info", str(tiny_checkpoint), "--model", str(tiny_checkpoint)]) == 2
    assert "--model is the base for an adapter" in capsys.readouterr().err


def test_export_writes_an_adapter_of_one_rank(trained, tiny_checkpoint, tmp_path, capsys):
    run("export", "--adapter", trained / "out" / "adapter", "--output", tmp_path / "vllm", "--for", "vllm")
    assert f"wrote {tmp_path / 'vllm'} for vllm: r 8, alpha 16" in capsys.readouterr().out
    ids = torch.arange(40).view(2, 20)
    models = [lora.load_adapter(phi3.load(tiny_checkpoint), path) for path in (tmp_path / "vllm", trained / "out" / "adapter")]
    assert (models[0](ids) - models[1](ids)).abs().max() < 1e-5
    argv = ["export", "--adapter", trained / "out" / "adapter", "--output", tmp_path / "vllm", "--for", "peft"]
    assert main([str(arg) for arg in argv]) == 2
    assert "must be new or empty" in capsys.readouterr().err


def test_adapters_take_the_models_dtype_when_asked(trained, tiny_checkpoint, tmp_path, capsys):
    argv = ["train", "--model", tiny_checkpoint, "--data", trained / "chat.jsonl", "--config", trained / "run.toml"]
    run(*argv, "--output", tmp_path / "a", "--dtype", "bfloat16", "--adapter-dtype", "model")
    assert "in bfloat16: " in capsys.readouterr().out
    run(*argv, "--output", tmp_path / "b", "--set", "training.bf16=true")
    said = capsys.readouterr().out
    assert "parameters in bfloat16 on cpu" in said
    assert f"bfloat16 weights, {arithmetic.describe(torch.bfloat16, torch.device('cpu'))}" in said
    assert "in float32: " in said


def test_two_runs_of_train_with_one_seed_end_bitwise_equal(trained, tiny_checkpoint, tmp_path):
    saved = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        argv = ["--model", tiny_checkpoint, "--data", trained / "chat.jsonl", "--config", trained / "run.toml"]
        run("train", *argv, "--output", tmp_path / name, "--set", f"training.seed={seed}", "--set", "peft.lora_dropout=0.1")
        saved.append((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes())
    assert saved[0] == saved[1] != saved[2]


# A 4-bit base


@pytest.fixture(scope="module")
def half(tmp_path_factory, tiny_checkpoint):
    """The checkpoint in bfloat16, and an adapter that was trained beside its 4-bit rounding."""
    folder = tmp_path_factory.mktemp("half")
    phi3.save(phi3.load(tiny_checkpoint, torch.bfloat16), folder / "base", tokenizer_from=tiny_checkpoint)
    torch.manual_seed(0)
    config = lora.LoraConfig(r=2, lora_alpha=4, target_modules=["o_proj", "up_proj"])
    model = lora.inject(phi3.load(folder / "base", quantize="nf4"), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.1)
    lora.save_adapter(model, folder / "adapter")
    return folder


def test_train_over_4_bits_says_which_weights_are_and_what_is_multiplied(trained, tiny_checkpoint, tmp_path, capsys):
    argv = ("train", "--model", tiny_checkpoint, "--data", trained / "chat.jsonl", "--config", trained / "run.toml")
    run(*argv, "--quantize", "nf4", "--output", tmp_path / "one")
    said = capsys.readouterr().out
    count = 2 * 32 * (64 + 32 + 96 + 48)
    assert f"4-bit base (NF4, double quantisation): {count:,} of the parameters, in 8 weights (qkv_proj, o_proj, " in said
    size = sum(
        part.nbytes
        for weight in phi3.quantized_weights(phi3.load(tiny_checkpoint, quantize="nf4")).values()
        for part in weight.parts
    )
    assert f"take {size:,} bytes; products in float32" in said
    run(*argv, "--set", "quantization.load_in_4bit=true", "--output", tmp_path / "two")
    files = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    assert files[0] != (trained / "out" / "adapter" / "adapter_model.safetensors").read_bytes()


def test_eval_and_generate_take_a_4_bit_base(half, trained, capsys):
    model, tokenizer = phi3.load(half / "base", torch.float32, quantize="nf4"), phi3.load_tokenizer(half / "base")
    lora.load_adapter(model, half / "adapter")
    examples = lora.encode_conversations(lora.read_conversations(trained / "chat.jsonl"), tokenizer, 512)
    argv = ("--model", half / "base", "--adapter", half / "adapter", "--quantize", "nf4")
    run("eval", *argv, "--data", trained / "chat.jsonl")
    assert f"loss {lora.evaluate(model, examples).loss:.4f}" in capsys.readouterr().out
    run("generate", *argv, "--prompt", "Hello", "--max-new-tokens", "5")
    answer = phi3.generate(model, tokenizer, [{"role": "user", "content": "Hello"}], max_new_tokens=5)
    assert answer in capsys.readouterr().out


def test_merge_over_4_bits_tells_the_error_of_both_choices(half, tmp_path, capsys):
    argv = ("merge", "--model", half / "base", "--adapter", half / "adapter")
    run(*argv, "--quantize", "nf4", "--output", tmp_path / "dequantised")
    said = capsys.readouterr().out
    run(*argv, "--output", tmp_path / "original")
    assert "4-bit" not in capsys.readouterr().out
    ids = torch.tensor([phi3.load_tokenizer(half / "base").encode(PROBE)])
    with torch.no_grad():
        unmerged = lora.load_adapter(phi3.load(half / "base", quantize="nf4"), half / "adapter")(ids)
        dequantised, original = (phi3.load(tmp_path / name) for name in ("dequantised", "original"))
        errors = [rms_error(model(ids), unmerged) for model in (dequantised, original)]
    assert "merged into the dequantised values of 8 4-bit weights, which the adapter was trained beside" in said
    found = [float(figure) for figure in re.findall(r"off by (\S+?)(?: |$)", said, flags=re.MULTILINE)]
    assert found == [pytest.approx(error, rel=0.1) for error in errors]
    assert errors[0] < 0.3 * errors[1]
    for model in (dequantised, original):
        assert not phi3.quantized_weights(model)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_checkpoint_that_is_4_bit_is_merged_into_its_dequantised_weights(half, tmp_path, capsys):
    phi3.save(phi3.load(half / "base", quantize="nf4"), tmp_path / "four", tokenizer_from=half / "base")
    run("info", tmp_path / "four")
    assert "its weights are 4-bit (NF4, double quantisation)" in capsys.readouterr().out
    run("merge", "--model", tmp_path / "four", "--adapter", half / "adapter", "--output", tmp_path / "merged")
    assert "to merge into the original weights instead, name their checkpoint with --model" in capsys.readouterr().out
    assert not phi3.quantized_weights(phi3.load(tmp_path / "merged"))


@pytest.mark.parametrize("iterations", [1, 2])
def test_train_by_loftq_reads_the_original_weights_and_keeps_a_base_that_it_changed(half, trained, tmp_path, capsys, iterations):
    run(
        "train", "--model", half / "base", "--data", trained / "chat.jsonl", "--config", trained / "run.toml",
        "--quantize", "nf4", "--set", "peft.init_lora_weights='loftq'", "--set", f"peft.loftq_config={{loftq_iter={iterations}}}",
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert ("wrote " + str(tmp_path / "out" / "base") in capsys.readouterr().out) == (iterations > 1)
    run("info", tmp_path / "out" / "adapter")
    said = capsys.readouterr().out
    assert "it started by LoftQ, and belongs to the 4-bit base" in said
    base = tmp_path / "out" / "base" if iterations > 1 else half / "base"
    assert f"made for {base}" in said
    argv = ["merge", "--model", str(base), "--adapter", str(tmp_path / "out" / "adapter"), "--output", str(tmp_path / "merged")]
    if iterations == 1:
        assert main(argv) == 2
        assert '"loftq" is for 4-bit weights' in capsys.readouterr().err
    run(*argv, "--quantize", "nf4")
    assert "merged into the dequantised values of 8 4-bit weights" in capsys.readouterr().out


def test_the_settings_of_the_qlora_notebook_run(tiny_checkpoint, trained, tmp_path, capsys):
    config = Path(__file__).parents[1] / "examples" / "qlora_finetune.toml"
    run(
        "train", "--model", tiny_checkpoint, "--data", trained / "chat.jsonl", "--config", config, "--output", tmp_path / "out",
        "--set", "training.max_steps=2",
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "4-bit base (NF4, double quantisation)" in said
    assert arithmetic.describe(torch.bfloat16, torch.device("cpu")) in said
    assert "r 16, alpha 16, dropout 0.05 on q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, in float32" in said
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 1
    settings = read_run_config(config)
    assert (settings.training.lr_scheduler_type, settings.training.warmup_ratio) == ("cosine", 0.2)
