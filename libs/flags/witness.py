"""What the run log of one rank attests about its audit chain: anchors, the records it tells of, and an end.

Not for judging a chain by itself (see `verify`) nor the log (see `logcheck`). Train steps are counted, not kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from libs.flags.audit_record import Anchor
from libs.flags.errors import UserError
from libs.flags.runlog import decode_line, log_path

# How the log spells the one event that it holds by the thousand.
_STEP = b'"event":"train.step"'
_MOST_RANKS = 100_000  # five digits in the names of the files
_RECORD_OF = {"gate.refused": "refused", "gate.exposed": "exposed", "gate.changed": "change_accepted"}


class Told(NamedTuple):
    """One record of the chain that the log tells of: what became of a gate in an attempt."""

    attempt: int
    event: str
    gate: str | None


class LogDigest(NamedTuple):
    """The log of one rank without its train steps. events: in order, with the last train step where it stood."""

    events: list[dict[str, Any]]
    steps: int

    @property
    def run_id(self) -> str | None:
        return str(self.events[0].get("run_id")) if self.events else None

    def anchors(self) -> dict[str, Anchor]:
        """Where an anchor was found -> the anchor.

        Raises:
            UserError: something that is not an anchor stands in its place.
        """
        found: dict[str, Anchor] = {}
        for event in self.events:
            text = event.get("audit_anchor")
            if text is not None:
                found[f"run log, {event.get('event')} at {event.get('ts')}"] = Anchor.parse(str(text))
        return found

    def told(self) -> list[Told]:
        """The records that are in the chain if the log tells the truth: each is written there first.

        Raises:
            UserError: an event of the log lacks its fields.
        """
        found: list[Told] = []
        for event in self.events:
            name = event.get("event")
            try:
                if name == "gates.resolved":
                    found += [_told(event["attempt"], row["outcome"], row["gate"]) for row in event["gates"]]
                elif name in _RECORD_OF:
                    found.append(_told(event["attempt"], _RECORD_OF[name], event["gate"]))
            except (KeyError, TypeError) as error:
                raise UserError(f"the run log is damaged at {name}: {error!r}; see `fathom log check`") from error
        return found

    def world(self) -> int:
        """How many ranks have surely begun records of their own: those of the largest attempt that opened its data.

        No rank comes that far before all have opened log and chain; an attempt that died earlier proves nothing.

        Raises:
            UserError: run.start does not say how many there are.
        """
        size, most = 0, 0
        for event in self.events:
            if event.get("event") == "run.start":
                size = event.get("world_size", 0)
                if not isinstance(size, int) or size not in range(_MOST_RANKS + 1):
                    raise UserError(f"the run log is damaged: run.start of {size!r} ranks; see `fathom log check`")
            elif event.get("event") == "data.fingerprint":
                most = max(most, size)
        return most

    def end(self) -> Anchor | None:
        """The chain's head when the last attempt stopped; None while one goes on, or when the log does not say."""
        last = self.events[-1] if self.events else {}
        if last.get("event") != "run.stop" or last.get("audit_anchor") is None:
            return None
        return Anchor.parse(str(last["audit_anchor"]))


def _told(attempt: object, event: object, gate: object) -> Told:
    if not (isinstance(attempt, int) and isinstance(event, str) and isinstance(gate, str | None)):
        raise TypeError(f"attempt {attempt!r}, event {event!r}, gate {gate!r}")
    return Told(attempt, event, gate)


def read_digest(run: Path, rank: int = 0) -> LogDigest:
    """Read the log of one rank; an empty digest when it has none. A line still being written is left out.

    Raises:
        UserError: a whole line is not a JSON object.
    """
    path = log_path(run, rank)
    events: list[dict[str, Any]] = []
    steps, last_step = 0, None
    if not path.is_file():
        return LogDigest(events, steps)
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            if _STEP in line and b"audit_anchor" not in line:
                steps, last_step = steps + 1, (len(events), number, line)
                continue
            events.append(decode_line(path, number, line))
    if last_step is not None:
        at, number, line = last_step
        events.insert(at, decode_line(path, number, line))
    return LogDigest(events, steps)
