"""Every number in the prose is a committed result's, or one that was never measured.

A passage (a paragraph, with the table or picture after it) names its results, by a link into benchmarks/results or by
`python -m benchmarks NAME`; its numbers must stand there, rounded as they are written. All others are in NOT_MEASURED.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from killed_runs import ACCESSES, MOMENTS

import minilora as lora
from benchmarks import bench_family, bench_lines, bench_parity, bench_parts, bench_plan, bench_predicted, protocol
from benchmarks.bench_qlora import TARGETS
from benchmarks.bench_true_size import PHI_3_MINI
from benchmarks.peers.environments import LIBRARIES
from benchmarks.peers.tables import tables
from minilora import phi3
from minilora.data.token_cache import LIMIT
from minilora.kernels.cross_entropy import chunk_rows
from minilora.training import planning
from minilora.training.fingerprint import ELEMENTS

ROOT = Path(__file__).parents[1]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "examples/README.md")}
README = " ".join(TEXTS["README.md"].split())
COMMITTED = {file.stem: protocol.read(file.stem) for file in sorted(protocol.RESULTS.glob("*.json"))}
NUMBER = re.compile(r"(?<![\w.,/])(?<![A-Za-z]-)(\d+(?:,\d{3})*(?:\.\d+)?)(?!\d|[.,]\d|-[A-Za-z])(?:\s?(GB|MB|%|seconds))?")
UNITS = {"GB": ("bytes", 1e-9), "MB": ("bytes", 1e-6), "%": ("", 100), "seconds": ("seconds", 1), "": ("", 1)}  # in a key; scale


def levers() -> list[str]:
    """The table of what lowers the memory of QLoRA, planned for Phi-3-mini."""
    with torch.device("meta"):
        model = phi3.Phi3ForCausalLM(PHI_3_MINI).to(torch.bfloat16)
        lora.inject(model, lora.LoraConfig(r=16, target_modules=TARGETS), torch.float32)
    lora.mark_only_lora_as_trainable(model)
    N = 2048
    plain, checkpointed = (
        planning.memory(model, planning.Batch(1, N, N), lora.TrainConfig(gradient_checkpointing=wanted), "cuda", "nf4")
        for wanted in (False, True)
    )
    weights = planning.memory(model, planning.Batch(1, N, N), lora.TrainConfig(), "cuda").weights
    V = PHI_3_MINI.vocab_size  # logits of a row: in float32 beside their gradient, or in bfloat16 and then overwritten with it
    rows = {
        "4-bit base | weights": (weights, plain.weights),
        "activation checkpointing | activations": (plain.activations, checkpointed.activations),
        "head and loss in chunks, always | logits and their gradient": (N * V * 2 * 4, chunk_rows(N, "cuda") * V * 2),
        "8-bit AdamW, not offered | moments of the adapter": (plain.moments, plain.moments / 4),
    }
    return [f"| {start} | {before / 1e9:.2f} GB | {after / 1e9:.2f} GB |" for start, (before, after) in rows.items()]


NOT_MEASURED = {  # why, and the words around the number as they are written
    "computed here": ["planned for bfloat16, r 16 and one row of 2,048 tokens", *levers()],
    "what the code says": [
        f"at {MOMENTS + ACCESSES} moments",
        f"about {ELEMENTS:,} elements",
        f"({lora.TrainConfig().eval_samples}; 0 for none)",
        "are 0, never on the way, unless set",
        f"take more than {LIMIT >> 30} GiB",
    ],
    "an example": [
        "a checkpoint every 100 steps",
        "eight processes with 1 each end as one with 8",
        "A weight of 0.3 takes three tenths",
        "the same in every epoch; 2 takes each twice",
    ],
    "a name": ["SmolLM2-135M-Instruct", "their 128k contexts", "Rank 0 alone", "4 bits make it smaller", "restores the 4 bits"],
    "of other libraries": ["torchrun leaves them 30 seconds", "since transformers 4.41", "but for kernels of 1", "with r = 0"],
}


def passages(text: str) -> list[str]:
    """The text without its code blocks, each passage in one line."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [" ".join(passage.split()) for passage in re.split(r"\n\n+(?![|!])", prose)]


