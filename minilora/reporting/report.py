"""A run, or several side by side, as one page without script or any other file: figures, curves, answers over time, ΔW norms."""

from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment
from markupsafe import Markup

from minilora.files import write_file
from minilora.reporting.charts import Line, heat_map, line_chart
from minilora.reporting.runs import Run, by_module, differing

COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2")  # of the runs, over and over
SERIES = {  # keys of training lines, what their charts are called, and what one of the chart's units is
    "loss": ("loss, nats a token", 1),
    "learning_rate": ("learning rate", 1),
    "grad_norm": ("gradient norm, before it is cut", 1),
    "tokens_per_second": ("tokens a second", 1),
    "memory": ("peak memory, GB", 1e9),
}
TIMES, QUESTIONS = 5, 12  # of the answers: columns and rows on the page


@dataclass(frozen=True)
class Answers:
    """Questions with the answers of several models or moments; `wanted` where one answer is right."""

    title: str
    columns: list[str]
    rows: list[tuple[str, str | None, list[str]]]  # question, wanted, an answer for each column

    @property
    def told(self) -> bool:
        return any(wanted is not None for _, wanted, _ in self.rows)

    @property
    def headers(self) -> list[str]:
        return ["asked", *(["wanted"] if self.told else []), *self.columns]


@dataclass(frozen=True)
class Chart:
    """An SVG with what it is called and what its colours stand for."""

    title: str
    svg: Markup
    legend: list[tuple[str, str]] = field(default_factory=list)  # colour, name


@dataclass(frozen=True)
class Report:
    """All that the page shows."""

    title: str
    text: str
    figures: list[tuple[str, str]]  # what, value
    charts: list[Chart]
    maps: list[Chart]
    answers: list[Answers]
    tables: dict[str, dict[str, list[object]]]  # rows of cells by their names, by the title


def write_report(report: Report, path: Path) -> None:
    """Writes the page, which needs no other file."""
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE)
    write_file(path, page.render(report=report))


# What the runs' folders say


def report_run(run: Run) -> Report:
    """The page of one run."""
    settings = {name: [value] for name, value in run.settings.items()}
    figures = list(summary(run).items())
    return Report(f"minilora: {run.name}", "", figures, charts([run]), maps([run]), over_time(run), {"Settings": settings})


def compare_runs(runs: list[Run]) -> Report:
    """The page of several runs: each figure beside the others', settings where they differ, and the last answers."""
    summaries, names = [summary(run) for run in runs], [run.name for run in runs]
    figures = {what: [found.get(what, "—") for found in summaries] for what in dict.fromkeys(w for s in summaries for w in s)}
    tables, unlike = {"Runs": {"": names} | figures}, differing(runs)
    if unlike:
        tables["Settings that differ"] = {"": names} | unlike
    return Report(f"minilora: {', '.join(names)}", "", [], charts(runs), maps(runs), last_answers(runs), tables)


def summary(run: Run) -> dict[str, str]:
    """The figures that tell most, as a reader wants them."""
    training = [line for line in run.log if "loss" in line]
    found = {"steps": str(max((line["step"] for line in run.log), default=0))}
    if training:
        last = training[-1]
        found["loss in training"] = f"{training[0]['loss']:.3f} → {last['loss']:.3f}"
    for key in dict.fromkeys(key for line in run.evaluations for key in line if key.startswith("eval_")):
        values = [f"{value:.3f}" for _, value in run.points(key)]
        found[key.removeprefix("eval_") + " in evaluation"] = " → ".join(dict.fromkeys((values[0], values[-1])))
    if training and last.get("seconds"):
        found["tokens a second"] = f"{last['tokens'] / last['seconds']:,.0f}"
        found["training"] = f"{last['seconds']:,.0f} s"
    if training and last.get("memory"):
        found["peak memory"] = f"{last['memory'] / 1e9:.2f} GB"
    return found


