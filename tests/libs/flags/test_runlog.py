"""The run log: its envelope, its models, its lines, crashes and attempts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import ValidationError

from libs.flags import events
from libs.flags.errors import UserError
from libs.flags.events import (
    ENVELOPE_FIELDS,
    EVENTS,
    AnomalyNonfinite,
    CheckpointBegin,
    ConfigResolved,
    EvalResult,
    Event,
    SignalReceived,
    TrainStep,
)
from libs.flags.runlog import RunLog, log_path, next_attempt, parse_line, parse_record, read_events

# GATES.md's list; anomaly.* and two events for backends and accepted changes are ours.
NAMES = [
    "run.start",
    "config.resolved",
    "gates.resolved",
    "gate.refused",
    "gate.exposed",
    "env.snapshot",
    "kernel.compiled",
    "kernel.selftest",
    "data.fingerprint",
    "train.step",
    "eval.result",
    "checkpoint.begin",
    "checkpoint.commit",
    "checkpoint.abort",
    "checkpoint.restore",
    "anomaly.nonfinite",
    "anomaly.generic",
    "signal.received",
    "run.stop",
    "backend.chosen",
    "gate.changed",
]
SIGNAL = SignalReceived(signal="SIGTERM", phase="step")


def _open(folder: Path, attempt: int = 0, run_id: str = "run", rank: int = 0) -> RunLog:
    return RunLog.open(folder, run_id=run_id, attempt=attempt, rank=rank)


def test_the_events_are_those_of_the_design() -> None:
    assert sorted(EVENTS) == sorted(NAMES)


@pytest.mark.parametrize("model", EVENTS.values(), ids=lambda model: model.name)
def test_no_event_takes_extra_or_envelope_fields(model: type[Event]) -> None:
    assert model.model_config["extra"] == "forbid"
    assert model.model_config["frozen"] is True
    assert not set(model.model_fields) & set(ENVELOPE_FIELDS)


def test_envelope(tmp_path: Path) -> None:
    with _open(tmp_path, attempt=2, rank=3) as log:
        log.emit(SIGNAL, step=7, level="warning")
        log.emit(SIGNAL)
    first, second = read_events(tmp_path, rank=3)
    assert tuple(first)[: len(ENVELOPE_FIELDS)] == ENVELOPE_FIELDS
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", first["ts"])
    assert first["mono_ns"] <= second["mono_ns"]
    plain = {
        "schema": 1,
        "run_id": "run",
        "attempt": 2,
        "rank": 3,
        "level": "warning",
        "event": "signal.received",
    }
    assert plain.items() <= first.items()
    assert (first["step"], second["step"], second["level"]) == (7, None, "info")
    assert (first["signal"], first["phase"]) == ("SIGTERM", "step")
    assert parse_record(first).event == SIGNAL
    assert log_path(tmp_path, 3).name == "rank00003.jsonl"


def test_unknown_events_raise(tmp_path: Path) -> None:
    class Nameless(Event):
        x: int

    with _open(tmp_path) as log:
        for stranger in (Nameless(x=1), object(), {"event": "train.step"}):
            with pytest.raises(TypeError, match="not the model of a known event"):
                log.emit(stranger)  # type: ignore[arg-type]
    assert log_path(tmp_path).read_bytes() == b""


def test_an_event_cannot_be_defined_twice_or_take_the_envelope(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "EVENTS", dict(EVENTS))
    with pytest.raises(AssertionError, match="two models"):

        class Again(Event):
            name: ClassVar[str] = "run.stop"

    with pytest.raises(AssertionError, match="envelope"):

        class Thief(Event):
            name: ClassVar[str] = "thief"
            rank: int


def test_steps_are_needed_where_they_matter(tmp_path: Path, train_step: Callable[..., TrainStep]) -> None:
    with _open(tmp_path) as log:
        for event in (train_step(1), CheckpointBegin(path="p")):
            with pytest.raises(TypeError, match="needs a step"):
                log.emit(event)


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (SignalReceived, {"signal": "SIGTERM"}),
        (SignalReceived, {"signal": "SIGTERM", "phase": "x", "extra": 1}),
        (EvalResult, {"suite": "s", "metrics": {"bpb": float("nan")}, "n": 1, "excluded": 0}),
        (EvalResult, {"suite": "s", "metrics": {"bpb": "low"}, "n": 1, "excluded": 0}),
        (ConfigResolved, {"config": {"x": object()}, "origins": {}}),
    ],
)
def test_bad_fields_are_refused(model: type[Event], fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        model(**fields)


@pytest.mark.parametrize("field", ["loss", "bpb", "grad_norm", "lr", "time_s"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_holds_finite_numbers(train_step: Callable[..., TrainStep], field: str, value: float) -> None:
    with pytest.raises(ValidationError, match="finite"):
        train_step(1, **{field: value})


def test_mfu_or_its_reason(train_step: Callable[..., TrainStep]) -> None:
    assert train_step(1, mfu=0.4, mfu_reason=None).mfu == 0.4
    for mfu, reason in ((None, None), (0.4, "why")):
        with pytest.raises(ValidationError, match="mfu"):
            train_step(1, mfu=mfu, mfu_reason=reason)


@pytest.mark.parametrize(("value", "written"), [(float("nan"), "nan"), (float("-inf"), "-inf"), (2.5, 2.5)])
def test_a_nonfinite_value_is_spelled(tmp_path: Path, value: float, written: object) -> None:
    with _open(tmp_path) as log:
        log.emit(AnomalyNonfinite(what="loss", value=value, bundle=None, action="stop"), step=1, level="error")
    (record,) = read_events(tmp_path)
    assert record["value"] == written
    parse_record(record)


def test_lines_are_strict_ascii_json(tmp_path: Path) -> None:
    text = 'ünï\n\u2028 "quoted" %s %d {x}'
    with _open(tmp_path) as log:
        log.emit(SignalReceived(signal=text, phase=text))
    raw = log_path(tmp_path).read_bytes()
    assert raw.isascii()
    assert raw.count(b"\n") == 1
    assert json.loads(raw)["signal"] == text


def test_killed_in_mid_run(tmp_path: Path) -> None:
    """Every emitted line is there after SIGKILL, although nobody closed the log."""
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from libs.flags.runlog import RunLog; from libs.flags.events import SignalReceived\n"
        "log = RunLog.open(Path(sys.argv[1]), run_id='run', attempt=0, rank=0)\n"
        "for i in range(50): log.emit(SignalReceived(signal='s', phase=str(i)))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60).returncode == -9
    assert [record["phase"] for record in read_events(tmp_path)] == [str(i) for i in range(50)]


def test_attempts_append(tmp_path: Path) -> None:
    assert next_attempt(tmp_path) == 0
    for attempt in range(3):
        assert next_attempt(tmp_path) == attempt
        with _open(tmp_path, attempt=attempt) as log:
            log.emit(SIGNAL)
    assert [record["attempt"] for record in read_events(tmp_path)] == [0, 1, 2]


def test_a_torn_line_is_cut_kept_as_text_and_reported(tmp_path: Path) -> None:
    with _open(tmp_path) as log:
        log.emit(SIGNAL)
    path = log_path(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:40])
    assert len(list(read_events(tmp_path))) == 1
    with _open(tmp_path, attempt=1) as log:
        log.emit(SIGNAL)
    records = list(read_events(tmp_path))
    assert [record["event"] for record in records] == [
        "signal.received",
        "anomaly.generic",
        "signal.received",
    ]
    assert records[1]["what"] == "torn_line"
    assert records[1]["details"] == {"bytes": 40, "text": whole[:40].decode()}
    for record in records:
        parse_record(record)


def test_only_a_torn_line(tmp_path: Path) -> None:
    path = log_path(tmp_path)
    path.parent.mkdir(parents=True)
    path.write_bytes(b'{"schema":1,"ts')
    assert list(read_events(tmp_path)) == []
    assert next_attempt(tmp_path) == 0
    with _open(tmp_path) as log:
        log.emit(SIGNAL)
    assert len(list(read_events(tmp_path))) == 2


def test_the_log_of_another_run(tmp_path: Path) -> None:
    with _open(tmp_path) as log:
        log.emit(SIGNAL)
    with pytest.raises(UserError, match="log of run 'run', not of 'other'"):
        _open(tmp_path, run_id="other")


def test_two_writers(tmp_path: Path) -> None:
    with _open(tmp_path), pytest.raises(UserError, match="another process"):
        _open(tmp_path)
    _open(tmp_path).close()


def test_no_log(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run log"):
        list(read_events(tmp_path))


@pytest.mark.parametrize("line", [b"not json", b"[1]", b"3", b"\xff\xfe"])
def test_a_whole_line_that_is_not_json(tmp_path: Path, line: bytes) -> None:
    path = log_path(tmp_path)
    path.parent.mkdir(parents=True)
    path.write_bytes(line + b"\n")
    with pytest.raises(UserError, match="line 1"):
        list(read_events(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"ts": "2026-01-01 00:00:00"},
        {"ts": "2026-01-01T00:00:00.000000+01:00"},
        {"attempt": -1},
        {"rank": "0"},
        {"level": "loud"},
        {"step": -1},
        {"mono_ns": 1.5},
        {"run_id": ""},
        {"phase": 3},
        {"surprise": 1},
    ],
)
def test_parse_refuses(tmp_path: Path, change: dict[str, Any]) -> None:
    with _open(tmp_path) as log:
        log.emit(SIGNAL)
    (record,) = read_events(tmp_path)
    for parse in (parse_record, parse_line):
        parse(record)
        with pytest.raises(ValidationError):
            parse(record | change)


def test_parse_refuses_unknown_events_and_missing_fields(tmp_path: Path) -> None:
    with _open(tmp_path) as log:
        log.emit(SIGNAL)
    (record,) = read_events(tmp_path)
    for parse in (parse_record, parse_line):
        with pytest.raises(UserError, match=r"did you mean 'signal\.received'"):
            parse(record | {"event": "signal.recieved"})
        for name in record:
            with pytest.raises(ValidationError):
                parse({key: value for key, value in record.items() if key != name})


def test_both_parsers_see_the_same(tmp_path: Path, train_step: Callable[..., TrainStep]) -> None:
    with _open(tmp_path) as log:
        log.emit(SIGNAL)
        log.emit(train_step(3), step=3)
    for record in read_events(tmp_path):
        slow, fast = parse_record(record), parse_line(record)
        assert isinstance(fast.event, type(slow.event))
        assert fast.event.name == slow.event.name
        assert fast.event.model_dump(by_alias=True) == slow.event.model_dump() | slow.envelope.model_dump(by_alias=True)
