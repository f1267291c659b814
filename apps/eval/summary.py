"""The summary of a result on the console. Not for the file (results.py) nor for the page (report/)."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from apps.eval.results import Estimate, EvalReport, LossByPosition, QuestionScores, Score


def print_summary(report: EvalReport, console: Console) -> None:
    """What was scored, a table, and what must not be overlooked."""
    console.print(
        f"{report.suite} of {report.checkpoint.path}: {report.n} scored, {len(report.excluded)} excluded, "
        f"{report.seconds:.0f} s",
        highlight=False,
        soft_wrap=True,
    )
    for reason, count in list(report.excluded_by_reason.items())[:4]:
        console.print(f"excluded {count}: {reason}", highlight=False, soft_wrap=True)
    if isinstance(report.details, LossByPosition):
        _print_loss(report, report.details, console)
    else:
        _print_questions(report.details, console)


def _print_loss(report: EvalReport, details: LossByPosition, console: Console) -> None:
    table = Table("bytes from", "to", "documents", "bits per byte", "95 % interval")
    for bucket in details.buckets:
        table.add_row(str(bucket.start), str(bucket.end), str(bucket.documents), *_cells(bucket.bpb))
    table.add_row("all", "", str(report.n), *_cells(details.bpb), style="bold")
    console.print(table)
    for compressor in details.compression.compressors:
        console.print(
            f"{compressor.name}: {compressor.per_document_bpb:.3f} per document, "
            f"{compressor.one_stream_bpb:.3f} as one stream (bits per byte, same bytes)",
            highlight=False,
        )
    for point in details.ablation.points:
        value, interval = _cells(point.gain)
        console.print(f"context {point.context}: gain {value} ({interval})", highlight=False)
    keys = details.ablation.key_tokens
    for key in [] if keys is None else keys.points:
        value, interval = _cells(key.bpb)
        console.print(f"context {key.context}: key tokens {value} bits per byte ({interval})", highlight=False)
    if details.ablation.reason is not None:
        console.print(f"context ablation: {details.ablation.reason}", highlight=False, soft_wrap=True)


def _print_questions(details: QuestionScores, console: Console) -> None:
    table = Table("over", "metric", "n", "score", "95 % interval", "chance")
    for score in [score for score in details.totals if len(score.axes) < 2]:
        table.add_row(*_row(score, ""))
    for score in details.control:
        table.add_row(*_row(score, "control "), style="dim")
    console.print(table)
    use = details.prefix
    console.print(
        f"prefix cache {use.mode}: {use.skipped_tokens:,} of {use.prompt_tokens:,} prompt tokens skipped; "
        f"verified {use.verified}: {use.note}",
        highlight=False,
        soft_wrap=True,
    )


def _row(score: Score, prefix: str) -> tuple[str, ...]:
    axes = ", ".join(f"{axis} {value}" for axis, value in score.axes.items()) or "all"
    chance = "" if score.chance is None else f"{score.chance:.3g}"
    return prefix + axes, score.metric, str(score.n), *_cells(score.estimate), chance


def _cells(estimate: Estimate) -> tuple[str, str]:
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.4f}", "one context"
    return f"{estimate.value:.4f}", f"{estimate.low:.4f} - {estimate.high:.4f}"
