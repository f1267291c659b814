"""From a view of a run to one HTML file: the numbers at the top, the settings, and the template around them.

Not for reading a run (load.py), nor for charts (figures.py), nor for what all pages have (page.py).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from apps.eval.report.figures import Figure, losses, position_figures, speed_figures, training_figures
from apps.eval.report.load import RunView
from apps.eval.report.page import ALONE, Links, human_bytes, human_seconds, render_page, write_page
from apps.eval.report.questions import question_figures
from apps.eval.results import EvalReport, LossByPosition

REPORT_NAME, TEMPLATE = "report.html", "report.html.j2"
SHOWN_PACKAGES = ("fathom", "torch", "megatron-core", "numpy", "tokenizers", "tilelang", "safetensors", "structlog")


class Tile(NamedTuple):
    """One figure at the top of the page."""

    label: str
    value: str
    note: str


class ConfigRow(NamedTuple):
    key: str
    value: str
    origin: str


def write_report(view: RunView, path: Path) -> None:
    """Write the page of one run. Raises UserError as `write_page`."""
    write_page(render(view), path)


def render(view: RunView, links: Links = ALONE) -> str:
    """The page as text. It refers to nothing outside itself but to the pages of `links`."""
    return render_page(TEMPLATE, links=links, **content(view))


def content(view: RunView) -> dict[str, Any]:
    """What the template shows."""
    return {
        "view": view, "tiles": tiles(view), "training_figures": training_figures(view),
        "speed_figures": speed_figures(view.steps),
        "evaluations": [(result, result_figures(result)) for result in view.results],
        "config_rows": list(flatten(view.config, view.origins)), "shown_packages": SHOWN_PACKAGES,
    }  # fmt: skip


def result_figures(result: EvalReport) -> list[Figure]:
    """The figures of one result, whatever its suite."""
    details = result.details
    return position_figures(details) if isinstance(details, LossByPosition) else question_figures(details)


def tiles(view: RunView) -> list[Tile]:
    """What a reader wants first; a run without steps has none of the training figures."""
    found: list[Tile] = []
    if view.validations:
        first, last = view.validations[0], view.validations[-1]
        before, after = first["metrics"]["bpb"], last["metrics"]["bpb"]
        note = f"from {before:.3f} at step {first['step']}" + (f", {1 - after / before:.0%} lower" if before else "")
        found.append(Tile("validation bits per byte", f"{after:.3f}", note if last is not first else "one validation"))
    for result, details in losses(view.results):
        bpb = details.bpb
        interval = "one document" if bpb.low is None or bpb.high is None else f"95 %: {bpb.low:.3f} to {bpb.high:.3f}"
        found.append(Tile(f"bits per byte, {result.suite}", f"{bpb.value:.3f}", f"{interval}; {result.n} documents"))
    if view.steps:
        last = view.steps[-1]
        seconds = sum(event["time_s"] for event in view.steps)
        rate = statistics.median(event["tokens_per_s"] for event in view.steps)
        found.append(Tile("steps", f"{last['step']:,}", f"{last['tokens_total']:,} tokens"))
        found.append(Tile("time in steps", human_seconds(seconds), f"{rate:,.0f} tokens per second (median)"))
        peaks = [event["max_memory_bytes"] for event in view.steps if event["max_memory_bytes"] is not None]
        if peaks:
            found.append(Tile("peak memory", human_bytes(max(peaks)), "of the process or the device"))
        mfu = last["mfu"]
        found.append(Tile("MFU", "not stated" if mfu is None else f"{mfu:.1%}", last["mfu_reason"] or "last step"))
    for name, size in {result.checkpoint.model: result.checkpoint.parameters for result in view.results}.items():
        found.append(Tile("parameters", f"{size:,}", name))
    return found


def flatten(config: Mapping[str, Any], origins: Mapping[str, str], prefix: str = "") -> Iterator[ConfigRow]:
    """Every setting by its dotted key, and where it came from."""
    for key, value in config.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping) and dotted not in origins:
            yield from flatten(value, origins, f"{dotted}.")
        else:
            shown = "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
            yield ConfigRow(dotted, shown, origins.get(dotted, "not recorded"))
