"""The rows of `python -m benchmarks peers` as tables in Markdown."""

from benchmarks.protocol import markdown


def tables(rows: list[dict]) -> str:
    """Steps, whether all compute the same, growth, environments, and what failed; a part without rows is left out."""
    done, failed = [row for row in rows if "failed" not in row], [row for row in rows if "failed" in row]
    growing = [row for row in done if row["model"].endswith("layers")]
    single = [row for row in done if row not in growing]
    compared = [row for row in rows if "gradient_error" in row]
    parts = [
        ("One step: medians over the rounds; memory is what the first step adds to the loaded model", steps, single),
        ("What all compute: error of the loss and RMS errors of the gradients, relative to minilora's", same, compared),
        ("How a step grows: wall seconds (times the floor)", growth, growing),
        ("Environments, each made for its library alone", environments, single),
        ("What failed", failures, failed),
    ]
    return "\n".join(f"{title}\n\n{part(chosen)}" for title, part, chosen in parts if chosen)


def where(row: dict) -> str:
    """The case of a row."""
    dropout = f", dropout {row['dropout']}" if row["dropout"] else ""
    return f"{row['model']}, {row['batch']} × {row['tokens']}, r {row['r']}{dropout}, {row['threads']} threads"


def steps(rows: list[dict]) -> str:
    return markdown(
        ["case", "library", "wall s", "CPU s", "wall / floor", "CPU / floor", "wall / minilora", "memory MB", "start to step s"],
        [
            [
                where(row), row["library"], f"{row['wall_seconds']:.3f}", f"{row['cpu_seconds']:.3f}",
                f"{row['wall_over_floor']:.2f}", f"{row['cpu_over_floor']:.2f}", _ratio(row),
                f"{row['bytes_of_step'] / 1e6:.0f}", row.get("seconds_to_first_step", ""),
            ]
            for row in rows
        ],
    )  # fmt: skip


def _ratio(row: dict) -> str:
    return f"{row['wall_over_ours']:.2f}" if "wall_over_ours" in row else "–"


def same(rows: list[dict]) -> str:
    names = list(rows[0]["gradient_errors"])
    return markdown(
        ["case", "library", "loss", "loss error", *names],
        [
            [where(row), row["library"], f"{row['loss']:.6f}", f"{row['loss_error']:.0e}"]
            + [f"{row['gradient_errors'][name]:.0e}" for name in names]
            for row in rows
        ],
    )


def growth(rows: list[dict]) -> str:
    """A row for each case, a column for each library."""
    cells = {where(row): {} for row in rows}
    for row in rows:
        cells[where(row)][row["library"]] = f"{row['wall_seconds']:.3f} ({row['wall_over_floor']:.2f})"
    libraries = list(dict.fromkeys(row["library"] for row in rows))
    return markdown(["case", *libraries], [[case, *(of.get(name, "–") for name in libraries)] for case, of in cells.items()])


def environments(rows: list[dict]) -> str:
    """A row for each library; of the times to import, the least CPU time, which is that with the files read already."""
    imports = {row["library"]: [] for row in rows}
    for row in rows:
        imports[row["library"]] += [row["seconds_import"]["cpu"]] if "seconds_import" in row else []
    return markdown(
        ["library", "versions", "distributions", "MB", "import, CPU s"],
        [
            [
                library, ", ".join(f"{name} {version}" for name, version in row["versions"].items()),
                row["distributions"], f"{row['bytes_installed'] / 1e6:.0f}", min(imports[library], default="–"),
            ]
            for library, row in {row["library"]: row for row in rows}.items()
        ],
    )  # fmt: skip


def failures(rows: list[dict]) -> str:
    return markdown(
        ["library", "case", "why"], [[row["library"], where(row) if "model" in row else "all", row["failed"]] for row in rows]
    )
