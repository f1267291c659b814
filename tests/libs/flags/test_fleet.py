"""`fathom runs` and `fathom flags history`: the questions of a fleet, and how two runs differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from libs.flags.audit import AuditLog
from libs.flags.audit_record import audit_path
from libs.flags.cli import main_flags
from libs.flags.compare import GateChange
from libs.flags.errors import UserError, run_entry
from libs.flags.events import ConfigResolved, RunStart, RunStop
from libs.flags.fleet import Query, differences
from libs.flags.fleet_cli import main_runs
from libs.flags.installed import record_changes
from libs.flags.registry import GateSpec
from libs.flags.runlog import RunLog

Write = Callable[..., Path]


@pytest.fixture
def folder(write_run: Write, tmp_path: Path) -> Path:
    """off: all gates off. refused: two gates. changed: resumed with another value. tampered: a record edited."""
    runs = tmp_path / "runs"
    write_run(runs / "off")
    write_run(runs / "refused", {"FATHOM_PSIV_CACHE": "gmem_pool", "FATHOM_TMAA": "1"})
    write_run(runs / "open", stop=False)
    changed = write_run(runs / "changed", stop=False)
    with RunLog.open(changed, run_id="changed", attempt=0) as log:
        audit = AuditLog.open(audit_path(changed), "changed", 0)
        record_changes([GateChange("tma", "off", "fwd")], audit, log)
        audit.close()
    path = audit_path(write_run(runs / "tampered"))
    path.write_bytes(path.read_bytes().replace(b'"gate":"split_scan"', b'"gate":"split_scam"', 1))
    return runs


def _list(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, list[str], str]:
    status = run_entry(main_runs, ["list", str(folder), "--json", *options])
    out = capsys.readouterr()
    return status, [row["run"] for row in json.loads(out.out)] if out.out else [], out.err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), ["changed", "off", "open", "refused", "tampered"]),
        (("--gate", "psiv_cache"), []),
        (("--gate", "psiv_cache", "--outcome", "refused"), ["refused"]),
        (("--gate", "psiv_cache=gmem_pool", "--outcome", "refused"), ["refused"]),
        (("--gate", "psiv_cache=bwd_fwd_reuse", "--outcome", "refused"), []),
        (("--gate", "FATHOM_TMA=off", "--outcome", "off"), ["changed", "off", "open"]),
        (("--status", "open"), ["changed", "open"]),
        (("--status", "refused"), ["refused"]),
        (("--refused",), ["refused"]),
        (("--changed",), ["changed"]),
        (("--untrusted",), ["tampered"]),
        (("--limit", "2"), ["refused", "tampered"]),
        (("--changed", "--status", "completed"), []),
    ],
)
def test_questions(
    folder: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], expected: list[str]
) -> None:
    status, found, error = _list(folder, capsys, *options)
    assert found == expected
    assert status == (2 if "tampered" in expected else 0)
    assert ("cannot be trusted: tampered: rank 0: tampered (edit) at record" in error) == ("tampered" in expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--gate", "psvi_cache"), "did you mean 'psiv_cache'"),
        (("--gate", "tma=quick"), "unknown value of tma 'quick'"),
        (("--limit", "0"), "allowed are 1 and above"),
        (("--outcome", "refused"), "--outcome refused says nothing without a gate; name it with --gate"),
        (("--outcome", "active"), "--gate"),
        (("--status", "done"), "invalid choice"),
    ],
)
def test_bad_questions(folder: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], said: str) -> None:
    try:
        status = run_entry(main_runs, ["list", str(folder), *options])
    except SystemExit as stop:
        status = int(str(stop.code))
    assert status == 2
    assert said in capsys.readouterr().err


def test_no_such_folder() -> None:
    assert run_entry(main_runs, ["list", "nowhere"]) == 2


def test_tables_hold_the_answers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_entry(main_runs, ["list", str(folder)])
    out = capsys.readouterr().out
    for text in ("5 of 5 runs", "FATHOM_TMAA=1", "tma=fwd", "tampered"):
        assert text in out
    run_entry(main_runs, ["list", str(folder), "--refused"])
    assert "FATHOM_PSIV_CACHE=gmem_pool" in capsys.readouterr().out
    assert run_entry(main_runs, ["show", str(folder / "changed")]) == 0
    assert "changed on resume, attempt 0: tma = fwd; the checkpoint had off" in capsys.readouterr().out
    (folder / "latest").symlink_to("changed")
    assert run_entry(main_runs, ["show", str(folder / "latest")]) == 0
    assert capsys.readouterr().out.startswith("changed "), "the run's name, not the link's"
    assert run_entry(main_runs, ["show", str(folder / "refused")]) == 0
    assert "refused in attempt 0: FATHOM_TMAA=1" in capsys.readouterr().out
    assert run_entry(main_runs, ["show", str(folder / "tampered")]) == 2


def _with_config(run: Path, window: int) -> Path:
    with RunLog.open(run, run_id=run.name, attempt=1) as log:
        log.emit(RunStart(command=["x"], recipe="r", config_hash="c", gates_hash=None, world_size=1))
        config = {"optim": {"lr": 1e-3}, "data": {"window": window}}
        log.emit(ConfigResolved(config=config, origins={}))
    return run


def test_how_two_runs_differ(
    write_run: Write, working_catalog: Mapping[str, GateSpec], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = _with_config(write_run(tmp_path / "a", {"FATHOM_BETA": "fwd"}, working_catalog), 128)
    b = _with_config(write_run(tmp_path / "b", {}, working_catalog, steps=5), 256)
    rows = {row.what: (row.a, row.b) for row in differences(a, b)}
    assert rows == {
        "gate beta": ("active (fwd)", "off (off)"),
        "config.data.window": ("128", "256"),
        "step": ("3", "5"),
        "tokens": ("30", "50"),
    }
    assert run_entry(main_runs, ["diff", str(a), str(b)]) == 0
    assert "config.data.window" in capsys.readouterr().out
    assert run_entry(main_runs, ["diff", str(a), str(a)]) == 0
    assert "do not differ" in capsys.readouterr().out


def test_a_run_that_cannot_be_trusted_is_not_compared(folder: Path) -> None:
    with pytest.raises(UserError, match="tampered"):
        differences(folder / "off", folder / "tampered")


def test_what_runs_are_called_is_no_markup(
    write_run: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write_run(tmp_path / "lr[v2]", {"FATHOM_TMA": "all"})
    b = write_run(tmp_path / "lr[v3]", steps=5)
    for main, command in ((main_runs, "diff"), (main_flags, "diff")):
        assert run_entry(main, [command, str(a), str(b)]) == 0
        out = capsys.readouterr().out
        assert "lr[v2]" in out
        assert "lr[v3]" in out


def test_control_characters_are_shown_and_not_obeyed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A log can hold anything: colours, a cleared screen, a line that looks like one of ours, half a character."""
    runs = tmp_path / "runs"
    name = "odd\x1b[2J"
    with RunLog.open(runs / name, run_id="r\x9b2J", attempt=0) as log:
        log.emit(RunStart(command=["x\x7f"], recipe="\u202er", config_hash="c", gates_hash=None, world_size=1))
        audit = AuditLog.open(audit_path(runs / name), "r\x9b2J", 0)
        audit.record("refused", gate="tma", value="\x1b[31mall", reason="no\nproblem: none", source="FATHOM_TMA")
        log.emit(RunStop(status="refused", exit_code=78, reason="\x1b[2Jgone", audit_anchor=str(audit.anchor())))
        audit.close()
    for main, words in (
        (main_runs, ["list", str(runs)]),
        (main_runs, ["show", str(runs / name)]),
        (main_flags, ["audit", str(runs / name)]),
        (main_flags, ["history", str(runs)]),
    ):
        assert run_entry(main, words) == 0
        out = capsys.readouterr().out
        assert all(c.isprintable() or c == "\n" for c in out), ascii(out)
        assert r"\x1b[" in out
        if words[0] == "show":
            assert r"\x1b[2Jgone" in out
            assert r"no\nproblem: none" in out


def test_conditions_add_up() -> None:
    with pytest.raises(UserError, match="unknown gate"):
        Query.about("nope", "active")
    assert Query.about("tma=fwd", "active", changed=True) == Query("tma", "fwd", "active", changed=True)
