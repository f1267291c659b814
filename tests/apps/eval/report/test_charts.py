"""Axes, scales and marks: where things are drawn, read back from the SVG."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.eval.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    POINTS_DRAWN,
    RIGHT,
    TOP,
    WIDTH,
    Axes,
    Level,
    Series,
    Share,
    line_chart,
    nice_ticks,
    number,
    running_mean,
    share_bar,
)

AXES = Axes("step", "bits per byte", "a chart")


def svg_of(markup: str) -> ET.Element:
    text = str(markup)  # a Markup would escape what is added to it
    begin, end = text.index("<svg"), text.index("</svg>") + len("</svg>")
    return ET.fromstring(text[begin:end])


@settings(deadline=None)  # a shared machine may pause at any moment
@given(st.floats(-1e5, 1e5), st.floats(1e-3, 1e6), st.integers(2, 8))
def test_ticks_cover_the_range_with_round_steps(low: float, width: float, count: int) -> None:
    high = low + width
    if high <= low:
        return
    ticks = nice_ticks(low, high, count)
    step = ticks[1] - ticks[0]
    tolerance = 1e-6 * step + 1e-11
    assert ticks[0] <= low + tolerance
    assert ticks[-1] >= high - tolerance
    assert 2 <= len(ticks) <= 2 * count + 3
    mantissa = float(f"{step:.3e}".split("e")[0])
    assert min(abs(mantissa - m) for m in (1, 2, 2.5, 5, 10)) < 0.02


def test_a_flat_series_still_has_an_axis() -> None:
    ticks = nice_ticks(3.0, 3.0, 5)
    assert ticks[0] < 3.0 < ticks[-1]
    line_chart(AXES, [Series("flat", [1], [0.0], 1)])


@pytest.mark.parametrize("value", [5e-324, 1e-310, 1e-300, 1e-290, -5e-324, 1.0, 1e299, -1e300])
def test_the_smallest_and_the_largest_numbers_have_an_axis(value: float) -> None:
    for low, high in ((0.0, value), (value, 0.0), (value, value), (-abs(value), abs(value))):
        ticks = nice_ticks(min(low, high), max(low, high), 5)
        assert 2 <= len(ticks) <= 13
        assert all(map(math.isfinite, ticks))
    svg = svg_of(line_chart(AXES, [Series("s", [0, 1], [0.0, value], 1, style="points")]))
    for dot in svg.findall("circle"):
        assert TOP <= float(dot.get("cy", "")) <= HEIGHT - BOTTOM


@pytest.mark.parametrize(
    ("axes", "series", "levels", "why"),
    [
        (AXES, [], [Level("zlib", 2.0, 5)], "there is no point"),
        (AXES, [Series("s", [], [], 1)], [], "there is no point"),
        (AXES, [Series("s", [0, 1], [-1e308, 1e308], 1)], [], "a value is beyond 1e+300"),
        (AXES, [Series("s", [0, 10**400], [0.0, 1.0], 1)], [], "a value is beyond 1e+300"),
        (AXES, [Series("s", [0], [0.0], 1, "points", [0.0], [1e301])], [], "a value is beyond 1e+300"),
        (AXES, [Series("s", [0], [0.0], 1)], [Level("zlib", 1e308, 5)], "a value is beyond 1e+300"),
        (AXES._replace(x_log=True), [Series("s", [0, 1], [0.0, 1.0], 1)], [], "step: a logarithmic axis has no place"),
    ],
)
def test_what_cannot_be_drawn_is_said(axes: Axes, series: list[Series], levels: list[Level], why: str) -> None:
    chart = line_chart(axes, series, levels)
    assert chart.startswith(f'<p class="none">Not drawn: {why}')
    assert "svg" not in chart


def test_points_lie_where_their_values_are() -> None:
    svg = svg_of(line_chart(AXES, [Series("s", [0, 10], [1.0, 3.0], 1, style="points")], [Level("zlib", 2.0, 5)]))
    dots = svg.findall("circle")
    assert [float(dot.get("cx", "")) for dot in dots] == [LEFT, WIDTH - RIGHT]
    low, high = (float(dot.get("cy", "")) for dot in dots)
    assert TOP <= high < low <= HEIGHT - BOTTOM
    (level,) = [line for line in svg.findall("line") if "level" in line.get("class", "")]
    assert float(level.get("y1", "")) == pytest.approx((low + high) / 2, abs=0.1)


def test_everything_stays_inside_and_axes_carry_names_and_units() -> None:
    xs = [64.0, 128.0, 4096.0]
    series = Series("gain", xs, [0.3, -0.1, 0.0], 3, style="points", low=[0.1, -0.5, 0.0], high=[0.9, 0.1, 0.0])
    svg = svg_of(line_chart(Axes("context, tokens", "bits per byte", "d", x_log=True), [series]))
    for element in svg.iter():
        for key in ("x1", "x2", "cx"):
            assert LEFT - 1 <= float(element.get(key, LEFT)) <= WIDTH
        for key in ("y1", "y2", "cy"):
            assert 0 <= float(element.get(key, TOP)) <= HEIGHT
    texts = [element.text for element in svg.findall("text")]
    assert {"context, tokens", "bits per byte", "64", "1k", "4k"} <= set(texts)


def test_long_curves_are_thinned_and_keep_their_ends() -> None:
    n = 20_000
    svg = svg_of(line_chart(AXES, [Series("s", range(n), [float(i) for i in range(n)], 1)]))
    points = svg.findall("polyline")[0].get("points", "").split()
    assert len(points) <= POINTS_DRAWN + 2
    assert points[0].startswith(f"{LEFT:.1f},")
    assert points[-1].startswith(f"{WIDTH - RIGHT:.1f},")


def test_shares_add_up_to_the_whole_bar() -> None:
    markup = share_bar([Share("a", 3.0, "75 %", 1), Share("b", 1.0, "25 %", 2)], "split")
    rects = svg_of(markup).findall("rect")
    assert float(rects[1].get("x", "")) == pytest.approx(0.75 * WIDTH, abs=0.1)
    assert re.findall(r"<b>(.*?)</b>", markup) == ["75 %", "25 %"]


def test_labels_and_smoothing() -> None:
    assert [number(v) for v in (0.002, 1.5, 250, 12_000, 3_400_000)] == ["0.002", "1.5", "250", "12k", "3.4M"]
    assert running_mean([1.0, 2.0, 3.0, 4.0], 2) == [1.0, 1.5, 2.5, 3.5]
    assert running_mean([1.0, 2.0], 10) == [1.0, 1.5]


def test_a_spike_leaves_the_running_mean_with_its_window() -> None:
    """Against fractions, window by window; the sums of floats gave 0.0 from the spike on."""
    assert running_mean([2.0, 2.0, 2.0, 1e17, 2.0, 2.0, 2.0], 2) == [2.0, 2.0, 2.0, 5e16, 5e16, 2.0, 2.0]
    values = [2.0, 1e300, -3.5, 5e-324, 1.7e308, 0.1, 7, -1.7e308, 0.2, 1e-9, 0.0, 3]
    for window in range(1, len(values) + 2):
        parts = [values[max(0, end - window) : end] for end in range(1, len(values) + 1)]
        assert running_mean(values, window) == [float(sum(map(Fraction, part)) / len(part)) for part in parts]


def test_shares_of_nothing_are_said() -> None:
    for shares in ([], [Share("a", 0.0, "0 %", 1)]):
        assert share_bar(shares, "split") == '<p class="none">Not drawn: shares of 0.</p>'
