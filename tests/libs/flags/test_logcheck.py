"""Each rule of the run log, broken once; and logs that keep them all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from libs.flags.audit_record import audit_path
from libs.flags.cli import main_log
from libs.flags.errors import GateRefused, UserError, run_entry
from libs.flags.logcheck import LogReport, check_log
from libs.flags.registry import GateSpec
from libs.flags.runlog import log_path, read_events

Write = Callable[..., Path]
Records = list[dict[str, Any]]


def _rules(report: LogReport) -> set[str]:
    return {finding.rule for finding in report.violations}


def _edit(run: Path, change: Callable[[Records], Records | None]) -> LogReport:
    """Check the run after `change` on its records (in place, or a new list)."""
    path = log_path(run)
    records = [json.loads(line) for line in path.read_bytes().splitlines()]
    changed = change(records)
    records = records if changed is None else changed
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return check_log(run)


def _at(records: Records, event: str, nth: int = 0) -> int:
    return [index for index, record in enumerate(records) if record["event"] == event][nth]


def test_a_good_run(tmp_path: Path, write_run: Write) -> None:
    report = check_log(write_run(tmp_path / "run"))
    assert report.violations == ()
    assert report.notes == ()
    assert (report.attempts, report.events) == (1, 12)


def test_lines_that_are_known_already_are_judged_the_same(tmp_path: Path, write_run: Write) -> None:
    """All of them, the first few, none; in a good log, a broken one, and one that ends in mid-line."""
    run = write_run(tmp_path / "run")
    for tail in (b"", b'{"schema":1,"event":"nonsense"}\n', b'{"schema":1,'):
        with log_path(run).open("ab") as file:
            file.write(tail)
        events = list(read_events(run))
        alone = check_log(run)
        assert [check_log(run, known=events[:n]) for n in (len(events), 3, 0)] == [alone] * 3
        assert bool(alone.violations) == bool(tail)


def test_a_good_run_with_gates(tmp_path: Path, write_run: Write, working_catalog: Mapping[str, GateSpec]) -> None:
    run = write_run(tmp_path / "run", {"FATHOM_ALPHA": "1", "FATHOM_GAMMA": "third"}, working_catalog)
    assert check_log(run).violations == ()


def test_a_refused_run_is_a_good_log(tmp_path: Path, write_run: Write) -> None:
    report = check_log(write_run(tmp_path / "run", {"FATHOM_TMA": "all", "FATHOM_TMAA": "off"}))
    assert report.violations == ()
    assert report.events == 4


def test_a_failed_self_test_is_a_refusal(tmp_path: Path, write_run: Write) -> None:
    def change(records: Records) -> Records:
        kept = [record for record in records if record["event"] in ("run.start", "config.resolved", "gates.resolved")]
        stop = records[_at(records, "run.stop")] | {"status": "refused", "exit_code": 78}
        return [*kept, _failed_selftest(kept[-1]), stop]

    assert _edit(write_run(tmp_path / "run"), change).violations == ()


def test_a_resumed_run(tmp_path: Path, write_run: Write) -> None:
    for _ in range(3):
        write_run(tmp_path / "run")
    report = check_log(tmp_path / "run")
    assert report.violations == ()
    assert report.attempts == 3


def test_a_crash_before_the_last_attempt_is_a_note(tmp_path: Path, write_run: Write) -> None:
    run = write_run(tmp_path / "run", stop=False)
    assert _rules(check_log(run)) == {"run.stop"}
    with log_path(run).open("ab") as file:
        file.write(b'{"schema":1,"ts":"20')
    assert [note.message for note in check_log(run).notes] == ["unfinished last line, 20 bytes: a crash"]
    report = check_log(write_run(run))
    assert report.violations == ()
    assert [note.message for note in report.notes] == ["attempt 0 ended without run.stop"]


def _set(event: str, nth: int = 0, /, **fields: Any) -> Callable[[Records], None]:
    def change(records: Records) -> None:
        records[_at(records, event, nth)].update(fields)

    return change


def _drop(event: str) -> Callable[[Records], Records]:
    return lambda records: [record for record in records if record["event"] != event]


def _repeat(event: str) -> Callable[[Records], Records]:
    def change(records: Records) -> Records:
        index = _at(records, event)
        return [*records[: index + 1], records[index], *records[index + 1 :]]

    return change


def _swap(first: str, second: str) -> Callable[[Records], None]:
    def change(records: Records) -> None:
        a, b = _at(records, first), _at(records, second)
        clock = records[a]["mono_ns"], records[b]["mono_ns"]
        records[a], records[b] = records[b], records[a]
        records[a]["mono_ns"], records[b]["mono_ns"] = clock

    return change


def _failed_selftest(envelope: dict[str, Any]) -> dict[str, Any]:
    """A record with the clock and identity of another one."""
    kept = ("schema", "ts", "mono_ns", "run_id", "attempt", "rank", "level", "step")
    payload = {"event": "kernel.selftest", "kernel": "mimo.chunked", "passed": False, "details": {}}
    return {name: envelope[name] for name in kept} | payload


def _wrong_kernel(records: Records) -> Records:
    index = _at(records, "data.fingerprint")
    return [*records[: index + 1], _failed_selftest(records[index]), *records[index + 1 :]]


BROKEN: list[tuple[str, Callable[[Records], Records | None], str, str]] = [
    ("no start", _drop("run.start"), "run.start", "has 0 run.start"),
    ("two starts", _repeat("run.start"), "run.start", "has 2 run.start"),
    ("late start", _swap("run.start", "config.resolved"), "run.start", "begins with config.resolved"),
    ("no stop", _drop("run.stop"), "run.stop", "the last event is not run.stop: the run goes on, or it was killed"),
    ("two stops", _repeat("run.stop"), "run.stop", "events follow run.stop"),
    ("wrong exit code", _set("run.stop", exit_code=1), "run.stop", "completed does not go with exit code 1"),
    ("failed with 0", _set("run.stop", status="failed"), "run.stop", "failed does not go with exit code 0"),
    ("requeue with 0", _set("run.stop", status="requeue"), "run.stop", "requeue does not go with"),
    ("a wrong kernel trains", _wrong_kernel, "selftest", "after a failed kernel.selftest"),
    ("refused nothing", _set("run.stop", status="refused", exit_code=78), "run.stop", "0 gate.refused"),
    ("no anchor", _set("run.stop", audit_anchor=None), "anchor", "without the audit chain's anchor"),
    ("wrong anchor", _set("run.stop", audit_anchor="0" * 64 + ":3"), "anchor", "tampered"),
    ("garbled anchor", _set("checkpoint.commit", audit_anchor="x"), "anchor", "HASH:LEN"),
    ("step goes back", _set("train.step", 1, step=1), "steps", "train.step 1 after 1"),
    ("no step", _set("train.step", 1, step=None), "steps", "train.step without a step"),
    ("tokens go back", _set("train.step", 1, tokens_total=10), "steps", "tokens_total 10 after 10"),
    ("clock goes back", _set("train.step", 2, mono_ns=1), "envelope", "mono_ns goes back"),
    ("late gates", _swap("gates.resolved", "train.step"), "order", "train.step before gates.resolved"),
    ("no gates", _drop("gates.resolved"), "order", "before gates.resolved"),
    ("no config", _drop("config.resolved"), "order", "before config.resolved"),
    ("no snapshot", _drop("env.snapshot"), "order", "before env.snapshot"),
    ("no data", _drop("data.fingerprint"), "order", "before data.fingerprint"),
    ("gates twice", _repeat("gates.resolved"), "gates", "gates.resolved twice"),
    ("another hash", _set("gates.resolved", hash="x"), "gates", "is not run.start's"),
    ("exposed otherwise", _set("gate.exposed", value="fwd"), "gates", "exposed with another value"),
    ("exposed unknown", _set("gate.exposed", gate="nope"), "gates", "exposed with another value"),
    ("commit unbegun", _drop("checkpoint.begin"), "checkpoint", "never begun"),
    ("begun only", _drop("checkpoint.commit"), "checkpoint", "neither committed nor aborted"),
    ("begun twice", _repeat("checkpoint.begin"), "checkpoint", "is open"),
    ("other run", _set("env.snapshot", run_id="other"), "envelope", "another run"),
    ("other rank", _set("env.snapshot", rank=1), "envelope", "rank 1 in the log of rank 0"),
    ("unknown event", _set("env.snapshot", event="env.snapshop"), "schema", "did you mean 'env.snapshot'"),
    ("missing field", lambda r: r[_at(r, "train.step")].pop("loss") and None, "schema", "loss: Field"),
    ("extra field", _set("train.step", surprise=1), "schema", "surprise"),
    ("wrong type", _set("train.step", loss="2.0"), "schema", "loss"),
    ("missing envelope", lambda r: r[1].pop("schema") and None, "schema", "schema: Field required"),
    ("nothing", lambda r: [], "run.start", "holds no event"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "rule", "said"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_each_rule(
    tmp_path: Path, write_run: Write, change: Callable[[Records], Records | None], rule: str, said: str
) -> None:
    report = _edit(write_run(tmp_path / "run"), change)
    assert [f for f in report.violations if f.rule == rule and said in f.message], report.violations


def test_the_values_are_those_of_the_audit_chain(tmp_path: Path, write_run: Write) -> None:
    def change(records: Records) -> None:
        records[_at(records, "gates.resolved")]["gates"][2]["value"] = "gmem_pool"

    report = _edit(write_run(tmp_path / "run"), change)
    assert [f.message for f in report.violations] == ["psiv_cache=gmem_pool is not what the audit chain says"]


def test_training_after_a_refusal(tmp_path: Path, write_run: Write) -> None:
    refused = write_run(tmp_path / "refused", {"FATHOM_TMA": "all"})
    record = json.loads(log_path(refused).read_bytes().splitlines()[1])

    def change(records: Records) -> Records:
        index = _at(records, "train.step")
        clock = records[index]["mono_ns"]
        return [*records[:index], record | {"run_id": "run", "mono_ns": clock}, *records[index:]]

    report = _edit(write_run(tmp_path / "run"), change)
    assert any("train.step after a refused gate" in finding.message for finding in report.violations)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_drop("checkpoint.restore"), "without checkpoint.restore"),
        (_set("checkpoint.restore", step=2), "restores step 2, which this log never committed"),
        (_set("data.fingerprint", 1, fingerprint="g"), "data g, earlier attempts had f"),
        (_set("train.step", 3, step=3), "train.step 3 after 3"),
        (_set("env.snapshot", 1, attempt=0), "attempt 0 after a later one"),
    ],
)
def test_rules_across_attempts(
    tmp_path: Path, write_run: Write, change: Callable[[Records], Records | None], said: str
) -> None:
    run = write_run(write_run(tmp_path / "run"))
    report = _edit(run, change)
    assert any(said in finding.message for finding in report.violations), report.violations


def test_a_run_without_a_commit_begins_anew(tmp_path: Path, write_run: Write) -> None:
    """From step 1, and only while nothing was ever committed."""

    def begin_anew(records: Records) -> Records:
        second = [record for record in records if record["attempt"] == 1 and record["event"] == "train.step"]
        for step, record in enumerate(second, 1):
            record["step"] = step
        for name in ("checkpoint.begin", "checkpoint.commit"):
            records[_at(records, name, -1)]["step"] = len(second)
        return _drop("checkpoint.restore")(records)

    def uncommitted(records: Records) -> Records:
        del records[_at(records, "checkpoint.commit")], records[_at(records, "checkpoint.begin")]
        return begin_anew(records)

    def later(records: Records) -> Records:
        records = uncommitted(records)
        del records[_at(records, "train.step", 3)]
        return records

    said = ["training goes on in a new attempt without checkpoint.restore"]
    for name, change, expected in (("anew", uncommitted, []), ("lost", begin_anew, said), ("later", later, said)):
        run = write_run(write_run(tmp_path / name))
        assert [finding.message for finding in _edit(run, change).violations] == expected, name


def test_a_tampered_chain_breaks_the_log(tmp_path: Path, write_run: Write) -> None:
    run = write_run(tmp_path / "run")
    path = audit_path(run)
    path.write_bytes(path.read_bytes().replace(b'"off"', b'"fwd"', 1))
    assert any("record 0" in finding.message for finding in check_log(run).violations)
    path.unlink()
    assert any("missing" in finding.message for finding in check_log(run).violations)


def test_lines_that_are_not_json(tmp_path: Path, write_run: Write) -> None:
    run = write_run(tmp_path / "run")
    path = log_path(run)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], b"oops\n", b"[]\n", *lines[3:]]))
    assert [finding.line for finding in check_log(run).violations if finding.rule == "schema"] == [4, 5]


def test_no_log(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run log"):
        check_log(tmp_path)


def test_refusals_really_raise_in_the_fixture(write_run: Write, tmp_path: Path) -> None:
    """The refused run above is one because `resolve` raised, not because the fixture says so."""
    from libs.flags.facts import Facts
    from libs.flags.resolve import resolve

    with pytest.raises(GateRefused):
        resolve({"FATHOM_TMA": "all", "FATHOM_TMAA": "off"}, Facts())


def test_the_command(capsys: pytest.CaptureFixture[str], write_run: Write, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert run_entry(main_log, ["check", str(run)]) == 0
    assert "every rule holds" in capsys.readouterr().out
    path = log_path(run)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    assert run_entry(main_log, ["check", str(run)]) == 1
    out = capsys.readouterr()
    assert re.search(r"\[run\.stop\] line \d+: the last event is not run\.stop", out.out), out.out
    assert "1 rules of the run log are broken" in out.err
    assert run_entry(main_log, ["check", str(run), "--json"]) == 1
    (row,) = json.loads(capsys.readouterr().out)
    assert [finding["rule"] for finding in row["violations"]] == ["run.stop"]
    assert run_entry(main_log, ["check", "nowhere"]) == 2
    assert "no run at nowhere" in capsys.readouterr().err
