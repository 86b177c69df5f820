"""Bars in groups as an SVG file of its own, on a white panel that a page shows alike in its light and its dark theme."""

from dataclasses import dataclass
from xml.sax.saxutils import escape

from minilora.reporting.charts import short, ticks

WIDTH, LEFT, RIGHT = 760, 290, 56  # names stand on the left, the last value on the right
ROW, TOP, BOTTOM = 18, 36, 44  # a row's height; room for the title, and for the ticks and the axis
DARK, GREY, PALE = "#1f2328", "#8c959f", "#d8dee4"
BLUE = "#2563eb"


@dataclass(frozen=True)
class Bars:
    """What is drawn: a heading for each group, below it a bar for each name, and each value at the end of its bar."""

    title: str
    axis: str  # quantity and unit
    groups: dict[str, dict[str, float | None]]  # None where there is no value
    written: str = ".2f"  # how the values are, as in format()
    ours: str = "minilora"  # the bars whose names begin so are blue, and the others grey
    mark: tuple[float, str] | None = None  # a dashed line to compare with, and its name


def bar_chart(bars: Bars) -> str:
    """The whole file, the same bytes for the same bars; the axis begins at 0."""
    rows = sum(1 + len(group) for group in bars.groups.values())
    height, bottom = TOP + ROW * (rows + 1) + BOTTOM, TOP + ROW * (rows + 1)
    values = [value for group in bars.groups.values() for value in group.values() if value is not None]
    across = ticks(max([bars.mark[0] if bars.mark else 0, *values]))

    def right(value: float) -> float:
        return round(LEFT + value / across[-1] * (WIDTH - LEFT - RIGHT), 1)

    parts = [_text(16, 24, bars.title, "bold"), _text(LEFT, height - 10, bars.axis)]
    for value in across:
        parts += [_upright(right(value), bottom, PALE), _text(right(value), bottom + 16, short(value), anchor="middle")]
    if bars.mark:
        parts += [_upright(right(bars.mark[0]), bottom, DARK, "4 3"), _text(right(bars.mark[0]) + 5, TOP + 12, bars.mark[1])]
    y = TOP + ROW
    for heading, group in bars.groups.items():
        parts.append(_text(16, y + 13, heading, "bold"))
        y += ROW
        for name, value in group.items():
            end, told = (LEFT, "failed") if value is None else (right(value), format(value, bars.written))
            colour = BLUE if name.startswith(bars.ours) else GREY
            parts.append(f'<rect x="{LEFT}" y="{y + 2}" width="{end - LEFT:g}" height="{ROW - 4}" fill="{colour}"/>')
            parts += [_text(LEFT - 8, y + 13, name, anchor="end"), _text(end + 5, y + 13, told)]
            y += ROW
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
            f'role="img" font-family="system-ui, sans-serif" font-size="12" fill="{DARK}">',
            f"<title>{escape(bars.title)}</title>",
            f'<rect width="{WIDTH}" height="{height}" rx="6" fill="#ffffff"/>',
            *parts,
            "</svg>\n",
        ]
    )


def _text(x: float, y: float, text: str, weight: str = "normal", anchor: str = "start") -> str:
    halo = 'stroke="#ffffff" stroke-width="4" paint-order="stroke"'  # the grid keeps clear of the letters
    return f'<text x="{x:g}" y="{y:g}" font-weight="{weight}" text-anchor="{anchor}" {halo}>{escape(text)}</text>'


def _upright(x: float, bottom: float, colour: str, dashes: str = "none") -> str:
    return f'<line x1="{x:g}" x2="{x:g}" y1="{TOP}" y2="{bottom}" stroke="{colour}" stroke-dasharray="{dashes}"/>'