def numbers(node: object, key: str = "") -> Iterator[tuple[str, float]]:
    """All numbers of a result, with their keys."""
    match node:
        case dict():
            for name, child in node.items():
                yield from numbers(child, name)
        case list():
            for child in node:
                yield from numbers(child, key)
        case int() | float():
            yield key, node


def unheld(passage: str) -> list[str]:
    """The numbers of a passage that stand neither in a result that it names nor in NOT_MEASURED."""
    named = {link or command for link, command in re.findall(r"benchmarks/results/(\w+)|python -m benchmarks (\w+)", passage)}
    known = [pair for name in named & COMMITTED.keys() for pair in numbers(COMMITTED[name])]
    for phrase in (phrase for phrases in NOT_MEASURED.values() for phrase in phrases):
        passage = passage.replace(phrase, "")
    prose = re.sub(r"`[^`]*`|\]\([^)]*\)", "", passage)

    def stands(written: str, unit: str) -> bool:
        (kind, scale), decimals = UNITS[unit], len(written.partition(".")[2])
        return any(f"{value * scale:,.{decimals}f}" == written for key, value in known if kind in key)

    return [f"{written} {unit}".strip() for written, unit in NUMBER.findall(prose) if not stands(written, unit)]


@pytest.mark.parametrize("name", TEXTS)
def test_every_number_stands_in_a_committed_result_or_was_never_measured(name):
    found = {passage: unheld(passage) for passage in passages(TEXTS[name])}
    assert not {passage: missing for passage, missing in found.items() if missing}


def test_what_was_never_measured_is_still_written():
    prose = " ".join(passage for text in TEXTS.values() for passage in passages(text))
    assert not [phrase for phrases in NOT_MEASURED.values() for phrase in phrases if phrase not in prose]


def test_the_transcript_of_the_demo_is_of_the_committed_run():
    """Shortened, and its lines broken otherwise."""
    (transcript,) = re.findall(r"```\n(\$ minilora demo.*?)```", TEXTS["README.md"], flags=re.DOTALL)
    command, *lines = transcript.splitlines()
    told = " ".join((protocol.RESULTS / "demo.txt").read_text(encoding="utf-8").split())
    assert command == "$ minilora demo"
    assert not [line for line in lines if " ".join(line.split()) not in told]


def test_the_figures_of_the_demo_are_those_of_the_committed_result():
    (row,) = COMMITTED["demo"]
    assert f"That run took {row['seconds_process']:.0f} seconds on two CPU cores" in README
    assert f"and {row['peak_memory_bytes'] / 1e9:.1f} GB of memory" in README
    assert f"On unseen sentences {row['exact_before']:.0%} of the answers were exact before" in README
    assert (
        f"and {row['exact_after']:.0%} after; on phrasings that it was never trained on, {row['exact_after_new_phrasings']:.0%}."
        in README
    )


def test_the_figures_of_the_true_size_are_those_of_the_committed_result():
    write, load, _, train = COMMITTED["true_size"]
    assert (
        f"{write['parameters']:,} parameters in bfloat16, loads with a peak of {load['peak_memory_bytes'] / 1e9:.1f} GB" in README
    )
    assert f"a LoRA step of {train['tokens']} tokens on a CPU takes {train['peak_memory_bytes'] / 1e9:.1f} GB" in README
    assert load["peak_over_weights"] < 1.1


