"""The run log: RUN/logs/rank00000.jsonl, one strict JSON object per line, one file per rank.

Not for the console, and not the audit chain. Not for signal handlers: set a flag there, emit in the loop.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, MutableMapping
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import structlog
from pydantic import BaseModel, ConfigDict, Field, JsonValue
from pydantic_core import from_json

from libs.flags.append_file import AppendFile, read_lines
from libs.flags.canonical import encode, utc_now
from libs.flags.errors import UserError, reading
from libs.flags.events import ENVELOPE_FIELDS, EVENTS, LEVELS, AnomalyGeneric, Event, Level

SCHEMA = 1
TORN_LINE = "torn_line"
_ENCODER = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":"))
# Events after which losing power must not lose the line.
_SYNCED = frozenset({"run.start", "gate.refused", "checkpoint.commit", "checkpoint.restore", "run.stop"})


class Envelope(BaseModel):
    """What every line carries. ts: UTC, RFC 3339. mono_ns: a clock that never goes back within an attempt."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    schema_: Literal[1] = Field(alias="schema")
    ts: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z$")
    mono_ns: int = Field(ge=0)
    run_id: str = Field(min_length=1)
    attempt: int = Field(ge=0)
    rank: int = Field(ge=0)
    level: Level
    event: str
    step: int | None = Field(ge=0)


class Parsed(NamedTuple):
    envelope: Envelope
    event: Event


def log_path(run_dir: Path, rank: int = 0) -> Path:
    return run_dir / "logs" / f"rank{rank:05d}.jsonl"


class _LineLogger:
    """What structlog's last processor hands its line to."""

    def __init__(self, file: AppendFile) -> None:
        self._file = file

    def msg(self, line: bytes) -> None:
        self._file.write_line(line)

    debug = info = warning = error = msg


