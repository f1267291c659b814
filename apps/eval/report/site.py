"""`fathom report all`: every page about a folder of runs and about what was measured, side by side, with links.

Not for what a page says: each is made by its own module, and this one by itself is only the list of runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from apps.eval.report import build, compare, crossover_page
from apps.eval.report.crossover_page import read_crossover
from apps.eval.report.flags_page import flags_page
from apps.eval.report.kernels_page import kernels_page, read_kernels
from apps.eval.report.load import RunView, load_run
from apps.eval.report.page import Links, render_page, run_page, write_page
from apps.eval.report.questions import COLOURS
from apps.eval.report.receipts_page import load_receipts, receipts_page
from libs.flags.errors import UserError
from libs.flags.index import RunIndex
from libs.flags.summary import RunSummary

INDEX, FLAGS, RECEIPTS, KERNELS, COMPARE = "index.html", "flags.html", "receipts.html", "kernels.html", "compare.html"
# What odd numbers and names make of a formula, a look-up or a format: no page, and a word about it on the list.
_ODD = (ArithmeticError, LookupError, TypeError, ValueError)


class Sources(NamedTuple):
    """What the pages are about; None: there is no such page. limit: so many runs, the last by name, get one."""

    runs: Path
    receipts: Path | None
    kernels: Path | None
    limit: int


class Draft(NamedTuple):
    """A page that waits for its links. label: in the bar on top; None for a page that only others refer to."""

    label: str | None
    make: Callable[[Links], str]


def write_site(sources: Sources, out: Path) -> list[Path]:
    """Write every page into the folder `out`, made if it is not there; the list of runs first.

    Raises:
        UserError: a folder or file of `sources` that is not there or not what it should be, or `out` cannot be written.
    """
    index = RunIndex.open(sources.runs)
    runs = index.runs()
    index.close()
    problems: list[str] = []
    views = _views(sources, runs, problems)
    drafts = _drafts(sources, runs, views, problems)
    bar = {name: draft.label for name, draft in drafts.items() if draft.label is not None}
    others = frozenset(drafts) - frozenset(bar)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot make this folder: {error.strerror}") from error
    for name, draft in drafts.items():
        write_page(draft.make(Links(name, bar, others)), out / name)
    return [out / name for name in drafts]


def _views(sources: Sources, runs: list[RunSummary], problems: list[str]) -> list[RunView]:
    """The runs that get a page, oldest first; one that cannot be read is a problem on the list and hides no other."""
    found: list[RunView] = []
    for run in runs[-sources.limit :]:
        try:
            found.append(load_run(sources.runs / run.run))
        except UserError as error:
            problems.append(f"{run.run} has no page: {error}")
    if len(runs) > sources.limit:
        problems.append(f"{len(runs) - sources.limit} older runs have no page (--limit {sources.limit})")
    return found


def _drafts(sources: Sources, runs: list[RunSummary], views: list[RunView], problems: list[str]) -> dict[str, Draft]:
    def index(links: Links) -> str:
        newest_first = list(reversed(runs))
        return render_page("index.html.j2", links=links, folder=sources.runs, runs=newest_first, problems=problems)

    drafts = {INDEX: Draft("Runs", index)}
    pages: dict[str, Draft] = {}
    for view in views:
        pages |= _tried(run_page(view.run_dir.name), None, build.TEMPLATE, partial(build.content, view), problems)
    trained = [view for view in views if view.steps and run_page(view.run_dir.name) in pages][-COLOURS:]
    if len(trained) > 1:
        drafts |= _tried(COMPARE, "Comparison", compare.TEMPLATE, partial(compare.content, trained), problems)
    drafts[FLAGS] = Draft("Gates", partial(flags_page, sources.runs))
    if sources.receipts is not None:
        drafts |= _measured(sources.receipts, problems)
    if sources.kernels is not None:
        table = read_kernels(sources.kernels)
        drafts[KERNELS] = Draft("Kernels", partial(kernels_page, table))
    return drafts | pages


def _tried(
    name: str, label: str | None, template: str, content: Callable[[], dict[str, Any]], problems: list[str]
) -> dict[str, Draft]:
    """The page `name`, if it can be made (without links, for once); else none, and a problem: it hides no other."""
    try:
        values = content()
        render_page(template, **values)
    except _ODD as error:
        problems.append(f"{name} is left out, as it cannot be drawn: {error!r}")
        return {}
    return {name: Draft(label, lambda links: render_page(template, links=links, **values))}


def _measured(folder: Path, problems: list[str]) -> dict[str, Draft]:
    """The receipts, and the curves of every crossover among them."""
    found, _ = load_receipts(folder)
    drafts = {RECEIPTS: Draft("Receipts", partial(receipts_page, folder))}
    for name, receipt in found.items():
        if receipt.subject == "crossover":
            try:
                curves = read_crossover(folder / name)
            except UserError as error:
                problems.append(str(error))
                continue
            longest = max(point.seq_len for point in curves.points)
            label = f"Crossover to {longest:,}, {receipt.hardware.machine}"
            content = partial(crossover_page.content, curves)
            drafts |= _tried(f"crossover-{name}.html", label, crossover_page.TEMPLATE, content, problems)
    return drafts
