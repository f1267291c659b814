"""A heat map as inline SVG: one rectangle per cell, darker is more, with its number in it.

Not for what is drawn (questions.py). Colours and fonts come from the page's CSS, as in charts.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from markupsafe import Markup

from apps.eval.report.charts import WIDTH, Axes

_TOP, _BOTTOM, _ROW = 6, 46, 40
_LEFT, _LETTER = 76, 8.5  # of the first column: at least; for each letter of the longest name
_GAP = 2


class Cell(NamedTuple):
    """value: 0 to 1, how dark. text: what stands in the cell. tip: all that is known of it."""

    value: float
    text: str
    tip: str


def heat_map(
    axes: Axes, rows: Sequence[str], columns: Sequence[str], cells: Mapping[tuple[int, int], Cell], colour: int
) -> Markup:
    """Cells by (row, column), from the top left. A place without a cell stays empty.

    The description of `axes` is followed by every cell's tip, so that the text says what the picture shows.
    """
    left = max(_LEFT, 30 + _LETTER * max(map(len, rows), default=0))
    width = (WIDTH - left) / len(columns)
    bottom = _TOP + _ROW * len(rows)
    parts: list[str] = []
    for (row, column), cell in sorted(cells.items()):
        x, y = left + column * width, float(_TOP + row * _ROW)
        shade = 0.08 + 0.62 * min(1.0, max(0.0, cell.value))
        parts.append(
            f'<g><title>{escape(cell.tip)}</title><rect class="share c{colour}" fill-opacity="{shade:.3f}" '
            f'x="{x:.1f}" y="{y:.1f}" width="{width - _GAP:.1f}" height="{_ROW - _GAP}" rx="4"></rect>'
            f'<text class="name" x="{x + width / 2:.1f}" y="{y + _ROW / 2 + 5:.1f}" text-anchor="middle">'
            f"{escape(cell.text)}</text></g>"
        )
    for number, name in enumerate(rows):
        y = _TOP + (number + 0.5) * _ROW + 5
        parts.append(f'<text class="tick" x="{left - 7:.1f}" y="{y:.1f}" text-anchor="end">{escape(name)}</text>')
    for number, name in enumerate(columns):
        x = left + (number + 0.5) * width
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{escape(name)}</text>')
    middle = (left + WIDTH) / 2
    parts.append(
        f'<text class="name" x="{middle}" y="{bottom + 38}" text-anchor="middle">{escape(axes.x_label)}</text>'
    )
    parts.append(
        f'<text class="name" transform="translate(13 {(_TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(axes.y_label)}</text>"
    )
    spoken = escape("; ".join([axes.description, *(cells[place].tip for place in sorted(cells))]))
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {bottom + _BOTTOM}" role="img" aria-label="{spoken}">{"".join(parts)}</svg>'
    )
