"""The page: everything in one file, everything escaped, nothing left out, and laid out as a browser shows it."""

import re
import shutil
import subprocess
from dataclasses import replace

import pytest

from minilora.reporting.report import TIMES, Answers, compare_runs, report_run, summary, write_report
from minilora.reporting.runs import Run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def samples(right: bool) -> list[dict]:
    return [
        {"question": "Where <b>?", "wanted": "Under & over", "answer": "Under & over" if right else "no idea"},
        {"question": "Two?", "wanted": "2", "answer": "a long answer " * 20},
    ]


def make_run(name: str = "first", r: int = 8) -> Run:
    log = [{"step": 0, "samples": samples(False)}]
    for step in range(1, 81):
        figures = {"loss": r / step, "learning_rate": 1e-4, "grad_norm": 0.5, "tokens_per_second": 2e3, "memory": 8 * 10**9}
        log.append({"step": step, **figures, "tokens": 1000 * step, "seconds": step / 2})
        if step % 10 == 0:
            evaluation = {"eval_loss": 1 + r / step, "eval_perplexity": 9.0, "eval_exact_match": step / 80}
            log.append({"step": step, **evaluation, "samples": samples(step > 40)})
    norms = {f"model.layers.{i}.{module}": i + r / 10 for i in range(32) for module in ("self_attn.qkv_proj", "mlp.down_proj")}
    return Run(name, log, {"r": r, "seed": 0}, norms | {"lm_head": 0.5}, "adapter")


def page_of(report, tmp_path) -> str:
    write_report(report, tmp_path / "report.html")
    return (tmp_path / "report.html").read_text()


def test_the_page_needs_no_other_file_and_runs_no_script(tmp_path):
    for report in (report_run(make_run()), compare_runs([make_run(), make_run("second", 4)])):
        page = page_of(report, tmp_path)
        assert re.findall(r"(?:src|href|url)\W", page) == []
        assert "http" not in page
        assert "<script" not in page


def test_the_page_shows_every_figure_chart_answer_and_setting(tmp_path):
    page = page_of(report_run(make_run()), tmp_path)
    titles = ["loss, nats a token", "learning rate", "gradient norm", "tokens a second", "peak memory, GB", "exact_match of"]
    for text in (*titles, "minilora: first", "<td>r</td><td>8</td>", "lm_head 0.5", "mlp.down_proj, layer 31: 31.8"):
        assert text in page
    assert page.count("<svg") == len(titles) + 1
    assert page.count("<rect") == 64


def test_the_summary_tells_beginning_and_end():
    found = summary(make_run())
    assert found["steps"] == "80"
    assert found["loss in training"] == "8.000 → 0.100"
    assert found["loss in evaluation"] == "1.800 → 1.100"
    assert found["exact_match in evaluation"] == "0.125 → 1.000"
    assert found["perplexity in evaluation"] == "9.000"
    assert (found["tokens a second"], found["training"], found["peak memory"]) == ("2,000", "40 s", "8.00 GB")


def test_answers_over_time_begin_before_training_and_end_with_it():
    (answers,) = report_run(make_run()).answers
    assert answers.columns == ["before", "step 20", "step 40", "step 60", "step 80"]
    assert len(answers.columns) == TIMES
    question, wanted, found = answers.rows[0]
    assert (question, wanted) == ("Where <b>?", "Under & over")
    assert found == ["no idea"] * 3 + ["Under & over"] * 2


def test_only_right_answers_are_marked_and_all_are_escaped(tmp_path):
    page = page_of(report_run(make_run()), tmp_path)
    assert "Where &lt;b&gt;?" in page
    assert re.findall(r'<td class="answer right">([^<]*)</td>', page) == ["Under &amp; over"] * 2
    report = replace(report_run(make_run()), answers=[Answers("free", ["after"], [("asked", None, ["None"])])])
    page = page_of(report, tmp_path)
    assert "right" not in page.partition("<h2>free")[2].partition("</table>")[0]
    assert "<th>wanted</th>" not in page


def test_runs_are_compared_by_figures_settings_and_last_answers(tmp_path):
    other = make_run("second", 4)
    other.log[-1]["samples"].pop()
    report = compare_runs([make_run(), other])
    assert report.tables["Settings that differ"] == {"": ["first", "second"], "r": [8, 4]}
    assert report.tables["Runs"]["loss in training"] == ["8.000 → 0.100", "4.000 → 0.050"]
    assert report.answers[0].rows[1][2] == ["a long answer " * 20, "—"]
    page = page_of(report, tmp_path)
    loss = page.partition("loss, nats a token")[2].partition("</svg>")[0]
    assert loss.count("<polyline") == 4  # training and evaluation of each
    assert page.count("<rect") == 128


def test_a_run_that_has_hardly_begun_is_shown_too(tmp_path):
    page = page_of(report_run(Run("new", [{"step": 1, "loss": 2.0, "learning_rate": 0.0, "memory": None}], {}, {})), tmp_path)
    assert page.count("<svg") == 2
    assert "minilora: new" in page_of(report_run(Run("new", [], {}, {})), tmp_path)


MEASURE = """
<script>
const charts = [...document.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect());
const cut = [...document.querySelectorAll("svg text")].filter(text => {
  const inner = text.getBoundingClientRect(), outer = text.closest("svg").getBoundingClientRect();
  return inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.bottom > outer.bottom + 1;
});
document.title = JSON.stringify({
  charts: charts.length,
  small: charts.filter(box => box.width < 200 || box.height < 50).length,
  cut: cut.map(text => text.textContent),
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
});
</script>
"""


@pytest.mark.skipif(not BROWSER, reason="no chromium or google-chrome on this machine")
@pytest.mark.parametrize("width", [500, 1200])
@pytest.mark.parametrize("several", [False, True])
def test_a_browser_shows_every_chart_whole_and_scrolls_in_one_direction(tmp_path, width, several):
    report = compare_runs([make_run(), make_run("second", 4)]) if several else report_run(make_run())
    (tmp_path / "measured.html").write_text(page_of(report, tmp_path) + MEASURE)
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},900", "--dump-dom", (tmp_path / "measured.html").as_uri(),
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    charts = 8 if several else 7
    assert f'<title>{{"charts":{charts},"small":0,"cut":[],"overflow":0}}</title>' in shown, re.findall("<title>.*", shown)[:1]
