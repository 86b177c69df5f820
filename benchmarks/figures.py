"""The committed results as pictures, benchmarks/results/figures/NAME.svg: `python -m benchmarks figures` measures nothing."""

from benchmarks import protocol
from benchmarks.bars import Bars, bar_chart
from benchmarks.peers.tables import where

FOLDER = protocol.RESULTS / "figures"
TOKENS = 2048  # of the predicted step that is drawn


def main() -> None:
    """Writes every picture anew."""
    FOLDER.mkdir(exist_ok=True)
    for name, svg in figures().items():
        (FOLDER / name).write_text(svg, encoding="utf-8")
        print(f"wrote {FOLDER / name}")


def figures() -> dict[str, str]:
    """The pictures by the names of their files; a result that is not there has none."""
    there = {draw: result for draw, result in RESULT_OF.items() if (protocol.RESULTS / f"{result}.json").exists()}
    return {f"{draw.__name__}.svg": bar_chart(draw(protocol.read(result))) for draw, result in there.items()}


def layer_bytes(rows: list[dict]) -> Bars:
    """Of one training step of each layer, ours and eager PEFT's."""
    (row,), ways = rows, {"ours": "minilora", "eager_peft": "eager PEFT"}
    groups = {line["layer"]: {} for line in row["roofline"]}
    for way, name in ways.items():
        for line in row["roofline"]:
            dropout = f", dropout {line['dropout']}" if line["dropout"] else ""
            groups[line["layer"]][name + dropout] = line[f"{way} bytes / least"]
    return Bars(
        "Bytes that a training step of a LoRA layer of Phi-3-mini moves on a GPU",
        f"times the least ({row['tokens']:,} tokens, r {row['r']}, bfloat16); counted, not timed",
        groups,
        mark=(1, "the least"),
    )


def qlora_memory(rows: list[dict]) -> Bars:
    """Of loading and of a step at the true size, ours and that of transformers, PEFT and bitsandbytes."""
    written, *rows = rows
    groups = {}
    for row in rows:
        what = f"a LoRA step of {row['tokens']} tokens beside it" if row["measure"] == "train" else "loading it in 4 bits"
        groups.setdefault(what, {})[f"{row['side']}, {row['compute']}"] = row["peak_memory_bytes"] / 1e9
    return Bars(
        "Phi-3-mini at its true size as a 4-bit base, on a CPU",
        "GB of memory at the peak, Python and its libraries included",
        groups,
        written=".1f",
        mark=(written["weight_bytes"] / 1e9, "the 16-bit checkpoint"),
    )


def demo_answers(rows: list[dict]) -> Bars:
    """Exact ones, before and after."""
    (row,), sets = rows, {"unseen sentences": "", "new phrasings": "_new_phrasings"}
    groups = {name: {when: 100 * row[f"exact_{when}{of}"] for when in ("before", "after")} for name, of in sets.items()}
    return Bars(
        "minilora demo: answers that are exact, before and after", "% of the answers", groups, written=".0f", ours="after"
    )


def peers_time(rows: list[dict]) -> Bars:
    """Of a step, by each library in each case."""
    return Bars(
        "One LoRA training step on a CPU: wall time",
        "times the floor, which is the frozen products alone",
        peers(rows, "wall_over_floor", 1),
        mark=(1, "the floor"),
    )


def peers_memory(rows: list[dict]) -> Bars:
    """Of a step, by each library in each case."""
    axis = "GB that the first step adds to the loaded model"
    return Bars("One LoRA training step on a CPU: memory", axis, peers(rows, "bytes_of_step", 1e9))


def predicted_step(rows: list[dict]) -> Bars:
    """Of the whole model on each GPU, by each way beside each base."""
    groups = {}
    for row in rows:
        if (row["part"], row["tokens"]) == ("step", TOKENS):
            base = ", 4-bit base" if row["base"] == "nf4" else ""
            groups.setdefault(row["gpu"], {})[("minilora" if row["way"] == "ours" else row["way"]) + base] = row["ms"]
    title = f"A LoRA step of Phi-3-mini on {TOKENS:,} tokens: predicted, not measured"
    return Bars(title, "ms, from counted launches, bytes and products", groups, written=",.0f")


def peers(rows: list[dict], key: str, unit: float) -> dict[str, dict[str, float | None]]:
    """The cases that are not there to show growth; a library that failed has no value."""
    groups = {}
    for row in rows:
        if "model" in row and not row["model"].endswith("layers"):
            groups.setdefault(where(row), {})[row["library"]] = row[key] / unit if key in row else None
    return groups


RESULT_OF = {
    layer_bytes: "static",
    qlora_memory: "qlora_true_size",
    demo_answers: "demo",
    peers_time: "peers",
    peers_memory: "peers",
    predicted_step: "predicted",
}