def _stamp(_logger: object, method: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """structlog processor: the parts of the envelope that depend on the moment, in the envelope's order."""
    stamped = {"schema": SCHEMA, "ts": utc_now(), "mono_ns": time.monotonic_ns(), "level": method, **fields}
    return {name: stamped.pop(name) for name in ENVELOPE_FIELDS} | stamped


def _line(_logger: object, _method: str, fields: MutableMapping[str, Any]) -> bytes:
    """structlog's last processor. The fields stay in their order, for people."""
    return encode(_ENCODER, fields)


class RunLog:
    """The open log of one rank. Attempts append to the same file.

    Usable as a context manager; closing does not write `run.stop`, because only the caller knows the status.
    """

    def __init__(self, file: AppendFile, run_id: str, attempt: int, rank: int) -> None:
        self._file = file
        self.run_id, self.attempt, self.rank = run_id, attempt, rank
        self._logger = structlog.wrap_logger(
            _LineLogger(file),
            processors=[_stamp, _line],
            wrapper_class=structlog.make_filtering_bound_logger(0),
            context_class=dict,
        ).bind(run_id=run_id, attempt=attempt, rank=rank)

    @classmethod
    def open(cls, run_dir: Path, *, run_id: str, attempt: int, rank: int = 0) -> RunLog:
        """Open for appending. A line torn by a crash is cut off and kept, as text, in an anomaly event.

        Raises:
            UserError: the place cannot be written, another process writes it, or the log is of another run.
        """
        file = AppendFile.open(log_path(run_dir, rank))
        try:
            _refuse_other_run(file.path, run_id)
            torn = file.cut_torn_tail()
            log = cls(file, run_id, attempt, rank)
            if torn:
                details: dict[str, JsonValue] = {
                    "bytes": len(torn),
                    "text": torn[:4096].decode("ascii", "backslashreplace"),
                }
                log.emit(AnomalyGeneric(what=TORN_LINE, details=details, action="cut"), level="warning")
        except BaseException:
            file.close()
            raise
        return log

    @property
    def path(self) -> Path:
        return self._file.path

    @property
    def closed(self) -> bool:
        return self._file.closed

    def emit(self, event: Event, *, step: int | None = None, level: Level = "info") -> None:
        """Append one event: one line, handed to the system before this returns."""
        if EVENTS.get(getattr(event, "name", "")) is not type(event):
            raise TypeError(f"{type(event).__name__} is not the model of a known event")
        if step is None and event.needs_step:
            raise TypeError(f"{event.name} needs a step")
        assert level in LEVELS, level
        # Fields are of JSON's types; pydantic's own JSON mode would spell names that are not UTF-8 all alike.
        payload = event.model_dump()
        getattr(self._logger, level)(event.name, step=step, **payload)
        if event.name in _SYNCED:
            self._file.sync()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _refuse_other_run(path: Path, run_id: str) -> None:
    for line in read_lines(path):
        if line.torn:
            return
        found = decode_line(path, line.number, line.content).get("run_id")
        if found != run_id:
            raise UserError(f"{path} is the log of run {found!r}, not of {run_id!r}: choose another one")
        return


def decode_line(path: Path, number: int, content: bytes) -> dict[str, Any]:
    """One whole line of a log.

    Raises:
        UserError: it is not a JSON object.
    """
    try:
        record = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise UserError(f"{path} line {number} is not JSON ({error}); see `fathom log check`") from error
    if not isinstance(record, dict):
        raise UserError(f"{path} line {number} is not a JSON object; see `fathom log check`")
    return record


def read_events(run_dir: Path, *, rank: int = 0) -> Iterator[dict[str, Any]]:
    """The lines of a run's log, envelope and payload flat. A last line still being written is left out.

    Raises:
        UserError: there is no such log, it cannot be read, or a whole line is not JSON.
    """
    path = log_path(run_dir, rank)
    with reading():
        if not path.is_file():
            raise UserError(f"no run log at {path}: not a run directory, or rank {rank} wrote nothing")
        for line in read_lines(path):
            if not line.torn:
                yield decode_line(path, line.number, line.content)


def parse_record(record: dict[str, Any]) -> Parsed:
    """Validate one line of the log against the envelope and the model of its event.

    Raises:
        UserError: an unknown event. pydantic.ValidationError: a field missing, extra or of a wrong type.
    """
    envelope = Envelope.model_validate({name: record[name] for name in ENVELOPE_FIELDS if name in record})
    model = EVENTS.get(envelope.event)
    if model is None:
        raise UserError.unknown("event", envelope.event, EVENTS)
    payload = {name: value for name, value in record.items() if name not in ENVELOPE_FIELDS}
    return Parsed(envelope, model.model_validate(payload, strict=True))


def parse_line(record: dict[str, Any]) -> Parsed:
    """As `parse_record`, in half of its time: envelope and event are one object, of a class that is both."""
    event = record.get("event")
    if not isinstance(event, str) or event not in EVENTS:
        return parse_record(record)  # which says what is wrong
    line: Any = _line_model(event).model_validate(record, strict=True)
    return Parsed(line, line)


@cache
def _line_model(event: str) -> type[BaseModel]:
    return type(f"{EVENTS[event].__name__}Line", (EVENTS[event], Envelope), {"__module__": __name__})


@reading()
def next_attempt(run_dir: Path, *, rank: int = 0) -> int:
    """The number of the attempt that would append now: 0 for a new run, else one above the highest.

    Raises:
        UserError: the log cannot be read, or an event in it does not say of which attempt it is.
    """
    path, highest = log_path(run_dir, rank), -1
    if not path.is_file():
        return 0
    for record in read_events(run_dir, rank=rank):
        attempt = record.get("attempt")
        if not isinstance(attempt, int) or attempt < 0:
            raise UserError(f"{path} has an event of no attempt: {str(record)[:80]}; see `fathom log check`")
        highest = max(highest, attempt)
    return 1 + highest
