"""Figures of the suites that ask questions: the heat map of `needle`, curves and points for the rest.

Not for how a chart is drawn (charts.py, heat.py) nor for tables, which are in the template.
"""

from __future__ import annotations

from collections.abc import Sequence

from apps.eval.report.charts import Axes, Level, Series, line_chart
from apps.eval.report.figures import Figure, points_with_bars
from apps.eval.report.heat import Cell, heat_map
from apps.eval.results import QuestionScores, Score

COLOURS = 5
_BARS = "Bars: 95 % interval, bootstrap over contexts."


def question_figures(details: QuestionScores) -> list[Figure]:
    """The figures of one result."""
    if details.kind == "needle":
        return _needle(details)
    if details.kind == "scope":
        return _scope(details)
    if details.kind == "callgraph":
        return [_points(details, details.totals, "context", "Next line by context", "context that is given")]
    return [
        _points(details, [s for s in details.cells if s.axes["order"] == order], "span", f"Spans, {order}", "span")
        for order in ("psm", "spm")
    ]


def pick(scores: Sequence[Score], metric: str, axes: tuple[str, ...]) -> list[Score]:
    """The cells of a metric over exactly these axes, in their order."""
    return [score for score in scores if score.metric == metric and tuple(score.axes) == axes]


def length_name(tokens: object) -> str:
    """16384 as 16k."""
    return f"{tokens // 1024}k" if isinstance(tokens, int) and tokens % 1024 == 0 else str(tokens)


def _needle(details: QuestionScores) -> list[Figure]:
    answered = pick(details.cells, "exact_match", ("length", "depth"))
    chosen = pick(details.cells, "choice", ("length", "depth"))
    kinds = pick(details.totals, "choice", ("kind", "length"))
    depth = "depth of the declaration"
    maps = (
        (answered, "depth", depth, "Needles answered", 1),
        (chosen, "depth", depth, "Needles chosen among four", 3),
        (kinds, "kind", "kind of needle", "Choice by kind of needle", 3),
    )
    return [_heat(details, *drawn) for drawn in maps if drawn[0]]


def _heat(details: QuestionScores, scores: Sequence[Score], axis: str, y_label: str, title: str, colour: int) -> Figure:
    """Scores of one metric over the length and one other axis."""
    lengths = sorted({score.axes["length"] for score in scores}, key=float)
    rows = list(dict.fromkeys(score.axes[axis] for score in scores))
    if axis == "depth":
        rows.sort(key=float)
    name = _depth_name if axis == "depth" else str
    cells = {
        (rows.index(score.axes[axis]), lengths.index(score.axes["length"])): Cell(
            score.estimate.value,
            f"{score.estimate.value:.0%} of {score.n}",
            f"{length_name(score.axes['length'])} tokens, {axis} {name(score.axes[axis])}: {_words(score)}",
        )
        for score in scores
    }
    axes = Axes("tokens of the context", y_label, f"{title} by length and {axis}")
    chart = heat_map(axes, [name(row) for row in rows], [length_name(n) for n in lengths], cells, colour)
    chance = scores[0].chance
    guess = "" if not chance else f" Guessing gives {chance:.0%}."
    caption = f"{_sentence(details, scores[0].metric)} In a cell: of how many.{guess}{_window(details)}"
    return Figure(title, caption, chart)


def _depth_name(depth: object) -> str:
    return f"{float(str(depth)):.0%}"


def _scope(details: QuestionScores) -> list[Figure]:
    return [_by_kind(details, "right", "distance", "Right names by distance", "tokens from declaration to use")]


def _by_kind(details: QuestionScores, metric: str, axis: str, title: str, x_label: str) -> Figure:
    scores = pick(details.totals, metric, ("kind", axis))
    series: list[Series] = []
    for number, kind in enumerate(dict.fromkeys(score.axes["kind"] for score in scores)):
        mine = [score for score in scores if score.axes["kind"] == kind]
        xs = [float(score.axes[axis]) for score in mine]
        series.append(points_with_bars(str(kind), xs, [s.estimate for s in mine], number % COLOURS + 1))
    chance = scores[0].chance if scores else None
    levels = [] if chance is None else [Level("guessing", chance, 5)]
    axes = Axes(x_label, "share", f"{title}: {'; '.join(_words(s) for s in scores)}", x_log=True, from_zero=True)
    caption = f"{_sentence(details, metric)} {_BARS}{_window(details)}"
    return Figure(title, caption, line_chart(axes, series, levels))


def _points(details: QuestionScores, scores: Sequence[Score], axis: str, title: str, x_label: str) -> Figure:
    names = list(dict.fromkeys(str(score.axes[axis]) for score in scores))
    series = []
    for number, metric in enumerate(("exact_match", "edit_similarity", "identifier_f1", "syntax_valid")):
        mine = [score for score in scores if score.metric == metric]
        if mine:
            xs = [float(names.index(str(score.axes[axis]))) for score in mine]
            label = metric.replace("_", " ")
            series.append(points_with_bars(label, xs, [s.estimate for s in mine], number + 1))
    axes = Axes(x_label, "mean", f"{title}: {'; '.join(_words(s) for s in scores)}", x_names=names, from_zero=True)
    return Figure(title, f"{_BARS} What each measure means is in the table.", line_chart(axes, series))


def _sentence(details: QuestionScores, metric: str) -> str:
    meaning = details.metrics[metric]
    return f"{meaning[0].upper()}{meaning[1:]}."


def _words(score: Score) -> str:
    estimate = score.estimate
    axes = ", ".join(str(value) for value in score.axes.values())
    bounds = "one context" if estimate.low is None else f"{estimate.low:.3f} to {estimate.high:.3f}"
    return f"{score.metric} {axes} {estimate.value:.3f} ({bounds}), n = {score.n}"


def _window(details: QuestionScores) -> str:
    if details.trained_window is None:
        return ""
    return f" Training windows had {details.trained_window} tokens: what is longer is extrapolation."
