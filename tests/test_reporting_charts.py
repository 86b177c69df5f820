"""The figures hold what they are given: every point in its place, every spike, every number of a map."""

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.reporting.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    POINTS,
    RIGHT,
    TOP,
    WIDTH,
    Line,
    heat_map,
    line_chart,
    short,
    thinned,
    ticks,
)


def drawn(svg: str) -> list[list[tuple[float, float]]]:
    """The points of each line of a chart."""
    lines = ElementTree.fromstring(svg).iter("polyline")
    return [[tuple(map(float, pair.split(","))) for pair in line.get("points").split()] for line in lines]


def test_points_lie_where_their_step_and_value_say():
    (points,) = drawn(line_chart([Line("a", [(0, 0.0), (5, 4.0), (10, 1.0)], "red")], "loss"))
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    above = (HEIGHT - TOP - BOTTOM) / 4  # the axis ends at 4
    assert points == [(LEFT, HEIGHT - BOTTOM), (middle, TOP), (WIDTH - RIGHT, pytest.approx(HEIGHT - BOTTOM - above, abs=0.1))]


steps = st.lists(st.tuples(st.integers(0, 10**6), st.floats(0, 1e12)), min_size=1, max_size=30)


@given(steps)
def test_whatever_is_drawn_lies_within_the_axes(points):
    (found,) = drawn(line_chart([Line("a", sorted(points), "red")], "loss"))
    assert all(LEFT <= x <= WIDTH - RIGHT and TOP - 0.1 <= y <= HEIGHT - BOTTOM for x, y in found)


def test_no_number_stands_beyond_the_last_step():
    svg = ElementTree.fromstring(line_chart([Line("a", [(1, 0.0), (75, 1.0)], "red")], "loss"))
    below = [text for text in svg.iter("text") if text.get("text-anchor") == "middle"]
    assert [text.text for text in below] == ["0", "20", "40", "60"]
    assert all(LEFT <= float(text.get("x")) < WIDTH - RIGHT for text in below)


def test_what_is_not_finite_is_left_out():
    points = [(1, math.nan), (2, 1.0), (3, math.inf), (4, 2.0)]
    assert line_chart([Line("a", points, "red")], "loss") == line_chart([Line("a", points[1::2], "red")], "loss")
    assert drawn(line_chart([Line("a", points[:1], "red")], "loss")) == [[]]


def test_a_few_measurements_are_marked_and_a_point_alone_too():
    assert line_chart([Line("a", [(1, 1.0), (2, 1.0)], "red")], "loss").count("<circle") == 0
    assert line_chart([Line("a", [(1, 1.0), (2, 1.0)], "red", dots=True)], "loss").count("<circle") == 2
    assert line_chart([Line("a", [(1, 1.0)], "red")], "loss").count("<circle") == 1


@given(st.integers(1, 5000), st.integers(0, 4999))
def test_thinning_keeps_every_spike_and_the_order(count, spike):
    points = [(step, 1.0 + step % 7 / 10) for step in range(count)]
    points[spike % count] = (spike % count, 99.0)
    found = thinned(points)
    assert len(found) <= POINTS
    assert points[spike % count] in found
    assert found == sorted(found)
    assert set(found) <= set(points)


@given(st.floats(1e-9, 1e12))
def test_ticks_are_few_round_and_reach_over_the_most(most):
    found = ticks(most)
    assert found[0] == 0
    assert found[-2] < most <= found[-1] * (1 + 1e-9)
    assert 3 <= len(found) <= 7
    assert re.match(r"[125]\.0+e", f"{found[1]:.6e}")


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.25, "0.25"), (8e-5, "8e-5"), (1.5e-4, "1.5e-4"), (2500, "2500"), (12000, "12k"), (3e6, "3M")]
)
def test_numbers_are_short(value, text):
    assert short(value) == text


def test_a_map_has_a_square_for_each_value_the_darker_the_larger():
    svg = heat_map({"mlp.down_proj": {0: 1.0, 2: 4.0}, "a<b": {2: 0.0}}, 4.0)
    squares = list(ElementTree.fromstring(svg).iter("rect"))
    told = ["mlp.down_proj, layer 0: 1", "mlp.down_proj, layer 2: 4", "a<b, layer 2: 0"]
    assert [square.find("title").text for square in squares] == told
    shades = [float(square.get("fill").rpartition(", ")[2][:-1]) for square in squares]
    assert shades[2] < shades[0] < shades[1] == 1
    assert squares[1].get("x") == squares[2].get("x") != squares[0].get("x")
