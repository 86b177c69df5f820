"""Figures of a run as SVG, which a page holds without any other file: lines against the step, and a map of layers and modules."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

WIDTH, HEIGHT = 480, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 18, 10, 22  # margins, for the ticks
POINTS = 400  # of a line at most: about one a pixel
CELL = 22  # of a map
BLUE = "37, 99, 235"


@dataclass(frozen=True)
class Line:
    """One curve; the points that are not finite are left out."""

    name: str
    points: list[tuple[float, float]]  # step, value
    colour: str
    dots: bool = False  # a few measurements, each marked


def line_chart(lines: Sequence[Line], unit: str) -> str:
    """The lines over their steps; both axes begin at 0."""
    drawn = [(line, thinned([point for point in line.points if math.isfinite(point[1])])) for line in lines]
    points = [point for _, kept in drawn for point in kept] or [(0, 0)]
    last, top = (max(values) for values in zip(*points, strict=True))
    across, up = ticks(last), ticks(top)

    def place(x: float, y: float) -> tuple[float, float]:
        right, above = x / (last or 1) * (WIDTH - LEFT - RIGHT), y / up[-1] * (HEIGHT - TOP - BOTTOM)
        return round(LEFT + right, 1), round(HEIGHT - BOTTOM - above, 1)

    parts = []
    for value in up:
        _, y = place(0, value)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{short(value)}</text>')
    for value in [value for value in across if value <= last]:
        x, _ = place(value, 0)
        parts.append(f'<text x="{x}" y="{HEIGHT - 6}" text-anchor="middle">{short(value)}</text>')
    for line, kept in drawn:
        parts += _curve(line, [place(*point) for point in kept])
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label={quoteattr(unit)}>{"".join(parts)}</svg>'


def _curve(line: Line, places: list[tuple[float, float]]) -> list[str]:
    path = " ".join(f"{x},{y}" for x, y in places)
    dashes = "4 3" if line.dots else "none"
    parts = [f'<polyline points="{path}" stroke="{line.colour}" stroke-dasharray="{dashes}"/>']
    marked = line.dots or len(places) == 1
    return parts + [f'<circle cx="{x}" cy="{y}" r="3" fill="{line.colour}"/>' for x, y in places if marked]


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS points: the lowest and the highest of each of POINTS / 2 stretches, so that no spike is lost."""
    if len(points) <= POINTS:
        return points
    size = math.ceil(len(points) / (POINTS // 2))
    stretches = [points[start : start + size] for start in range(0, len(points), size)]
    by_value = [(min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])) for stretch in stretches]
    return [point for pair in by_value for point in sorted(set(pair))]


def ticks(most: float) -> list[float]:
    """Round numbers from 0 on, 1, 2 or 5 times a power of ten apart, about five of them; the last is the first not below most."""
    wide = (most if most > 0 else 1) / 5
    power = 10.0 ** math.floor(math.log10(wide))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= wide * (1 - 1e-9))
    return [number * step for number in range(math.ceil(5 * wide / step - 1e-9) + 1)]


def short(value: float) -> str:
    """A number in few letters: 12k, 0.5, 2e-5."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.4g}{letter}"
    if 0 < abs(value) < 1e-2:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    return f"{value:.4g}"


def heat_map(rows: dict[str, dict[int, float]], most: float) -> str:
    """A square for each row and column that has a value, the darker the larger, with the value where the pointer rests.

    Args:
        rows: values by row and column.
        most: the value of the darkest.
    """
    columns = sorted({column for row in rows.values() for column in row})
    left = 12 + 7 * max(map(len, rows), default=0)
    width, height = left + CELL * len(columns) + 10, CELL * len(rows) + 20
    parts = []
    for i, (name, row) in enumerate(rows.items()):
        parts.append(f'<text x="{left - 8}" y="{CELL * i + 15}" text-anchor="end">{escape(name)}</text>')
        for column, value in row.items():
            x, shade = left + CELL * columns.index(column), 0.06 + 0.94 * (value / most if most else 0)
            square = f'x="{x}" y="{CELL * i}" width="{CELL - 1}" height="{CELL - 1}" fill="rgba({BLUE}, {shade:.3f})"'
            parts.append(f"<rect {square}><title>{escape(name)}, layer {column}: {value:.4g}</title></rect>")
    apart = 1 if len(columns) <= 40 else 5
    for i, column in enumerate(columns[::apart]):
        parts.append(f'<text x="{left + CELL * (apart * i + 0.5)}" y="{height - 6}" text-anchor="middle">{column}</text>')
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="norms">{"".join(parts)}</svg>'
