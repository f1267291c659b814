"""How far an evaluation is: a bar per phase on a terminal, a plain line now and then elsewhere; on stderr.

Not for results, which go to stdout and to the result file.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from apps.eval.suites.suite import OnProgress

SECONDS_BETWEEN_LINES = 10.0


def _line_every(seconds: float) -> OnProgress:
    """For a pipe or a log file: a plain line now and then."""
    last = time.monotonic()

    def report(label: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            print(f"{label} {done}/{total}", file=sys.stderr, flush=True)

    return report


@contextmanager
def phases() -> Iterator[OnProgress]:
    """A bar per phase on stderr, so that stdout stays the result."""
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield _line_every(SECONDS_BETWEEN_LINES)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console) as progress:

        def report(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = progress.add_task(label, total=total)
            progress.update(tasks[label], completed=done)

        yield report
