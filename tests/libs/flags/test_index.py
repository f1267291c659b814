"""The index answers as the files do: after every kind of change, and after its own file was damaged or changed."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from libs.flags import index as index_module
from libs.flags.audit_record import audit_path
from libs.flags.errors import UserError
from libs.flags.events import GateChanged
from libs.flags.index import FILE_NAME, RunIndex, files_of
from libs.flags.registry import GateSpec
from libs.flags.runlog import RunLog, log_path
from libs.flags.summary import RunSummary, summarise

Write = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def folder(write_run: Write, working_catalog: Mapping[str, GateSpec], tmp_path: Path) -> Path:
    """One run with its gates off, one with two active, one refused."""
    runs = tmp_path / "runs"
    write_run(runs / "a", {}, working_catalog)
    write_run(runs / "b", {"FATHOM_ALPHA": "1", "FATHOM_GAMMA": "third"}, working_catalog)
    write_run(runs / "c", {"FATHOM_PSIV_CACHE": "gmem_pool"})
    return runs


def _from_files(folder: Path) -> list[RunSummary]:
    """The slow way: no index at all."""
    return [summarise(path) for path in sorted(folder.iterdir()) if path.is_dir()]


def _open(folder: Path, **options: bool) -> list[RunSummary]:
    index = RunIndex.open(folder, **options)
    found = index.runs()
    index.close()
    return found


def _read_again(folder: Path) -> tuple[list[RunSummary], list[str]]:
    index = RunIndex.open(folder)
    found, notes = index.runs(), index.notes
    index.close()
    return found, notes


def test_it_says_what_the_files_say(folder: Path) -> None:
    for _ in range(2):  # made, then read back
        found, notes = _read_again(folder)
        assert found == _from_files(folder)
        assert notes == []
    a, b, c = found
    assert (a.status, a.step, a.valid_bpb, a.chain, a.problem) == ("completed", 3, None, "intact", None)
    assert b.has_gate("alpha", "active")
    assert b.has_gate("alpha", "active", "on")
    assert b.has_gate("gamma", "active", "third")
    assert not b.has_gate("gamma", "active", "first")
    assert not a.has_gate("alpha", "active")
    assert a.has_gate("alpha", "off")
    assert (c.status, c.refusals[0].gate, c.refusals[0].value) == ("refused", "psiv_cache", "gmem_pool")
    assert "has no stage gmem_pool" in c.refusals[0].why


def test_an_unchanged_run_is_not_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _open(folder)
    monkeypatch.setattr(index_module, "summarise", lambda run: pytest.fail(f"{run} was read again"))
    assert len(_open(folder)) == 3


def test_new_grown_and_removed_runs(folder: Path, write_run: Write, working_catalog: Mapping[str, GateSpec]) -> None:
    index = RunIndex.open(folder)
    write_run(folder / "a", {"FATHOM_ALPHA": "1"}, working_catalog)
    write_run(folder / "d", {}, working_catalog)
    for path in (audit_path(folder / "b"), log_path(folder / "b")):
        path.unlink()
        path.parent.rmdir()
    (folder / "b" / "checkpoints").mkdir()
    assert index.refresh() == (2, 1, 1)
    assert [run.run for run in index.runs()] == ["a", "c", "d"]
    assert index.runs()[0].has_gate("alpha", "active")
    assert index.runs() == [summarise(folder / name) for name in "acd"]
    assert index.refresh() == (0, 3, 0)
    index.close()


def _same_size_edit(path: Path) -> None:
    """As someone who hides it: the same length, and the old time put back."""
    stat = path.stat()
    path.write_bytes(path.read_bytes().replace(b'"gate":"beta"', b'"gate":"bete"', 1))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_mtime_ns == stat.st_mtime_ns
    assert path.stat().st_size == stat.st_size


def test_an_edit_that_keeps_size_and_time_is_seen(folder: Path) -> None:
    assert _open(folder)[0].problem is None
    _same_size_edit(audit_path(folder / "a"))
    bad = _open(folder)[0]
    assert bad.chain == "tampered"
    assert "tampered (edit) at record 1" in str(bad.problem)
    assert (bad.gates, bad.attempts) == ({}, ())


def test_of_a_chain_every_byte_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where a file system keeps no times at all."""
    monkeypatch.setattr(index_module, "_times", lambda stat: f"{stat.st_size}")
    before = files_of(folder / "a")
    _same_size_edit(audit_path(folder / "a"))
    assert files_of(folder / "a") != before


def test_a_commit_marker_counts(folder: Path) -> None:
    """An uncommitted checkpoint vouches for nothing; the marker alone makes it a witness."""
    state = folder / "a" / "checkpoints" / "step-00000003" / "trainer.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"audit_anchor": "1" * 64 + ":3"}))
    assert _open(folder)[0].problem is None
    (state.parent / "COMMITTED").write_text("")
    assert "tampered" in str(_open(folder)[0].problem)


@pytest.mark.parametrize("content", [b"", b"not a database, but long enough to look like a header of one " * 40])
def test_a_file_that_is_no_database_is_made_anew(folder: Path, content: bytes) -> None:
    _open(folder)
    (folder / FILE_NAME).write_bytes(content)
    found, notes = _read_again(folder)
    assert found == _from_files(folder)
    assert bool(notes) == bool(content)  # an empty file is an empty database
    assert _read_again(folder)[1] == []


