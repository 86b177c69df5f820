"""The page: everything in one file, everything escaped, nothing left out."""

import re

import pytest

from minilora.report import Answers, Report, draw_loss, write_report

LOG = [{"step": step, "loss": 3 / step, "learning_rate": 1e-3 / step} for step in range(1, 6)]
PNG = b"\x89PNG\r\n"


@pytest.fixture
def report() -> Report:
    return Report(
        title="a run",
        text="what it was",
        figures=[("loss", "2.0", "1.0"), ("seconds", "", "12")],
        log=[*LOG, {"step": 5, "eval_loss": 0.7}],
        answers=[Answers("Commands", [("asked <b>", "before & co", '{"a": 1}', '{"a": 1}'), ("two", "wrong", "worse", "right")])],
        settings={"r": 8},
        versions={"torch": "x.y"},
    )


def test_the_page_needs_no_other_file_and_runs_no_script(report, tmp_path):
    write_report(report, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert "<script" not in page
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)


def test_the_page_shows_every_figure_answer_setting_and_version(report, tmp_path):
    write_report(report, tmp_path)
    page = (tmp_path / "report.html").read_text()
    for text in ("a run", "what it was", "2.0 → 1.0", ">12<", "Commands", "worse", "<td>r</td><td>8</td>", "x.y"):
        assert text in page


def test_answers_of_a_model_are_escaped(report, tmp_path):
    write_report(report, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "asked &lt;b&gt;" in page
    assert "before &amp; co" in page


def test_answers_are_marked_right_only_where_they_are_the_wanted_one(report, tmp_path):
    write_report(report, tmp_path)
    cells = re.findall(r'<td class="answer (right|wrong)">([^<]*)</td>', (tmp_path / "report.html").read_text())
    assert [mark for mark, _ in cells] == ["wrong", "right", "wrong", "wrong"]


def test_a_log_without_evaluations_is_drawn_too():
    assert draw_loss(LOG).startswith(PNG)


def test_another_log_is_another_picture():
    assert draw_loss(LOG) != draw_loss(LOG[:3])