def test_the_figures_of_the_4_bit_base_are_those_of_the_committed_result():
    write, *memory = COMMITTED["qlora_true_size"]
    load, step, their_load, their_step = (f"{row['peak_memory_bytes'] / 1e9:.1f} GB" for row in memory)
    assert [row["measure"] for row in memory] == ["load", "train"] * 2
    assert f"checkpoint of {write['weight_bytes'] / 1e9:.1f} GB loads so with a peak of {load}, and a LoRA step" in README
    assert f"of {memory[1]['tokens']} tokens on a CPU takes {step}; with" in README
    assert f"it is {their_load} and {their_step}" in README
    assert memory[0]["peak_memory_bytes"] < 3.2e9


def test_the_figures_of_what_4_bits_lose_are_those_of_the_committed_result():
    rows = {part: [row for row in COMMITTED["qlora"] if row["part"] == part] for part in ("products", "quality")}
    for row, base in zip(rows["quality"], ("16-bit", "4-bit", "4-bit, adapter started by LoftQ"), strict=True):
        found = f"{row['perplexity_at_the_start']:.1f} | {row['eval_loss_after']:.3f} | {row['exact_after']:.0%} |"
        assert f"| {base} | {found}" in README
        assert row["exact_after"] >= 0.9
    forward, dX = ([row[way] for row in rows["products"]] for way in ("forward", "dX"))
    assert f"a product of {rows['products'][0]['rows']} rows with a 4-bit weight takes {min(forward):.2f} to" in README
    assert f"to {max(forward):.2f} times the one in float32, and its gradient {min(dX):.2f} to {max(dX):.2f} " in README
    assert max(forward) <= 1.10


def test_the_drift_of_bfloat16_is_that_of_the_committed_result():
    last = {row["way"]: row for row in COMMITTED["drift"] if "adapter_distance" in row}
    exact, base = last["float32"], last["bfloat16 base"]
    assert f"After {exact['step']} steps of the demo's task the loss on unseen sentences was {exact['eval_loss']:.4f}" in README
    assert (
        f"in float32 and {base['eval_loss']:.4f} with a bfloat16 base, exact answers {exact['eval_exact_match']:.0%} and"
        in README
    )
    assert f"and {base['eval_exact_match']:.0%}" in README
    assert f"with all in bfloat16 the loss was {last['bfloat16 base and adapter']['eval_loss']:.4f}" in README
    assert f"the updates were apart by {base['adapter_distance']:.0%} of their norm" in README


def test_the_bytes_of_a_layer_are_those_of_the_committed_result():
    (row,) = COMMITTED["static"]
    ours, theirs = ([line[f"{way} bytes / least"] for line in row["roofline"]] for way in ("ours", "eager_peft"))
    assert f"one training step of a layer moves ({row['tokens']:,} tokens, r {row['r']}, bfloat16)" in README
    assert f"{min(ours):.2f} to {max(ours):.2f} times the least that could be moved" in README
    assert f"by eager PEFT {min(theirs):.2f} to {max(theirs):.2f} times" in README


def test_the_table_of_other_libraries_is_that_of_the_committed_comparison():
    rows = {(row["library"], row["model"], row["tokens"], row["dropout"]): row for row in COMMITTED["peers"] if row["r"] == 16}
    libraries = dict.fromkeys(library for library, *_ in rows)
    assert list(libraries) == [library.name for library in LIBRARIES.values()]
    for library in libraries:
        over = [f"{rows[library, model, 256, p]['wall_over_floor']:.2f}" for model in ("small", "slice") for p in (0.0, 0.05)]
        memory = [f"{rows[library, model, 256, 0.0]['bytes_of_step'] / 1e6:,.0f} MB" for model in ("small", "slice")]
        first = rows[library, "small", 256, 0.0]
        cells = [*over, *memory, f"{first['seconds_to_first_step']:.1f}", first["distributions"]]
        cells.append(f"{first['bytes_installed'] / 1e6:,.0f} MB")
        assert f"| {library} | {' | '.join(map(str, cells))} |" in README
    ours = next(iter(libraries))
    smallest = [rows[library, "4 layers", 64, 0.0]["wall_seconds"] for library in (ours, "loralib layers")]
    assert "takes {:.3f} s here and {:.3f} s with loralib layers".format(*smallest) in README
    for (library, *case), row in rows.items():  # what README says of them, and only of these models
        if row["model"] in ("small", "slice") and library != ours:
            assert row["wall_seconds"] > rows[ours, *case]["wall_seconds"]
            assert row["bytes_of_step"] > rows[ours, *case]["bytes_of_step"]


