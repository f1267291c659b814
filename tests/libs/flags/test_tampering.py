"""`fathom flags verify` on a run's directory: each way to tamper with it, at its beginning, middle and end, is found
with the first bad record named; and a run killed before its first anchor is no exception."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from libs.flags import runs, witness
from libs.flags.audit import AuditLog
from libs.flags.audit_record import audit_path, record_hash
from libs.flags.canonical import canonical_json
from libs.flags.cli import main_flags
from libs.flags.errors import run_entry
from libs.flags.events import RunStart
from libs.flags.runlog import RunLog, log_path
from libs.flags.runs import verify_run

Write = Callable[..., Path]
Lines = list[bytes]
POSITIONS = ("first", "middle", "last")


@pytest.fixture
def run(write_run: Write, tmp_path: Path) -> Path:
    """A finished run: its last anchor is in run.stop."""
    return write_run(tmp_path / "run")


@pytest.fixture
def killed(write_run: Write, tmp_path: Path) -> Path:
    """A run that was killed before its first checkpoint: no anchor anywhere."""
    folder = write_run(tmp_path / "killed", stop=False)
    kept = [line for line in _read(log_path(folder)) if b"audit_anchor" not in line]
    _write(log_path(folder), kept)
    assert witness.read_digest(folder).anchors() == {}
    return folder


def _read(path: Path) -> Lines:
    return path.read_bytes().splitlines(keepends=True)


def _write(path: Path, lines: Lines) -> None:
    path.write_bytes(b"".join(lines))


def _at(position: str, count: int) -> int:
    return {"first": 0, "middle": count // 2, "last": count - 1}[position]


def _forged(lines: Lines, at: int) -> bytes:
    """A sound record that follows record at - 1, as someone with the code would write it."""
    record = json.loads(lines[min(at, len(lines) - 1)]) | {"seq": at, "reason": "nothing to see here"}
    record["prev"] = json.loads(lines[at - 1])["hash"] if at else "0" * 64
    record["hash"] = record_hash(record)
    return canonical_json(record) + b"\n"


def _edit(lines: Lines, at: int) -> int:
    middle = len(lines[at]) // 2
    lines[at] = lines[at][:middle] + bytes([lines[at][middle] ^ 1]) + lines[at][middle + 1 :]
    return at


def _edit_newline(lines: Lines, at: int) -> int:
    lines[at] = lines[at][:-1] + b" "
    return at


def _delete(lines: Lines, at: int) -> int:
    del lines[at]
    return at


def _swap(lines: Lines, at: int) -> int:
    first = min(at, len(lines) - 2)
    lines[first], lines[first + 1] = lines[first + 1], lines[first]
    return first


def _insert_copy(lines: Lines, at: int) -> int:
    lines.insert(at + 1, lines[at])
    return at + 1


def _insert_forged(lines: Lines, at: int) -> int:
    """Behind the record; behind the last one it is a flawless link."""
    lines.insert(at + 1, _forged(lines, at + 1))
    return at + 1


def _cut(lines: Lines, at: int) -> int:
    del lines[at:]
    return at


TAMPERINGS = (_edit, _edit_newline, _delete, _swap, _insert_copy, _insert_forged, _cut)


def _verify(run: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = run_entry(main_flags, ["verify", str(run)])
    return status, capsys.readouterr().err


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("tamper", TAMPERINGS)
def test_the_first_bad_record_is_named(
    run: Path, tamper: Callable[[Lines, int], int], position: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _verify(run, capsys) == (0, "")
    lines = _read(audit_path(run))
    bad = tamper(lines, _at(position, len(lines)))
    _write(audit_path(run), lines)
    status, error = _verify(run, capsys)
    assert status == 2
    assert f" at record {bad}:" in error, error


@pytest.mark.parametrize("position", POSITIONS)
def test_a_tail_cut_from_a_killed_run_is_missed_by_what_its_log_tells(
    killed: Path, position: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _verify(killed, capsys) == (0, "")
    lines = _read(audit_path(killed))
    bad = _cut(lines, _at(position, len(lines)))
    _write(audit_path(killed), lines)
    status, error = _verify(killed, capsys)
    assert status == 2
    assert f"tampered (truncate) at record {bad}:" in error
    assert "the run log tells of" in error


def test_a_chain_written_anew_without_a_record_is_found_in_a_killed_run(killed: Path) -> None:
    """Numbers, links and hashes all fit; the log still tells of the gate."""
    lines, prev = _read(audit_path(killed)), "0" * 64
    del lines[3]
    for at, line in enumerate(lines):
        record = json.loads(line) | {"seq": at, "prev": prev}
        prev = record["hash"] = record_hash(record)
        lines[at] = canonical_json(record) + b"\n"
    _write(audit_path(killed), lines)
    assert verify_run(killed)[0].status == "tampered"


def test_an_attempt_that_has_begun_may_write(run: Path) -> None:
    """The end that run.stop marks holds until the log has another attempt."""
    with RunLog.open(run, run_id="run", attempt=1) as log:
        log.emit(RunStart(command=["x"], recipe=None, config_hash="c", gates_hash=None, world_size=1))
        audit = AuditLog.open(audit_path(run), "run", 1)
        audit.record("off", gate="tma", reason="never requested", source="default")
        audit.close()
    assert verify_run(run)[0].status == "intact"


def test_an_attempt_that_begins_while_the_chain_is_read_is_no_tampering(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log is read first; what is written between the two readings is not held against the chain."""
    stale = witness.read_digest(run)
    test_an_attempt_that_has_begun_may_write(run)
    answers = iter([stale, witness.read_digest(run)])
    monkeypatch.setattr(runs, "read_digest", lambda *_: next(answers))
    assert verify_run(run)[0].status == "intact"
    monkeypatch.setattr(runs, "read_digest", lambda *_: stale)
    assert verify_run(run)[0].kind == "insert"


@pytest.mark.parametrize("skipped", ["_cut_tail", "_beyond_the_end"])
def test_the_tests_above_would_see_a_skipped_check(
    run: Path, killed: Path, skipped: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, tamper = (killed, _cut) if skipped == "_cut_tail" else (run, _insert_forged)
    lines = _read(audit_path(folder))
    tamper(lines, len(lines) - 1)
    _write(audit_path(folder), lines)
    monkeypatch.setattr(runs, skipped, lambda *_: None)
    assert verify_run(folder)[0].status == "intact"
    monkeypatch.undo()
    assert verify_run(folder)[0].status == "tampered"


def test_a_step_is_counted_and_the_last_one_kept(run: Path) -> None:
    digest = witness.read_digest(run)
    names = [event["event"] for event in digest.events]
    assert digest.steps == 3
    assert names.count("train.step") == 1
    assert digest.events[names.index("train.step")]["step"] == 3
    assert names[names.index("train.step") + 1] == "checkpoint.begin"