@pytest.mark.parametrize("offset", range(100, 16384, 1511))
def test_overwritten_pages_never_answer(folder: Path, offset: int) -> None:
    _open(folder)
    path = folder / FILE_NAME
    content = bytearray(path.read_bytes())
    content[offset : offset + 64] = b"\xa5" * 64
    path.write_bytes(content)
    assert _open(folder) == _from_files(folder)


def _sql(folder: Path, statement: str) -> list[tuple[object, ...]]:
    with sqlite3.connect(folder / FILE_NAME) as database:
        rows = database.execute(statement).fetchall()
    database.close()
    return rows


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE runs SET summary = replace(summary, 'completed', 'failed')",
        "UPDATE runs SET summary = replace(summary, '\"off\"', '\"active\"') WHERE run = 'a'",
        "UPDATE runs SET files = (SELECT files FROM runs WHERE run = 'b') WHERE run = 'a'",
        "UPDATE runs SET run = 'z' WHERE run = 'a'",
        "DELETE FROM runs WHERE run = 'a'",
        "INSERT INTO runs VALUES ('ghost', 'f', '{}', 'd')",
        "UPDATE made_by SET code = 'another version'",
        "DROP TABLE runs",
        "DROP VIEW gates",
    ],
)
def test_a_changed_row_is_not_believed(folder: Path, statement: str) -> None:
    _open(folder)
    _sql(folder, statement)
    assert _open(folder) == _from_files(folder)
    assert _read_again(folder) == (_from_files(folder), [])


def test_a_row_of_another_version_is_not_believed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even one that was written after this version had looked at who made the index."""
    _open(folder)
    real, of_this = summarise, index_module._code()
    with monkeypatch.context() as other:
        other.setattr(index_module, "_code", lambda: "another version")
        other.setattr(index_module, "summarise", lambda run: real(run).model_copy(update={"status": "wrong"}))
        _open(folder)
    _sql(folder, f"UPDATE made_by SET code = '{of_this}'")
    found, notes = _read_again(folder)
    assert found == _from_files(folder)
    assert "another version's" in notes[0]
    assert _read_again(folder) == (found, [])


def test_views_of_another_version_are_replaced(folder: Path) -> None:
    _open(folder)
    for statement in (
        "DROP VIEW gates",
        "CREATE VIEW gates AS SELECT run FROM runs",
        "UPDATE made_by SET code = 'another version'",
    ):
        _sql(folder, statement)
    _open(folder)
    assert _sql(folder, "SELECT gate FROM gates WHERE outcome = 'active'") == [("alpha",), ("gamma",)]


def test_asked_for_anew(folder: Path) -> None:
    _open(folder)
    assert _open(folder, rebuild=True) == _from_files(folder)


def test_a_folder_that_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(place: str) -> sqlite3.Connection:
        if place == ":memory:":
            return connect(place)
        error = sqlite3.OperationalError("attempt to write a readonly database")
        error.sqlite_errorcode = sqlite3.SQLITE_READONLY
        raise error

    connect = index_module._connect
    monkeypatch.setattr(index_module, "_connect", refuse)
    found, notes = _read_again(folder)
    assert found == _from_files(folder)
    assert "cannot be written" in notes[0]
    assert not (folder / FILE_NAME).exists()


@pytest.mark.parametrize("options", [["--json"], ["--json", "--rebuild"]])
def test_no_file_may_be_as_large_as_the_index(folder: Path, options: list[str]) -> None:
    """`ulimit -f`: sqlite calls it a disk I/O error."""
    call = f"from libs.flags.fleet_cli import main_runs; main_runs(['list', {str(folder)!r}, *{options!r}])"
    command = ["bash", "-c", 'ulimit -f 1; exec "$0" "$@"', sys.executable, "-c", call]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert [row["run"] for row in json.loads(done.stdout)] == ["a", "b", "c"]
    assert "cannot be written" in done.stderr


def test_a_locked_index_is_waited_for_and_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _open(folder)
    monkeypatch.setattr(index_module, "_LOCK_SECONDS", 0.05)
    with sqlite3.connect(folder / FILE_NAME) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UserError, match="wait for its writer"):
            RunIndex.open(folder)
    other.close()


def test_in_memory_nothing_is_written(folder: Path) -> None:
    assert _open(folder, stored=False) == _from_files(folder)
    assert not (folder / FILE_NAME).exists()


def test_views_for_people(folder: Path) -> None:
    _open(folder)
    assert _sql(folder, "SELECT run, gate, value FROM gates WHERE outcome = 'active'") == [
        ("b", "alpha", 1),
        ("b", "gamma", "third"),
    ]
    assert _sql(folder, "SELECT run, variable FROM refusals") == [("c", "FATHOM_PSIV_CACHE")]


def test_a_damaged_log_is_a_problem_not_an_error(folder: Path) -> None:
    with log_path(folder / "a").open("ab") as file:
        file.write(b'{"event":"run.stop"}\n')
    with log_path(folder / "b").open("ab") as file:
        file.write(b"garbage\n")
    a, b, c = _open(folder)
    assert "damaged" in str(a.problem)
    assert "is not JSON" in str(b.problem)
    assert c.problem is None


def test_a_running_run_is_open(write_run: Write, tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "x", stop=False)
    assert summarise(run).status == "open"
    with RunLog.open(run, run_id="x", attempt=0) as log:
        log.emit(GateChanged(gate="tma", old="off", new="fwd"))
    # The log tells of a change that the chain does not have.
    assert summarise(run).chain == "tampered"
