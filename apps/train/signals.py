"""SIGTERM and SIGINT as a request to stop at the next safe point, whatever the run is doing.

Not for saving (loop.py decides): the handler only notes the signal, since it may interrupt a log write.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Literal, NamedTuple, get_args

Phase = Literal["startup", "step", "evaluation", "checkpoint", "shutdown"]
PHASES: tuple[Phase, ...] = get_args(Phase)


class Received(NamedTuple):
    """Which signal came, and what the run was doing."""

    signal: str
    phase: Phase


class Interrupted(RuntimeError):
    """Work that may be thrown away was left because of a signal."""


class SignalGuard:
    """Remembers the first signal; a second one ends the process at once (every write is safe to cut off)."""

    def __init__(self) -> None:
        self.phase: Phase = "startup"
        self.received: Received | None = None
        self._reported = False

    def install(self) -> None:
        """Take SIGTERM and SIGINT over; call first thing in the process."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = Received(signal.Signals(number).name, self.phase)

    def leave(self) -> None:
        """The end is near and orderly: torchrun's SIGTERM to ranks that outlive the first one changes nothing."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)

    def take_unreported(self) -> Received | None:
        """The signal, the first time it is asked for after it came; for the log."""
        if self.received is None or self._reported:
            return None
        self._reported = True
        return self.received

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Name what the run is doing, for the log."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def check(self) -> None:
        """Leave work that can be thrown away."""
        if self.received is not None:
            raise Interrupted(self.received.signal)
