"""Which charts a run has: each function gives one figure, or none when the run has nothing to draw.

Not for how a chart is drawn (charts.py).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from apps.eval.report.charts import Axes, Level, Series, Share, drawn_stretch, line_chart, running_mean, share_bar
from apps.eval.report.load import Event, RunView
from apps.eval.results import Bucket, Compression, Estimate, EvalReport, KeyTokens, LossByPosition

_SMOOTHING_SHARE = 40  # the running mean spans one 40th of the steps
_PHASES = (
    ("data", "data_s", 3),
    ("forward and backward", "forward_backward_s", 1),
    ("optimizer", "optimizer_s", 2),
    ("other", "other_s", 5),
)


class Figure(NamedTuple):
    """caption says how the figure was made, in a sentence or two."""

    title: str
    caption: str
    chart: Markup


def training_figures(view: RunView) -> list[Figure]:
    """Bits per byte, loss, gradient norm and learning rate over steps; empty for a run without steps."""
    if not view.steps:
        return []
    steps = [event["step"] for event in view.steps]
    window = max(1, len(steps) // _SMOOTHING_SHARE)
    figures = _bpb(view, window)
    losses = [("total", "loss", 1), ("next token", "main_loss", 3), ("further tokens (MTP)", "mtp_loss", 4)]
    series: list[Series] = []
    for label, field, colour in losses:
        values = [event[field] for event in view.steps]
        if None not in values and (field != "main_loss" or any(e["mtp_loss"] is not None for e in view.steps)):
            series.append(Series(label, steps, running_mean(values, window), colour))
    loss_axes = Axes("step", "nats per token", "Training loss by step")
    figures.append(Figure("Training loss", f"Mean over {window} steps.", line_chart(loss_axes, series)))
    for title, field, unit in (("Gradient norm", "grad_norm", "L2 norm"), ("Learning rate", "lr", "rate")):
        values = [event[field] for event in view.steps]
        curve = [Series(title, steps, values, 1)]
        caption = "Before clipping." if field == "grad_norm" else "As scheduled."
        figures.append(
            Figure(title, caption, line_chart(Axes("step", unit, f"{title} by step", from_zero=True), curve))
        )
    return figures


def _bpb(view: RunView, window: int) -> list[Figure]:
    drawn = [(event["step"], event["bpb"]) for event in view.steps if event["bpb"] is not None]
    series: list[Series] = []
    if drawn:
        steps, values = zip(*drawn, strict=True)
        series.append(Series("training, raw", steps, values, 1, style="faint"))
        series.append(Series("training", steps, running_mean(values, window), 1))
    scored = [(event["step"], event["metrics"]["bpb"]) for event in view.validations]
    if scored:
        steps, values = zip(*scored, strict=True)
        series.append(Series("validation", steps, values, 2, style="points"))
    series += [
        points_with_bars("final evaluation", [float(result.checkpoint.step)], [details.bpb], 3)
        for result, details in losses(view.results)
        if result.checkpoint.step is not None
    ]
    if not series:
        return []
    levels = [level for _, details in losses(view.results) for level in compressor_levels(details.compression)]
    axes = Axes("step", "bits per byte", "Bits per byte of training batches and held-out documents by step")
    caption = _said_of_lines(len(drawn), window) + " Points: whole held-out documents."
    if levels:
        caption += (
            " The final evaluation draws its own documents; dashed: compressors on the same bytes as it, "
            "document by document."
        )
    return [Figure("Bits per byte", caption, line_chart(axes, series, levels))]


def _said_of_lines(steps: int, window: int) -> str:
    if window == 1:
        return "Every step."
    stretch = drawn_stretch(steps)
    thin = "every step" if stretch == 1 else f"the lowest and the highest of every {stretch} steps or so"
    return f"Thin: {thin}. Bold: mean over {window} steps."


def losses(results: Sequence[EvalReport]) -> list[tuple[EvalReport, LossByPosition]]:
    """The results of the suite that gives bits per byte."""
    return [(result, result.details) for result in results if isinstance(result.details, LossByPosition)]


def compressor_levels(compression: Compression) -> list[Level]:
    """zlib-9 and lzma, document by document: what a compressor makes of a document that it sees alone."""
    return [
        Level(row.name, row.per_document_bpb, colour)
        for row, colour in zip(compression.compressors, (5, 4), strict=False)
    ]


def position_figures(details: LossByPosition) -> list[Figure]:
    """Bits per byte by byte offset, and the gain from context."""
    names = [_bucket_name(bucket) for bucket in details.buckets]
    axes = Axes("byte offset from, in the document", "bits per byte", "Bits per byte by byte offset", x_names=names)
    series = [points_with_bars("model", [float(i) for i in range(len(names))], [b.bpb for b in details.buckets], 1)]
    figures = [
        Figure(
            "Bits per byte by position",
            "Bars: 95 % interval, bootstrap over documents. Later buckets hold fewer documents. Dashed: compressors "
            "on whole documents." + _window_note(details),
            line_chart(axes, series, compressor_levels(details.compression)),
        )
    ]
    points = details.ablation.points
    if points:
        axes = Axes(
            "context before the span, tokens", "bits per byte above the longest", "Gain from context", x_log=True
        )
        series = [points_with_bars("gain", [float(p.context) for p in points], [p.gain for p in points], 3)]
        caption = (
            f"The same last {details.ablation.span_tokens} tokens of {_counted(details.ablation.documents)}, "
            f"scored with less context: how much worse than with {points[-1].context}. Bars: 95 % paired interval."
        )
        figures.append(Figure("What context is worth", caption, line_chart(axes, series)))
    if details.ablation.key_tokens is not None and details.ablation.key_tokens.points:
        figures.append(_key_tokens(details.ablation.key_tokens))
    return figures


def _counted(documents: Sequence[object]) -> str:
    return f"{len(documents)} document{'' if len(documents) == 1 else 's'}"


def _key_tokens(keys: KeyTokens) -> Figure:
    axes = Axes(
        "context before the span, tokens", "bits per byte", "Bits per byte of key tokens by context", x_log=True
    )
    contexts = [float(point.context) for point in keys.points]
    series = points_with_bars("key tokens", contexts, [point.bpb for point in keys.points], 4)
    caption = (
        f"The {keys.tokens} of {keys.of_tokens} tokens that the longest context helps by over {keys.gain_nats:g} nats "
        "against the shortest, chosen by this model itself: both ends follow from the choice, the way between counts."
    )
    return Figure("Where context decides", caption, line_chart(axes, [series]))


def speed_figures(steps: Sequence[Event]) -> list[Figure]:
    """Tokens per second, memory, and where the time of a step goes; empty without steps."""
    if not steps:
        return []
    xs = [event["step"] for event in steps]
    rate = Series("tokens per second", xs, [event["tokens_per_s"] for event in steps], 1)
    figures = [
        Figure(
            "Throughput",
            f"Median {statistics.median(rate.ys):,.0f} tokens per second.",
            line_chart(Axes("step", "tokens per second", "Throughput by step", from_zero=True), [rate]),
        )
    ]
    measured = [(event["step"], event["max_memory_bytes"]) for event in steps if event["max_memory_bytes"] is not None]
    if measured:
        memory = Series("memory", [step for step, _ in measured], [size / 2**30 for _, size in measured], 4)
        figures.append(
            Figure(
                "Memory",
                "Highest so far: of the process on a CPU, of the device's allocator on a GPU.",
                line_chart(Axes("step", "GiB", "Peak memory by step", from_zero=True), [memory]),
            )
        )
    total = sum(event["time_s"] for event in steps)
    shares = [
        Share(label, seconds, f"{seconds / total:.1%}, {1e3 * seconds / len(steps):.1f} ms", colour)
        for label, field, colour in _PHASES
        if total > 0 and (seconds := sum(event[field] for event in steps)) > 0
    ]
    caption = f"Mean over {len(steps)} steps of {1e3 * total / len(steps):.0f} ms each."
    figures.append(Figure("Where a step's time goes", caption, share_bar(shares, "Shares of a step's time")))
    return figures


def points_with_bars(label: str, xs: Sequence[float], estimates: Sequence[Estimate], colour: int) -> Series:
    """Points with bars; a point without an interval gets a bar of no length."""
    return Series(
        label,
        xs,
        [e.value for e in estimates],
        colour,
        style="points",
        low=[e.value if e.low is None else e.low for e in estimates],
        high=[e.value if e.high is None else e.high for e in estimates],
    )


def _window_note(details: LossByPosition) -> str:
    if details.trained_window is None:
        return ""
    return f" Training windows had {details.trained_window} tokens: what lies further is extrapolation."


def _bucket_name(bucket: Bucket) -> str:
    """Where the bucket begins; the next name says where it ends."""
    return f"{bucket.start // 1024}k" if bucket.start else "0"