def test_the_parts_of_a_step_are_those_of_the_committed_result():
    small, two = (row["over_floor"] for row in COMMITTED["parts"] if row["tokens"] == 256)
    for part, words in (
        ("attention", "attention takes {} of it and"),
        ("adapter's products", "the adapter's products {},"),
        ("norms, rotation, SwiGLU", "norms, rotation and SwiGLU take {} and"),
        ("step, bfloat16 base", "a step takes {} and"),
        ("step", "of the floor for {} and"),
    ):
        assert words.format(f"{small[part]:.2f}") in README
    found = [f"{two[part]:.2f}" for part in ("attention", "adapter's products", "norms, rotation, SwiGLU", "step, bfloat16 base")]
    assert "of the two layers {} and {}; norms, rotation and SwiGLU take".format(*found[:2]) in README
    assert f"and {found[2]} ([figures]" in README
    assert f"and {found[3]} of the floor for" in README
    assert f"and {two['step']:.2f} in float32" in README
    assert all(row["step, bfloat16 base"] < 1.15 * row["step"] for row in (small, two))


def test_the_figures_of_the_compiled_step_are_those_of_the_committed_result():
    rows = COMMITTED["compiled"]
    small, two = (row for row in rows if not row["dropout"])
    ratios, seconds = (
        [f"{row['compiled_over_eager']:.2f}" for row in (small, two)],
        [f"{row['seconds_first']:.0f}" for row in (small, two)],
    )
    assert "compiled by Inductor a step takes {} and {} of the plain one's time, after".format(*ratios) in README
    assert "after {} and {} seconds of compiling".format(*seconds) in README
    assert min(row["compiled_over_eager"] for row in rows) > 1  # on a CPU that gains nothing
    assert max(row["error"] for row in rows) < 1e-6


def test_the_predicted_table_is_that_of_the_committed_prediction():
    rows = COMMITTED["predicted"]
    found = {(row["tokens"], row["way"], row["base"]): row for row in rows if (row["gpu"], row["part"]) == ("H100", "step")}
    for tokens in (512, 2048, 8192):
        columns = ("ours", "bfloat16"), ("ours", "nf4"), ("Unsloth", "bfloat16")
        ratios = " | ".join(f"{found[tokens, *column]['over_peft']:.2f}" for column in columns)
        assert f"| {tokens:,} | {ratios} |" in README
        assert found[tokens, "transformers + PEFT, SDPA", "bfloat16"]["over_peft"] == 1


TABLES = {
    "family": bench_family.table,
    "lines": bench_lines.table,
    "parity": bench_parity.table,
    "parts": bench_parts.table,
    "peers": tables,
    "plan": bench_plan.table,
    "predicted": bench_predicted.report,
}


@pytest.mark.parametrize("file", sorted(protocol.RESULTS.glob("*.md")), ids=lambda file: file.name)
def test_every_committed_table_is_that_of_its_result(file):
    assert file.read_text(encoding="utf-8") == TABLES[file.stem](COMMITTED[file.stem])


def test_every_cell_of_the_table_of_the_family_is_green():
    lines = (ROOT / "benchmarks" / "results" / "family.md").read_text().splitlines()
    cells = [cell.strip() for line in lines if line.startswith("| phi-") for cell in line.strip("|").split("|")[1:]]
    assert len(cells) == 8 * 6
    assert all(cell.startswith("✓") for cell in cells)
