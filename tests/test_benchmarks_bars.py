"""Bars are as long as their values, told in figures and names, and the file needs nothing but itself."""

from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.bars import BLUE, GREY, LEFT, RIGHT, WIDTH, Bars, bar_chart
from minilora.reporting.charts import ticks

SVG = "{http://www.w3.org/2000/svg}"
ROOM = WIDTH - LEFT - RIGHT


def drawn(bars: Bars) -> list[ElementTree.Element]:
    """The bars of a chart, whose first rectangle is the panel."""
    panel, *found = ElementTree.fromstring(bar_chart(bars)).iter(f"{SVG}rect")
    assert panel.get("fill") == "#ffffff"
    return found


def texts(bars: Bars) -> list[str]:
    return [text.text for text in ElementTree.fromstring(bar_chart(bars)).iter(f"{SVG}text")]


@given(st.dictionaries(st.sampled_from("abcdef"), st.floats(0, 1e12), min_size=1), st.floats(0.001, 1e12))
def test_a_bar_is_as_long_as_its_value(group, mark):
    widths = [float(bar.get("width")) for bar in drawn(Bars("title", "unit", {"group": group}, mark=(mark, "so far")))]
    end = ticks(max(*group.values(), mark))[-1]
    assert widths == pytest.approx([value / end * ROOM for value in group.values()], abs=0.06)


def test_the_axis_reaches_just_over_the_longest_bar_and_the_mark():
    group = {"group": {"minilora": 4.0, "other": 2.0}}
    assert [float(bar.get("width")) for bar in drawn(Bars("title", "unit", group))] == [ROOM, ROOM / 2]
    marked = drawn(Bars("title", "unit", group, mark=(10, "far")))
    assert float(marked[0].get("width")) == pytest.approx(0.4 * ROOM)


def test_title_axis_headings_names_and_values_are_told():
    groups = {"one <&>": {"minilora": 1.25, "other": None}, "two": {"minilora": 3.0}}
    found = texts(Bars("a title", "seconds", groups, written=".1f", mark=(1, "the floor")))
    assert set(found) >= {"a title", "seconds", "one <&>", "two", "minilora", "other", "1.2", "3.0", "failed", "the floor"}


def test_ours_are_blue_and_what_failed_has_no_length():
    first, second, third = drawn(Bars("title", "unit", {"group": {"minilora, r 4": 1.0, "peft": 1.0, "litgpt": None}}))
    assert [first.get("fill"), second.get("fill"), third.get("fill")] == [BLUE, GREY, GREY]
    assert float(third.get("width")) == 0


def test_no_two_texts_stand_in_one_place():
    root = ElementTree.fromstring(bar_chart(Bars("title", "unit", {"a": {"x": 1.0, "y": 2.0}, "b": {"x": 3.0}}, mark=(2, "m"))))
    places = [(text.get("x"), text.get("y")) for text in root.iter(f"{SVG}text")]
    assert len(set(places)) == len(places)
    assert all(0 < float(y) < float(root.get("height")) for _, y in places)


def test_the_file_is_one_without_scripts_or_other_files():
    svg = bar_chart(Bars("title", "unit", {"group": {"minilora": 1.0}}))
    assert svg.startswith('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ')
    assert svg.count("http") == 1
    assert not {"script", "style", "foreignObject", "image"} & {
        e.tag.removeprefix(SVG) for e in ElementTree.fromstring(svg).iter()
    }
