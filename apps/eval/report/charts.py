"""Charts as inline SVG: lines with bands, categories with error bars, and a bar of shares.

Colours and fonts come from the page's CSS variables, so that one drawing serves light and dark. Not for what is
drawn (figures.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Literal, NamedTuple

from markupsafe import Markup

WIDTH, HEIGHT = 520, 290
LEFT, RIGHT, TOP, BOTTOM = 84, 14, 12, 46
POINTS_DRAWN = 500  # more than pixels: thinner curves look the same and keep the file small
LARGEST, SMALLEST = 1e300, 1e-300  # widths beyond these are not numbers any more


class Series(NamedTuple):
    """A curve. style: faint is for raw samples under a smoothed line. low, high: an interval per point."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: int
    style: Literal["line", "faint", "points"] = "line"
    low: Sequence[float] = ()
    high: Sequence[float] = ()


class Level(NamedTuple):
    """A dashed horizontal line."""

    label: str
    value: float
    colour: int


class Axes(NamedTuple):
    """x_names: categories at x = 0, 1, 2, ... instead of a numeric axis. x_log: base 2."""

    x_label: str
    y_label: str
    description: str
    x_names: Sequence[str] = ()
    x_log: bool = False
    from_zero: bool = False


class _Scale(NamedTuple):
    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def line_chart(axes: Axes, series: Sequence[Series], levels: Sequence[Level] = ()) -> Markup:
    """The chart with a legend above it when there is more than one thing to name; a note where none can be drawn."""
    why_not = _obstacle(axes, series, levels)
    if why_not is not None:
        return not_drawn(why_not)
    series = [thinned(s) for s in series]
    to_x: Callable[[float], float] = math.log2 if axes.x_log else float
    xs = [to_x(x) for s in series for x in s.xs]
    ys = [y for s in series for y in (*s.ys, *s.low, *s.high)] + [level.value for level in levels]
    x_scale = _x_scale(axes, xs)
    y_ticks = nice_ticks(0.0 if axes.from_zero else min(ys), max(ys), 5)
    y_scale = _Scale(min(y_ticks[0], *ys), max(y_ticks[-1], *ys), HEIGHT - BOTTOM, TOP)
    parts = _frame(axes, x_scale, y_scale, y_ticks)
    for level in levels:
        y = y_scale(level.value)
        parts.append(
            f'<line class="level c{level.colour}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
    for s in series:
        parts += _curve(s, [x_scale(to_x(x)) for x in s.xs], y_scale)
    legend = _legend(series, levels) if len(series) + len(levels) > 1 else ""
    return Markup(
        f'{legend}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(axes.description)}">'
        f"{''.join(parts)}</svg>"
    )


def not_drawn(why: str) -> Markup:
    """What stands where a chart would."""
    return Markup(f'<p class="none">Not drawn: {escape(why)}.</p>')


def _obstacle(axes: Axes, series: Sequence[Series], levels: Sequence[Level]) -> str | None:
    """Why there can be no chart of this."""
    if not any(s.xs for s in series):
        return "there is no point"
    furthest = max(max(map(abs, row)) for s in series for row in (s.xs, s.ys, s.low, s.high) if row)
    furthest = max(furthest, *(abs(level.value) for level in levels), 0)
    if furthest > LARGEST:
        return f"a value is beyond {LARGEST:g}"
    if axes.x_log and min(x for s in series for x in s.xs) <= 0:
        return f"{axes.x_label}: a logarithmic axis has no place for 0 or less"
    return None


def thinned(series: Series) -> Series:
    """At most POINTS_DRAWN points of a curve: the lowest and the highest of each stretch, so that no spike is lost.

    Marked points, which may carry intervals, all stay.
    """
    count = len(series.xs)
    if series.style == "points" or count <= POINTS_DRAWN:
        return series
    edges = [count * i // (POINTS_DRAWN // 2 - 1) for i in range(POINTS_DRAWN // 2)]
    kept = {0, count - 1}
    for start, end in itertools.pairwise(edges):
        stretch = range(start, end)
        kept |= {min(stretch, key=series.ys.__getitem__), max(stretch, key=series.ys.__getitem__)}
    order = sorted(kept)
    return series._replace(xs=[series.xs[i] for i in order], ys=[series.ys[i] for i in order])


def drawn_stretch(count: int) -> int:
    """How many of `count` points, about, are drawn as two; 1 where each is drawn (see `thinned`)."""
    return 1 if count <= POINTS_DRAWN else round(count / (POINTS_DRAWN // 2 - 1))


class Share(NamedTuple):
    """A part of a whole; text says its size in words."""

    label: str
    value: float
    text: str
    colour: int


def share_bar(shares: Sequence[Share], description: str) -> Markup:
    """One horizontal bar cut into shares, with a legend that states each; a note where there is nothing to share."""
    total = sum(share.value for share in shares)
    if not 0 < total <= LARGEST:
        return not_drawn(f"shares of {total:g}")
    start = 0.0
    parts: list[str] = []
    for share in shares:
        width = share.value / total * WIDTH
        tip = escape(f"{share.label}: {share.text}")
        parts.append(
            f'<rect class="share c{share.colour}" x="{start:.1f}" y="0" width="{max(0.0, width - 1.5):.1f}" '
            f'height="34" rx="3"><title>{tip}</title></rect>'
        )
        start += width
    legend = "".join(
        f'<span><i class="c{share.colour}"></i>{escape(share.label)} <b>{escape(share.text)}</b></span>'
        for share in shares
    )
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} 34" role="img" aria-label="{escape(description)}">{"".join(parts)}</svg>'
        f'<div class="legend">{legend}</div>'
    )


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round values (1, 2, 2.5, 5 times a power of ten) that cover [low, high]."""
    if high - low < SMALLEST:
        margin = abs(low) * 0.1 if abs(low) > SMALLEST * 10 else 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def number(value: float) -> str:
    """A tick label: 0.002, 1.5, 12k, 3.4M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if abs(value) >= size:
            return f"{value / min(size, 1e3 if unit == 'k' else size):.4g}{unit}"
    return f"{value:.4g}"


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean over the `window` values that end at each one (fewer at the beginning), rounded once.

    A float is a whole number of some power of two, and whole numbers add and take away exactly: a sum of floats would
    forget small values for good once a large one has passed through the window.
    """
    ratios = [value.as_integer_ratio() for value in values]
    unit = max((below for _, below in ratios), default=1)
    whole = [above * (unit // below) for above, below in ratios]
    means, total = [], 0
    for place, value in enumerate(whole):
        total += value - (whole[place - window] if place >= window else 0)
        means.append(total / (unit * min(place + 1, window)))
    return means


def _x_scale(axes: Axes, xs: Sequence[float]) -> _Scale:
    low, high = min(xs), max(xs)
    if axes.x_names:
        low, high = -0.5, len(axes.x_names) - 0.5
    elif axes.x_log:
        low, high = low - 0.2, high + 0.2
    elif high <= low:
        low, high = low - 0.5, high + 0.5
    return _Scale(low, high, LEFT, WIDTH - RIGHT)


def _x_ticks(axes: Axes, scale: _Scale) -> list[tuple[float, str]]:
    if axes.x_names:
        return [(float(index), name) for index, name in enumerate(axes.x_names)]
    if axes.x_log:
        powers = range(math.ceil(scale.low), math.floor(scale.high) + 1)
        return [(float(p), f"{2**p // 1024}k" if p >= 10 else str(2**p)) for p in powers]
    ticks = nice_ticks(scale.low, scale.high, 6)
    return [(tick, number(tick)) for tick in ticks if scale.low <= tick <= scale.high]


def _frame(axes: Axes, x_scale: _Scale, y_scale: _Scale, y_ticks: Sequence[float]) -> list[str]:
    parts: list[str] = []
    bottom = HEIGHT - BOTTOM
    for tick in y_ticks:
        y = y_scale(tick)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 4.5:.1f}" text-anchor="end">{number(tick)}</text>')
    for value, name in _x_ticks(axes, x_scale):
        x = x_scale(value)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{escape(name)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + bottom) / 2
    parts.append(
        f'<text class="name" x="{middle_x}" y="{HEIGHT - 6}" text-anchor="middle">{escape(axes.x_label)}</text>'
    )
    parts.append(
        f'<text class="name" transform="translate(13 {middle_y}) rotate(-90)" text-anchor="middle">'
        f"{escape(axes.y_label)}</text>"
    )
    return parts


def _curve(series: Series, xs: Sequence[float], y_scale: _Scale) -> list[str]:
    ys = [y_scale(y) for y in series.ys]
    parts: list[str] = []
    if series.style == "points":
        for index, x in enumerate(xs):
            if series.low:
                low, high = y_scale(series.low[index]), y_scale(series.high[index])
                parts.append(
                    f'<line class="bar c{series.colour}" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
                )
        parts.append(_path(xs, ys, f"thin c{series.colour}"))
        for x, y, value in zip(xs, ys, series.ys, strict=True):
            tip = escape(f"{series.label}: {value:.4g}")
            parts.append(
                f'<circle class="dot c{series.colour}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{tip}</title></circle>'
            )
        return parts
    css = "faint" if series.style == "faint" else "line"
    return [_path(xs, ys, f"{css} c{series.colour}")]


def _path(xs: Sequence[float], ys: Sequence[float], css: str) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
    return f'<polyline class="{css}" points="{points}"/>'


def _legend(series: Sequence[Series], levels: Sequence[Level]) -> str:
    named = [f'<span><i class="c{s.colour}"></i>{escape(s.label)}</span>' for s in series if s.style != "faint"]
    named += [
        f'<span><i class="dash c{level.colour}"></i>{escape(level.label)} <b>{level.value:.3f}</b></span>'
        for level in levels
    ]
    return f'<div class="legend">{"".join(named)}</div>'
