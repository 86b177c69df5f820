"""A run as a page to look at: figures before and after, the loss curve, answers side by side, settings and versions."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment

from minilora.files import write_file


@dataclass(frozen=True)
class Answers:
    """Questions with the answers before and after; `wanted` where one answer is right."""

    title: str
    rows: list[tuple[str, str, str, str | None]]  # question, before, after, wanted


@dataclass(frozen=True)
class Report:
    """All that the page shows."""

    title: str
    text: str
    figures: list[tuple[str, str, str]]  # what, before, after
    log: list[dict]  # lines of log.jsonl
    answers: list[Answers]
    settings: dict[str, object]
    versions: dict[str, str]


def draw_loss(log: list[dict]) -> bytes:
    """The losses of log.jsonl against the step, and the learning rate below, as a PNG.

    Raises:
        ValueError: the package matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the loss curve is drawn with the package matplotlib: pip install 'minilora[demo]'") from None
    training = [line for line in log if "loss" in line]
    evaluation = [line for line in log if "eval_loss" in line]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    loss.plot([line["step"] for line in training], [line["loss"] for line in training], color="#2563eb", label="training")
    if evaluation:
        steps = [line["step"] for line in evaluation]
        loss.plot(steps, [line["eval_loss"] for line in evaluation], "o", color="#d97706", label="evaluation")
    loss.set_ylabel("loss (nats a token)")
    loss.set_ylim(bottom=0)
    loss.legend()
    rate.plot([line["step"] for line in training], [line["learning_rate"] for line in training], color="#6b7280")
    rate.set_ylabel("learning rate")
    rate.set_xlabel("step")
    for axes in (loss, rate):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    return png.getvalue()


def write_report(report: Report, folder: Path) -> None:
    """Writes report.html, which needs no other file, and loss.png."""
    png = draw_loss(report.log)
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE)
    write_file(folder / "loss.png", png)
    write_file(folder / "report.html", page.render(report=report, png=base64.b64encode(png).decode()))


PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ report.title }}</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; color: #1f2937; background: #f8fafc; }
  body { margin: 0 auto; max-width: 62rem; padding: 2rem 1rem; }
  h1 { margin: 0 0 .25rem; } h2 { margin: 2.5rem 0 .75rem; font-size: 1.15rem; }
  .figures { display: flex; flex-wrap: wrap; gap: 1rem; margin-top: 1.5rem; }
  .figure { background: #fff; border: 1px solid #e2e8f0; border-radius: .5rem; padding: .75rem 1.25rem; flex: 1 1 12rem; }
  .figure b { display: block; font-size: 1.5rem; white-space: nowrap; } .figure span { color: #64748b; }
  img { max-width: 100%; background: #fff; border: 1px solid #e2e8f0; border-radius: .5rem; }
  .scroll { overflow-x: auto; }
  table { border-collapse: collapse; width: 100%; background: #fff; border: 1px solid #e2e8f0; }
  th, td { text-align: left; vertical-align: top; padding: .4rem .75rem; border-top: 1px solid #e2e8f0; }
  th { background: #f1f5f9; font-weight: 600; } td.answer { font: 13px/1.5 ui-monospace, monospace; overflow-wrap: anywhere; }
  td.answer { width: 38%; white-space: pre-wrap; } .right { background: #ecfdf5; } .wrong { background: #fef2f2; }
  table.plain { width: auto; } table.plain td:first-child { color: #64748b; }
</style>
<h1>{{ report.title }}</h1>
<p>{{ report.text }}</p>
<div class="figures">
{% for what, before, after in report.figures %}
  <div class="figure"><b>{% if before %}{{ before }} → {% endif %}{{ after }}</b><span>{{ what }}</span></div>
{% endfor %}
</div>
<h2>Loss</h2>
<img src="data:image/png;base64,{{ png }}" alt="loss and learning rate against the step" width="800">
{% for answers in report.answers %}
<h2>{{ answers.title }}</h2>
<div class="scroll"><table>
<tr><th>asked</th><th>before</th><th>after</th></tr>
{% for question, before, after, wanted in answers.rows %}
<tr><td>{{ question }}</td>
{% for answer in (before, after) %}
<td class="answer{% if wanted is not none %} {{ 'right' if answer == wanted else 'wrong' }}{% endif %}">{{ answer }}</td>
{% endfor %}</tr>
{% endfor %}
</table></div>
{% endfor %}
{% for title, entries in (("Settings", report.settings), ("Versions", report.versions)) %}
<h2>{{ title }}</h2>
<table class="plain">
{% for name, value in entries.items() %}
<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}
</table>
{% endfor %}
</html>
"""
