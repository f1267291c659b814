"""Several runs on one page: which settings differ, their curves over each other, their results side by side.

Not for one run (build.py). A number stands beside the same number of another run, with intervals; nothing is tested for
significance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from apps.eval.report.build import flatten
from apps.eval.report.charts import Axes, Series, line_chart, running_mean
from apps.eval.report.figures import Figure, losses, points_with_bars
from apps.eval.report.load import RunView, load_run
from apps.eval.report.page import ALONE, Links, describe_axes, render_page, write_page
from apps.eval.report.questions import COLOURS, pick
from apps.eval.results import Estimate, EvalReport, LossByPosition
from apps.eval.suites import SUITES
from libs.flags.errors import UserError

COMPARE_NAME, TEMPLATE = "compare.html", "compare.html.j2"
_SMOOTHING_SHARE = 40
_MISSING = "not recorded"


class Row(NamedTuple):
    """A number of every run, in the order of the runs; None where a run has none."""

    suite: str
    what: str
    cells: tuple[Estimate | None, ...]


class Difference(NamedTuple):
    key: str
    values: tuple[str, ...]


def load_runs(directories: Sequence[Path]) -> list[RunView]:
    """Read the runs.

    Raises:
        UserError: fewer than two, more than there are colours, one twice, or no run.
    """
    if not 2 <= len(directories) <= COLOURS:
        raise UserError(f"{len(directories)} runs to compare; allowed are 2 to {COLOURS}")
    if len({directory.resolve() for directory in directories}) < len(directories):
        raise UserError(f"a run is given twice: {', '.join(map(str, directories))}")
    return [load_run(directory) for directory in directories]


def write_comparison(views: Sequence[RunView], path: Path) -> None:
    """Write the page, whole or not at all. Raises UserError when the place cannot be written."""
    write_page(render(views), path)


def render(views: Sequence[RunView], links: Links = ALONE) -> str:
    """The page as text. It refers to nothing outside itself but to the pages of `links`."""
    return render_page(TEMPLATE, links=links, **content(views))


def content(views: Sequence[RunView]) -> dict[str, Any]:
    """What the template shows."""
    return {
        "views": views, "names": names(views), "differences": differences(views),
        "figures": [figure for make in _FIGURES if (figure := make(views)) is not None], "rows": rows(views),
        "warnings": warnings(views),
    }  # fmt: skip


def names(views: Sequence[RunView]) -> list[str]:
    """A short name for each run: its recipe, its id where recipes repeat, its folder where ids do (a copy)."""
    recipes = [view.recipe or "" for view in views]
    for candidates in (recipes, [view.run_id for view in views]):
        if len(set(candidates)) == len(candidates) and all(candidates):
            return candidates
    return [view.run_dir.name for view in views]


def differences(views: Sequence[RunView]) -> list[Difference]:
    """Settings that are not the same in every run, and the gates among them."""
    flat: list[Mapping[str, str]] = []
    for view in views:
        settings = {row.key: row.value for row in flatten(view.config, view.origins)}
        flat.append(settings | {f"gate {gate.gate}": gate.value for gate in view.gates})
    keys = dict.fromkeys(key for settings in flat for key in settings)
    table = [Difference(key, tuple(settings.get(key, _MISSING) for settings in flat)) for key in keys]
    return [difference for difference in table if len(set(difference.values)) > 1]


def warnings(views: Sequence[RunView]) -> list[str]:
    """What makes results of one suite differ for another reason than the model."""
    found: list[str] = []
    for suite in SUITES:
        results = [result for view in views for result in view.results if result.suite == suite]
        checks: tuple[tuple[str, Callable[[EvalReport], Any]], ...] = (
            ("what was scored", lambda r: r.data.prompt_sha256),
            ("versions of the suite", lambda r: r.suite_version),
            ("tokenizers", lambda r: r.data.tokenizer_fingerprint),
        )
        found += [
            f"{suite}: {what} differ between the runs, so its numbers are not of the same questions"
            for what, read in checks
            if len({read(result) for result in results}) > 1
        ]
    return found


def rows(views: Sequence[RunView]) -> list[Row]:
    """Every total and control of every suite, and bits per byte."""
    tables = [{(r.suite, what): e for r in view.results for what, e in _numbers(r).items()} for view in views]
    keys = dict.fromkeys(key for suite in SUITES for table in tables for key in table if key[0] == suite)
    return [Row(suite, what, tuple(table.get((suite, what)) for table in tables)) for suite, what in keys]


def _numbers(result: EvalReport) -> dict[str, Estimate]:
    details = result.details
    if isinstance(details, LossByPosition):
        gains = {f"gain of context {point.context}": point.gain for point in details.ablation.points}
        return {"bits per byte": details.bpb} | gains
    totals = {f"{s.metric}, {describe_axes(s.axes)}": s.estimate for s in details.totals if len(s.axes) < 2}
    control = {f"control: {s.metric}, {describe_axes(s.axes)}": s.estimate for s in details.control}
    return totals | control


def _training(views: Sequence[RunView]) -> Figure | None:
    series: list[Series] = []
    for number, (name, view) in enumerate(zip(names(views), views, strict=True), start=1):
        drawn = [(e["tokens_total"], e["bpb"]) for e in view.steps if e["bpb"] is not None]
        if drawn:
            tokens, values = zip(*drawn, strict=True)
            window = max(1, len(drawn) // _SMOOTHING_SHARE)
            series.append(Series(name, tokens, running_mean(values, window), number))
    axes = Axes("tokens", "bits per byte", "Bits per byte of training batches by tokens, one line per run")
    caption = "Training batches, running mean. Over tokens, so that runs of other batch sizes compare."
    return Figure("Training", caption, line_chart(axes, series)) if series else None


def _validation(views: Sequence[RunView]) -> Figure | None:
    series: list[Series] = []
    for number, (name, view) in enumerate(zip(names(views), views, strict=True), start=1):
        steps = [event["step"] for event in view.validations]
        if steps:
            values = [event["metrics"]["bpb"] for event in view.validations]
            series.append(Series(name, steps, values, number, style="points"))
    axes = Axes("step", "bits per byte", "Bits per byte of held-out documents by step, one line per run")
    return Figure("Validation", "Whole held-out documents.", line_chart(axes, series)) if series else None


def _position(views: Sequence[RunView]) -> Figure | None:
    found = [[details for _, details in losses(view.results)] for view in views]
    starts = sorted({bucket.start for results in found for details in results for bucket in details.buckets})
    series: list[Series] = []
    for number, (name, results) in enumerate(zip(names(views), found, strict=True), start=1):
        for details in results:
            xs = [float(starts.index(bucket.start)) for bucket in details.buckets]
            series.append(points_with_bars(name, xs, [bucket.bpb for bucket in details.buckets], number))
    labels = [f"{start // 1024}k" if start else "0" for start in starts]
    axes = Axes("byte offset from, in the document", "bits per byte", "Bits per byte by position", x_names=labels)
    return Figure("Bits per byte by position", _BARS, line_chart(axes, series)) if series else None


def _needle(views: Sequence[RunView]) -> Figure | None:
    return _curves(views, "needle", "choice", "length", "Needles chosen among four", "tokens of the context")


def _scope(views: Sequence[RunView]) -> Figure | None:
    return _curves(views, "scope", "right", "length", "Right names", "tokens of the context")


def _curves(views: Sequence[RunView], suite: str, metric: str, axis: str, title: str, label: str) -> Figure | None:
    series: list[Series] = []
    for number, (name, view) in enumerate(zip(names(views), views, strict=True), start=1):
        for result in view.results:
            if result.suite == suite and not isinstance(result.details, LossByPosition):
                scores = pick(result.details.totals, metric, (axis,))
                xs = [float(score.axes[axis]) for score in scores]
                series.append(points_with_bars(name, xs, [score.estimate for score in scores], number))
    axes = Axes(label, "share", f"{title} by {label}, one line per run", x_log=True, from_zero=True)
    return Figure(title, _BARS, line_chart(axes, series)) if any(s.xs for s in series) else None


_BARS = "Bars: 95 % interval; intervals that overlap do not say that two runs are equal."
_FIGURES = (_training, _validation, _position, _needle, _scope)
