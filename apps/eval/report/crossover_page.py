"""The page of a crossover sweep: both curves, their ratio with its intervals, where they cross; modelled rows apart.

Not for measuring (`apps.eval.bench.crossover`).
"""
# S tokens

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from apps.eval.bench.crossing import Crossing
from apps.eval.bench.crossover import CrossoverReceipt, Point
from apps.eval.bench.crossover_job import MODELS, Model
from apps.eval.reading import read_record
from apps.eval.report.charts import Axes, Level, Series, line_chart
from apps.eval.report.figures import Figure
from apps.eval.report.page import ALONE, Links, render_page

TEMPLATE = "crossover.html.j2"
_COLOUR: Mapping[Model, int] = {"hybrid": 1, "twin": 2}
_CROSSING_COLOUR = 3


def read_crossover(path: Path) -> CrossoverReceipt:
    """The receipt at `path`, a file or its folder.

    Raises:
        UserError: not there, or not a receipt of a crossover sweep whose figures follow from its samples.
    """
    file = path / "receipt.json" if path.is_dir() else path
    return read_record(file, CrossoverReceipt, "receipt of `fathom bench crossover`")


def crossover_page(receipt: CrossoverReceipt, links: Links = ALONE) -> str:
    """The page as text."""
    return render_page(TEMPLATE, links=links, **content(receipt))


def content(receipt: CrossoverReceipt) -> dict[str, Any]:
    """What the template shows."""
    return {
        "receipt": receipt, "figures": figures(receipt), "rows": _rows(receipt),
        "modelled_figures": modelled_figures(receipt),
    }  # fmt: skip


def figures(receipt: CrossoverReceipt) -> list[Figure]:
    """Ratio of times, tokens per second, peak memory where it is known, modelled FLOPs."""
    points = receipt.points
    found = [_ratio(receipt)]
    axes = Axes("tokens of the row", "tokens per second", "Tokens per second by length", x_log=True, from_zero=True)
    caption = "One row per step, mean of the samples."
    found.append(_curves("Throughput", caption, axes, points, lambda p: p.tokens_per_s))
    if all(point.peak_bytes is not None for point in points):
        axes = Axes("tokens of the row", "MiB", "Peak memory of a step by length", x_log=True, from_zero=True)
        caption = "How it was read is in the notes."
        found.append(_curves("Peak memory", caption, axes, points, lambda p: (p.peak_bytes or 0) / 2**20))
    axes = Axes("tokens of the row", "MFLOP per token", "Modelled FLOPs by length", x_log=True, from_zero=True)
    caption = "By formula, forward and backward: no measurement."
    found.append(_curves("Work per token", caption, axes, points, lambda p: p.flops_per_token / 1e6))
    return found


def _ratio(receipt: CrossoverReceipt) -> Figure:
    lengths = _lengths(receipt)
    values = [ratio.value for ratio in receipt.ratios]
    low = [r.value if r.low is None else r.low for r in receipt.ratios]
    high = [r.value if r.high is None else r.high for r in receipt.ratios]
    series = [Series("hybrid / twin", lengths, values, 1, "points", low, high)]
    by_time = receipt.crossings[0] if receipt.crossings else None
    if by_time is not None:
        series += _mark(by_time)
    said = "" if by_time is None else f" {_sentence(by_time)}"
    axes = Axes("tokens of the row", "time of a step, hybrid / twin", f"Ratio of times by length.{said}", x_log=True)
    caption = f"Below 1 the hybrid is faster. Bars: 95 % interval over pairs.{said}"
    return Figure("Time of a step", caption, line_chart(axes, series, [Level("equal", 1.0, 5)]))


def _mark(crossing: Crossing) -> list[Series]:
    """The crossing at a ratio of 1, over its interval; an open end goes to the end of what was measured."""
    marks: list[Series] = []
    if crossing.has_interval:
        ends = [
            float(crossing.shortest if crossing.low is None else crossing.low),
            float(crossing.longest if crossing.high is None else crossing.high),
        ]
        marks.append(Series("95 % of the crossing", ends, [1.0, 1.0], _CROSSING_COLOUR))
    if crossing.tokens is not None:
        marks.append(Series("crossing", [crossing.tokens], [1.0], _CROSSING_COLOUR, "points"))
    return marks


def modelled_figures(receipt: CrossoverReceipt) -> list[Figure]:
    """A figure for each slice: modelled tokens per second, drawn apart from what was measured."""
    found = []
    for name in dict.fromkeys(row.slice for row in receipt.modelled):
        series = []
        for model in MODELS:
            rows = [r for r in receipt.modelled if (r.slice, r.model) == (name, model) and r.seconds is not None]
            if rows:
                rates = [row.tokens_per_step / row.seconds for row in rows if row.seconds is not None]
                lengths = [row.seq_len for row in rows]
                series.append(Series(f"{model}, modelled", lengths, rates, _COLOUR[model], "points"))
        if series:
            axes = Axes(
                "tokens of a window", "modelled tokens per second", f"MODELLED tokens per second on {name}, by length",
                x_log=True, from_zero=True,
            )  # fmt: skip
            caption = "MODELLED by the compiler's own estimate, ahead of time. Never run on such a device."
            found.append(Figure(f"{name}: modelled", caption, line_chart(axes, series)))
    return found


def _curves(title: str, caption: str, axes: Axes, points: Sequence[Point], value: Callable[[Point], float]) -> Figure:
    series = []
    for model in MODELS:
        mine = sorted((point for point in points if point.model == model), key=lambda point: point.seq_len)
        xs, ys = [float(point.seq_len) for point in mine], [value(point) for point in mine]
        series.append(Series(model, xs, ys, _COLOUR[model], "points"))
    return Figure(title, caption, line_chart(axes, series))


def _rows(receipt: CrossoverReceipt) -> list[dict[str, object]]:
    """A row for each length."""
    by = {(point.model, point.seq_len): point for point in receipt.points}
    rows: list[dict[str, object]] = []
    for seq_len, ratio in zip(_lengths(receipt), receipt.ratios, strict=True):
        rows.append({"seq_len": seq_len, "ratio": ratio, **{p.model: p for key, p in by.items() if key[1] == seq_len}})
    return rows


def _lengths(receipt: CrossoverReceipt) -> list[int]:
    """Of the ratios, in their order (`ratios_of`)."""
    return sorted({point.seq_len for point in receipt.points})


def _sentence(crossing: Crossing) -> str:
    said = crossing.sentence()
    return f"{said[0].upper()}{said[1:]}."