def charts(runs: list[Run]) -> list[Chart]:
    """A chart of each figure in the logs: one run's training and evaluation, or a colour for each run."""
    several, made = len(runs) > 1, []
    metrics = dict.fromkeys(key for run in runs for line in run.evaluations for key in line if key.startswith("eval_"))
    series = SERIES | {key: (f"{key.removeprefix('eval_')} of the answers", 1) for key in metrics if key not in UNSHOWN}
    for key, (title, unit) in series.items():
        coloured = [(run, COLOURS[i % len(COLOURS)]) for i, run in enumerate(runs)]
        lines = [Line(run.name, scaled(run, key, unit), colour, key in metrics) for run, colour in coloured]
        legend = [(line.colour, line.name) for line in lines] if several else []
        if key == "loss" and "eval_loss" in metrics:
            beside = {} if several else {COLOURS[0]: COLOURS[1]}  # a run alone has a second colour to itself
            held_out = [(scaled(run, "eval_loss", unit), beside.get(colour, colour)) for run, colour in coloured]
            lines += [Line("evaluation", points, colour, dots=True) for points, colour in held_out]
            legend = legend or [(COLOURS[0], "training"), (COLOURS[1], "evaluation")]
            title += ", dots in evaluation" if several else ""
        if any(line.points for line in lines):
            made.append(Chart(title, Markup(line_chart(lines, title)), legend))
    return made


UNSHOWN = ("eval_loss", "eval_perplexity")  # the one beside the training loss, and its exponential


def scaled(run: Run, key: str, unit: float) -> list[tuple[int, float]]:
    return [(step, value / unit) for step, value in run.points(key)]


def maps(runs: list[Run]) -> list[Chart]:
    """The norm of every update by layer and module, all runs on one scale; what is in no numbered layer by its path."""
    most, made = max((norm for run in runs for norm in run.norms.values()), default=0.0), []
    for run in runs:
        if run.norms:
            rows, outside = by_module(run.norms)
            beside = "".join(f"; {path} {norm:.3g}" for path, norm in outside.items())
            least, largest = min(run.norms.values()), max(run.norms.values())
            title = f"{run.name}, {run.norms_of}: {least:.3g} to {largest:.3g}, the darkest blue is {most:.3g}{beside}"
            made.append(Chart(title, Markup(heat_map(rows, most)) if rows else Markup("")))
    return made


def over_time(run: Run) -> list[Answers]:
    """A run's answers at up to TIMES of its evaluations, the first and the last among them."""
    steps = list(run.answered)
    if not steps:
        return []
    shown = steps if len(steps) <= TIMES else [steps[round(i * (len(steps) - 1) / (TIMES - 1))] for i in range(TIMES)]
    columns = [f"step {step}" if step else "before" for step in shown]
    asked = zip(*(run.answered[step] for step in shown), strict=True)
    rows = [(first[0]["question"], first[0]["wanted"], [sample["answer"] for sample in first]) for first in asked]
    return [Answers("Answers over time", columns, rows[:QUESTIONS])]


def last_answers(runs: list[Run]) -> list[Answers]:
    """The last answers of all runs to the questions of any."""
    last = [list(run.answered.values())[-1] if run.answered else [] for run in runs]
    found = [{(sample["question"], sample["wanted"]): sample["answer"] for sample in samples} for samples in last]
    asked = dict.fromkeys(question for answers in found for question in answers)
    rows = [(question, wanted, [answers.get((question, wanted), "—") for answers in found]) for question, wanted in asked]
    return [Answers("Last answers", [run.name for run in runs], rows[:QUESTIONS])] if rows else []


PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ report.title }}</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; color: #1f2937; background: #f8fafc; }
  body { margin: 0 auto; max-width: 66rem; padding: 2rem 1rem; }
  h1 { margin: 0 0 .25rem; font-size: 1.6rem; overflow-wrap: anywhere; } h2 { margin: 2.5rem 0 .75rem; font-size: 1.15rem; }
  .grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); }
  .figures { display: flex; flex-wrap: wrap; gap: 1rem; margin-top: 1.5rem; }
  .card { background: #fff; border: 1px solid #e2e8f0; border-radius: .5rem; padding: .75rem 1rem; }
  .figures .card { flex: 1 1 9rem; }
  .card b { display: block; font-size: 1.25rem; white-space: nowrap; } .card span { color: #64748b; font-size: .85rem; }
  .card p { margin: 0 0 .5rem; font-size: .9rem; overflow-wrap: anywhere; }
  .card i { font-style: normal; margin-left: .75rem; color: #64748b; white-space: nowrap; }
  .card i::before { content: ""; display: inline-block; width: .7em; height: .7em; border-radius: 50%; }
  .card i::before { background: var(--colour); margin-right: .35em; }
  svg { display: block; max-width: 100%; font: 11px system-ui, sans-serif; } svg text { fill: #64748b; }
  .grid svg { width: 100%; } svg polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
  svg .grid { stroke: #e2e8f0; }
  .card + .card { margin-top: 0; } .maps .card { margin-bottom: 1rem; overflow-x: auto; } .maps svg { max-width: none; }
  .scroll { overflow-x: auto; }
  table { border-collapse: collapse; background: #fff; border: 1px solid #e2e8f0; font-size: .9rem; }
  th, td { text-align: left; vertical-align: top; padding: .4rem .75rem; border-top: 1px solid #e2e8f0; }
  th { background: #f1f5f9; font-weight: 600; } .answers { width: 100%; }
  .answers td { font-size: .85rem; min-width: 6.5rem; } td.answer { font: 13px/1.5 ui-monospace, monospace; }
  td.answer { white-space: pre-wrap; overflow-wrap: anywhere; } .right { background: #ecfdf5; }
  .plain td { overflow-wrap: anywhere; } .plain td:first-child { color: #64748b; white-space: nowrap; }
</style>
<h1>{{ report.title }}</h1>
{% if report.text %}
<p>{{ report.text }}</p>
{% endif %}
{% if report.figures %}
<div class="figures">
{% for what, value in report.figures %}
  <div class="card"><b>{{ value }}</b><span>{{ what }}</span></div>
{% endfor %}
</div>
{% endif %}
{% macro table(title, rows) %}
<h2>{{ title }}</h2>
<div class="scroll"><table class="plain">
{% for name, cells in rows.items() %}
{% set kind = "td" if name else "th" %}
<tr><{{ kind }}>{{ name }}</{{ kind }}>{% for cell in cells %}<{{ kind }}>{{ cell }}</{{ kind }}>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endmacro %}
{% if "Runs" in report.tables %}
{{ table("Runs", report.tables["Runs"]) }}
{% endif %}
<h2>Against the step</h2>
<div class="grid">
{% for chart in report.charts %}
<div class="card"><p>{{ chart.title }}
{% for colour, name in chart.legend %}
<i style="--colour: {{ colour }}">{{ name }}</i>
{% endfor %}</p>
{{ chart.svg }}</div>
{% endfor %}
</div>
{% for answers in report.answers %}
<h2>{{ answers.title }}</h2>
<div class="scroll"><table class="answers">
<tr>{% for column in answers.headers %}<th>{{ column }}</th>{% endfor %}</tr>
{% for question, wanted, found in answers.rows %}
<tr><td>{{ question }}</td>
{% if answers.told %}
<td class="answer">{{ wanted if wanted is not none }}</td>
{% endif %}
{% for answer in found %}
<td class="answer{% if answer == wanted %} right{% endif %}">{{ answer }}</td>
{% endfor %}</tr>
{% endfor %}
</table></div>
{% endfor %}
{% if report.maps %}
<h2>Norms of the updates ΔW, by layer and module</h2>
<div class="maps">
{% for map in report.maps %}
<div class="card"><p>{{ map.title }}</p>
{{ map.svg }}</div>
{% endfor %}
</div>
{% endif %}
{% for title, rows in report.tables.items() if title != "Runs" %}
{{ table(title, rows) }}
{% endfor %}
</html>
"""
