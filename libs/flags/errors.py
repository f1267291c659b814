"""Errors a user can meet, and the exit status each one stands for.

Not for our own mistakes: those are `assert`s and stay tracebacks, which is what their reader needs.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import NamedTuple, TextIO

Entry = Callable[[Sequence[str] | None], int]


class ExitStatus(IntEnum):
    """What every command exits with. REQUEUE and GATE_REFUSED: EX_TEMPFAIL and EX_CONFIG of sysexits.h."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    NONFINITE = 70
    REQUEUE = 75
    GATE_REFUSED = 78

    @property
    def meaning(self) -> str:
        """In a few words, for a person."""
        return _MEANINGS[self]


_MEANINGS = {
    ExitStatus.OK: "done",
    ExitStatus.FAILURE: "a check found something, or anything that has no status of its own",
    ExitStatus.USAGE: "unusable input; stderr says what is wrong and what to do",
    ExitStatus.NONFINITE: "loss or gradient not finite",
    ExitStatus.REQUEUE: "interrupted and saved: start again with --resume",
    ExitStatus.GATE_REFUSED: "a gate was refused, or the run cannot be what was asked for",
}


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to `name`, upper and lower case alike, or None when nothing is close."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


class UserError(ValueError):
    """Unusable input (exit 2). The message shows the value, what is allowed, and what to do."""

    @classmethod
    def unknown(cls, kind: str, name: str, known: Iterable[str]) -> UserError:
        """The error for a name that is not in a closed list: shows the nearest one and the whole list."""
        names = list(known)
        close = nearest(name, names)
        hint = f"; did you mean {close!r}?" if close is not None else ""
        return cls(f"unknown {kind} {name!r}{hint} (known: {', '.join(names) or 'none'})")


@contextmanager
def reading() -> Iterator[None]:
    """Around what reads files, or over a function that does: a refusal of the system names the file, as a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {error.filename or 'a file'}: {error.strerror}") from error


class Refusal(NamedTuple):
    """Why one request was not honoured.

    gate: its name, or None when the variable names no gate. value: as it was written. failures: every failed
    precondition. remedies: what to do about it.
    """

    gate: str | None
    variable: str
    value: str
    failures: tuple[str, ...]
    remedies: tuple[str, ...]

    def __str__(self) -> str:
        subject = f"gate {self.gate}" if self.gate is not None else "no such gate"
        lines = [f"{self.variable}={self.value} ({subject}) refused:"]
        lines += [f"  - {failure}" for failure in self.failures]
        lines += [f"  remedy: {remedy}" for remedy in self.remedies]
        return "\n".join(lines)


class RunRefused(RuntimeError):
    """What was asked for is well-formed and cannot be had, so the run does not start (exit 78): a gate that cannot be
    honoured, a kernel that failed its self-test."""


class GateRefused(RunRefused):
    """A requested gate cannot be honoured. Holds every refusal, not one."""

    def __init__(self, refusals: Iterable[Refusal]) -> None:
        self.refusals: tuple[Refusal, ...] = tuple(refusals)
        assert self.refusals, "a refusal without a reason"
        super().__init__("\n".join(str(refusal) for refusal in self.refusals))


def legible(text: str) -> str:
    """Text that may be a file's, for a terminal: control characters are shown and not obeyed, but for line breaks."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def to_nowhere(stream: TextIO) -> None:
    """What is still to be flushed, and all that follows, is lost: else closing the stream would complain once more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def run_entry(main: Entry, argv: Sequence[str] | None = None) -> int:
    """Run an entry point; the errors a user can meet become "error: ..." on stderr and an exit status.

    So does a stdout that is closed or full; a reader that has gone (`fathom ... | head`) gets the status alone.
    """
    if sys.stdout is None:
        print("error: stdout is closed; send it to a file or to /dev/null", file=sys.stderr)
        return ExitStatus.FAILURE
    try:
        try:
            return _status(main, argv)
        finally:
            sys.stdout.flush()  # as the interpreter ends, it would be too late for an exit status
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            if _stdout_takes_more():
                raise
            print(f"error: cannot write to stdout: {error.strerror}", file=sys.stderr)
        to_nowhere(sys.stdout)
        return ExitStatus.FAILURE


def _status(main: Entry, argv: Sequence[str] | None) -> int:
    try:
        return int(main(argv))
    except RunRefused as error:
        print(f"error: {legible(str(error))}", file=sys.stderr)
        return ExitStatus.GATE_REFUSED
    except UserError as error:
        print(f"error: {legible(str(error))}", file=sys.stderr)
        return ExitStatus.USAGE


def _stdout_takes_more() -> bool:
    """Whether an error was another file's: what stdout refused, it refuses again."""
    try:
        print(flush=True)
    except OSError:
        return False
    return True
