"""One run of a folder that cannot be read: it is listed with its problem, and the others as if it were not there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from libs.flags.audit_record import GENESIS, audit_path, record_hash
from libs.flags.canonical import canonical_json
from libs.flags.cli import main_flags, main_log
from libs.flags.errors import UserError, run_entry
from libs.flags.fleet_cli import main_runs
from libs.flags.index import FILE_NAME, RunIndex
from libs.flags.runlog import log_path, next_attempt
from libs.flags.runs import find_run, is_run, name_of
from libs.flags.summary import summarise

Write = Callable[..., Path]
NOBODY = 65534


@pytest.fixture
def folder(write_run: Write, tmp_path: Path) -> Path:
    """Three good runs; the tests damage the middle one."""
    for name in "abc":
        write_run(tmp_path / "runs" / name)
    return tmp_path / "runs"


def _not_finite(text: str) -> float:
    raise AssertionError(f"{text} is not JSON")


def _listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Run -> its problem, by the command; the second answer, from the index, must be the first one."""
    answers = []
    for _ in range(2):
        status = run_entry(main_runs, ["list", str(folder), "--json"])
        rows = json.loads(capsys.readouterr().out, parse_constant=_not_finite)
        problems = {row["run"]: row["problem"] for row in rows}
        assert status == (2 if any(problems.values()) else 0)
        answers.append(rows)
    assert answers[0] == answers[1]
    assert run_entry(main_runs, ["list", str(folder)]) == status
    assert run_entry(main_flags, ["history", str(folder)]) == status
    capsys.readouterr()
    return problems


def _append(run: Path, line: dict[str, object]) -> None:
    with log_path(run).open("ab") as file:
        file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")


def _state(run: Path) -> Path:
    """Where the state of a committed checkpoint would lie."""
    folder = run / "checkpoints" / "step-00000003"
    folder.mkdir(parents=True)
    (folder / "COMMITTED").write_text("")
    return folder / "trainer.json"


def _other_chain(run: Path, **fields: object) -> None:
    """The chain with these values in every record, its hashes right; without a log to say otherwise."""
    prev, lines = GENESIS, []
    for line in audit_path(run).read_bytes().splitlines():
        record = json.loads(line) | fields | {"prev": prev}
        prev = record["hash"] = record_hash(record)
        lines.append(canonical_json(record) + b"\n")
    audit_path(run).write_bytes(b"".join(lines))
    log_path(run).unlink()


def _in_log(run: Path, old: bytes, new: bytes) -> None:
    content = log_path(run).read_bytes()
    assert old in content
    log_path(run).write_bytes(content.replace(old, new))


def _link_loop(run: Path) -> None:
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "s").symlink_to("s")


