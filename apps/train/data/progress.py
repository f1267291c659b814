"""A progress bar per step on a terminal, one line per finished step elsewhere; always on stderr.

For long builds. Not a log: what happened is in the manifest.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

_LINE_SECONDS = 2.0


class Steps:
    """Steps one after the other. Use as a context manager; `quiet` shows nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet)
        self._live = self._console.is_terminal and not quiet
        columns = (
            TextColumn("{task.description:<28}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
        )
        self._progress = Progress(*columns, console=self._console, disable=not self._live)
        self._current: tuple[str, TaskID, float] | None = None

    def __enter__(self) -> Steps:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self._finish()
        self._progress.stop()

    def step(self, label: str, total: int) -> Callable[[int], None]:
        """Begin a step of `total` units (bytes, files, ...); the result advances it by some."""
        self._finish()
        task = self._progress.add_task(label, total=max(total, 1))
        self._current = (label, task, time.monotonic())
        return lambda amount: self._progress.update(task, advance=amount)

    def _finish(self) -> None:
        if self._current is None:
            return
        label, task, started = self._current
        self._current = None
        self._progress.update(task, completed=self._progress.tasks[task].total)
        seconds = time.monotonic() - started
        if not self._live and seconds >= _LINE_SECONDS:
            self._console.print(f"{label}: {seconds:.1f} s", highlight=False)