DAMAGE: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "a link to nowhere": (lambda run: (run / "logs" / "rank00001.jsonl").symlink_to("/gone"), None),
    "a pipe": (lambda run: os.mkfifo(run / "logs" / "rank00001.jsonl"), None),
    "a loop of links": (_link_loop, None),
    "no chain": (lambda run: audit_path(run).rename(run / "aside"), "tampered (missing)"),
    "a gate that is a list": (
        lambda run: _append(run, {"event": "gate.exposed", "attempt": 0, "gate": [], "run_id": "b"}),
        "the run log is damaged at gate.exposed",
    ),
    "a state too deep": (lambda run: _state(run).write_text("[" * 200_000), "trainer.json is not readable"),
    "a state that is a folder": (lambda run: _state(run).mkdir(), "trainer.json is not readable: not a file"),
    "a state that is a pipe": (lambda run: os.mkfifo(_state(run)), "trainer.json is not readable: not a file"),
    "an attempt that is no number": (lambda run: _other_chain(run, attempt="zero"), "attempt 'zero'"),
    "a gate in the chain that is a list": (lambda run: _other_chain(run, gate=[]), "gate []"),
    "a value in the chain that is a list": (lambda run: _other_chain(run, value=[]), "value []"),
    "a loss that is NaN": (lambda run: _in_log(run, b'"loss":2.0', b'"loss":NaN'), "is not JSON"),
    "a loss too large": (lambda run: _in_log(run, b'"loss":2.0', b'"loss":1e999'), "finite number"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", DAMAGE)
def test_the_others_are_listed(folder: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    damage, problem = DAMAGE[what]
    damage(folder / "b")
    found = _listed(folder, capsys)
    assert list(found) == ["a", "b", "c"]
    assert found["a"] is None
    assert found["c"] is None
    if problem is not None:
        assert problem in found["b"]


def test_a_name_that_is_not_utf8(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor may it take the name of another run."""
    (folder / "a").rename(folder / os.fsdecode(b"caf\xe9"))
    (folder / "b").rename(folder / r"caf\udce9")
    audit_path(folder / os.fsdecode(b"caf\xe9")).unlink()
    found = _listed(folder, capsys)
    assert {name: bool(problem) for name, problem in found.items()} == {
        "c": False,
        r"caf\udce9": True,
        r"caf\\udce9": False,
    }
    assert {name_of(path) for path in folder.iterdir() if is_run(path)} == set(found)


@contextmanager
def _someone_else(folder: Path) -> Iterator[None]:
    """As a user who may not read everything: of the folder itself, by relative paths, since the way to it is closed."""
    folder.chmod(0o777)
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize(
    ("closed", "said"),
    [
        ("b", "cannot read b/logs: "),
        ("b/audit", "cannot be read: "),
        ("b/logs/rank00000.jsonl", "cannot be read: "),
        ("b/checkpoints/step-00000003/trainer.json", "is not readable: "),
    ],
)
def test_a_run_of_someone_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], closed: str, said: str
) -> None:
    _state(folder / "b").write_text("{}")
    RunIndex.open(folder, stored=False).close()  # what the first use imports and reads, it may not read then
    monkeypatch.chdir(folder)
    Path(closed).chmod(0)
    try:
        with _someone_else(Path()):
            index = RunIndex.open(Path(), stored=False)
            found = {run.run: run.problem for run in index.runs()}
            index.close()
            for command in (["verify", "b"], ["audit", "b"], ["diff", "a", "b"]):
                assert run_entry(main_flags, command) == 2
            assert run_entry(main_runs, ["show", "b"]) == 2
            assert run_entry(main_log, ["check", "b"]) in (1, 2)
    finally:
        Path(closed).chmod(0o777)
    assert list(found) == ["a", "b", "c"]
    assert (found["a"], found["c"]) == (None, None)
    assert said in str(found["b"])
    assert "Permission denied" in str(found["b"])
    assert "Permission denied" in capsys.readouterr().err


def test_a_folder_of_someone_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    folder.chmod(0o111)
    try:
        with _someone_else(Path()), pytest.raises(UserError, match="cannot read runs: Permission denied"):
            RunIndex.open(Path("runs"), stored=False)
    finally:
        folder.chmod(0o777)


def test_a_run_is_no_folder_of_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, main in ((["list"], main_runs), (["history"], main_flags)):
        assert run_entry(main, [*command, str(folder / "b"), "--rebuild"]) == 2
        assert "is a run: give the folder it lies in" in capsys.readouterr().err
    assert not (folder / "b" / FILE_NAME).exists()
    (folder / "logs").mkdir()  # of a scheduler, say
    (folder / "logs" / "1234.out").write_text("")
    assert [run.run for run in RunIndex.open(folder).runs()][:3] == ["a", "b", "c"]


def test_what_is_not_the_name_of_a_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (str(log_path(folder / "a")), "a" * 300, str(folder / ("a" * 300))):
        assert run_entry(main_runs, ["show", name]) == 2
        error = capsys.readouterr().err
        assert "error: " in error
        assert "checkpoint.commit" not in error, "the content of a log"
    (folder / "latest").write_bytes(b"b\nsecond line\n")
    assert find_run(str(folder / "latest")) == folder / "b"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"config":{"optim":{"lr":0.001}}', b'"config":null'),
        (b'"event":"config.resolved","step":null,"config"', b'"event":"config.resolved","step":null,"other"'),
        (b'"packages":{', b'"packages":[],"were":{'),
    ],
)
def test_runs_with_a_damaged_log_are_not_compared(
    folder: Path, capsys: pytest.CaptureFixture[str], old: bytes, new: bytes
) -> None:
    _in_log(folder / "b", old, new)
    assert run_entry(main_runs, ["diff", str(folder / "a"), str(folder / "b")]) == 2
    assert "the run log is damaged" in capsys.readouterr().err


def test_a_version_that_is_no_text_is_compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _in_log(folder / "b", b'"packages":{', b'"packages":{"x":[1],')
    assert run_entry(main_runs, ["diff", str(folder / "a"), str(folder / "b")]) == 0
    assert "package x" in capsys.readouterr().out


@pytest.mark.parametrize("attempt", ["x", None, -1, 0.5])
def test_an_event_of_no_attempt(
    folder: Path, write_run: Write, capsys: pytest.CaptureFixture[str], attempt: object
) -> None:
    """`log check` reports it, and what it finds in the logs of other ranks; nothing is appended to such a log."""
    write_run(folder / "b", rank=1, stop=False)
    _append(folder / "b", {} if attempt is None else {"attempt": attempt})
    assert run_entry(main_log, ["check", str(folder / "b"), "--json"]) == 1
    reports = {row["rank"]: row["violations"] for row in json.loads(capsys.readouterr().out)}
    assert "schema" in {violation["rule"] for violation in reports[0]}
    assert "run.stop" in {violation["rule"] for violation in reports[1]}
    with pytest.raises(UserError, match="an event of no attempt"):
        next_attempt(folder / "b")


def test_a_read_summary_is_that_of_the_files(folder: Path) -> None:
    _in_log(folder / "b", b'"loss":2.0', b'"loss":NaN')
    for _ in range(2):
        index = RunIndex.open(folder)
        assert index.runs() == [summarise(folder / name) for name in "abc"]
        index.close()
