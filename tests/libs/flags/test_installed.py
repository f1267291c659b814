"""The gates in force: once, frozen, every first branch recorded once."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from libs.flags import installed
from libs.flags.audit import AuditLog
from libs.flags.audit_record import audit_path, read_audit
from libs.flags.compare import GateChange
from libs.flags.errors import GateRefused, UserError
from libs.flags.facts import Facts
from libs.flags.gateset import GateSet
from libs.flags.installed import GatesNotInstalled, GateState
from libs.flags.registry import GateSpec
from libs.flags.resolve import resolve
from libs.flags.runlog import RunLog, read_events

Catalog = Mapping[str, GateSpec]


@pytest.fixture
def gates(working_catalog: Catalog) -> GateSet:
    return resolve({"FATHOM_ALPHA": "1", "FATHOM_GAMMA": "second"}, Facts(), working_catalog)


def _open(folder: Path) -> tuple[AuditLog, RunLog]:
    audit = AuditLog.open(audit_path(folder), "r", 0, 0)
    return audit, RunLog.open(folder, run_id="r", attempt=0, rank=0)


@pytest.mark.parametrize(
    "ask", [installed.is_enabled, installed.value_of, installed.exposed, installed.refuse_if_gated]
)
def test_asking_before_installing_raises(process: GateState, ask: object) -> None:
    with pytest.raises(GatesNotInstalled, match="install"):
        ask("tma")  # type: ignore[operator]
    with pytest.raises(GatesNotInstalled):
        installed.installed_gates()


def test_values_in_force(process: GateState, gates: GateSet) -> None:
    installed.install(gates)
    assert installed.is_enabled("alpha") is True
    assert installed.is_enabled("beta") is False
    assert installed.value_of("gamma") == "second"
    assert (installed.includes("gamma", "first"), installed.includes("gamma", "third")) == (True, False)
    assert installed.installed_gates() is gates
    with pytest.raises(UserError, match="did you mean 'alpha'"):
        installed.is_enabled("alhpa")


def test_another_set_is_refused(process: GateState, gates: GateSet, working_catalog: Catalog) -> None:
    installed.install(gates)
    with pytest.raises(RuntimeError, match="once per process"):
        installed.install(resolve({}, Facts(), working_catalog))
    assert installed.installed_gates() is gates


def test_the_same_set_again_keeps_the_records(process: GateState, gates: GateSet, tmp_path: Path) -> None:
    audit, log = _open(tmp_path)
    installed.install(gates, audit, log)
    installed.is_enabled("alpha")
    installed.install(gates)
    installed.is_enabled("alpha")
    installed.is_enabled("beta")
    events = [r["event"] for r in read_events(tmp_path)]
    assert events == ["gates.resolved", "gate.exposed", "gate.exposed"]


def test_the_environment_is_not_read_later(process: GateState, gates: GateSet, monkeypatch: pytest.MonkeyPatch) -> None:
    installed.install(gates)
    monkeypatch.setenv("FATHOM_ALPHA", "off")
    assert installed.is_enabled("alpha")


def test_outcomes_and_one_exposure_per_gate(process: GateState, gates: GateSet, tmp_path: Path) -> None:
    audit, log = _open(tmp_path)
    installed.install(gates, audit, log)
    assert not installed.exposed("alpha")
    for _ in range(3):
        installed.is_enabled("alpha")
        installed.value_of("alpha")
        installed.value_of("beta")
        installed.includes("gamma", "first")
    assert installed.exposed("alpha")
    records = read_audit(audit_path(tmp_path))
    assert [(r["event"], r["gate"], r["value"]) for r in records] == [
        ("active", "alpha", True),
        ("off", "beta", "off"),
        ("active", "gamma", "second"),
        ("exposed", "alpha", True),
        ("exposed", "beta", "off"),
        ("exposed", "gamma", "second"),
    ]
    assert {r["spec_hash"] for r in records} == {r.spec_hash for r in gates.resolutions}
    events = list(read_events(tmp_path))
    assert [e["event"] for e in events] == ["gates.resolved"] + ["gate.exposed"] * 3
    assert events[0]["hash"] == gates.hash
    assert events[0]["gates"] == gates.summary()


def test_reading_the_set_exposes_nothing(process: GateState, gates: GateSet, tmp_path: Path) -> None:
    audit, log = _open(tmp_path)
    installed.install(gates, audit, log)
    installed.installed_gates().is_enabled("alpha")
    installed.installed_gates().summary()
    assert not installed.exposed("alpha")


def test_exposed_once_from_many_threads(process: GateState, gates: GateSet, tmp_path: Path) -> None:
    audit, log = _open(tmp_path)
    installed.install(gates, audit, log)
    start = threading.Barrier(8)

    def branch() -> None:
        start.wait()
        for gate in ("alpha", "beta", "gamma"):
            installed.is_enabled(gate)

    threads = [threading.Thread(target=branch) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [r["gate"] for r in read_audit(audit_path(tmp_path)) if r["event"] == "exposed"].count("beta") == 1
    assert len(list(read_events(tmp_path))) == 4


def test_a_second_run_of_the_process_has_its_own_records(process: GateState, gates: GateSet, tmp_path: Path) -> None:
    for name in ("one", "two"):
        audit, log = _open(tmp_path / name)
        installed.install(gates, audit, log)
        installed.is_enabled("alpha")
        audit.close()
        log.close()
    for name in ("one", "two"):
        assert [e["event"] for e in read_events(tmp_path / name)] == ["gates.resolved", "gate.exposed"]
    # A gate first reached when every record is closed has nowhere to be recorded, and is still answered.
    assert installed.value_of("beta") == "off"


def test_refuse_if_gated(process: GateState, gates: GateSet) -> None:
    installed.install(gates)
    installed.refuse_if_gated("beta")
    with pytest.raises(GateRefused, match="does not implement") as caught:
        installed.refuse_if_gated("gamma")
    (refusal,) = caught.value.refusals
    assert (refusal.gate, refusal.variable, refusal.value) == ("gamma", "FATHOM_GAMMA", "second")


def test_refusals_are_recorded(tmp_path: Path) -> None:
    audit, log = _open(tmp_path)
    with pytest.raises(GateRefused) as caught:
        resolve({"FATHOM_TMA": "fwd", "FATHOM_PSVI_CACHE": "off"}, Facts())
    installed.record_refusals(caught.value, audit, log)
    records = read_audit(audit_path(tmp_path))
    assert [(r["event"], r["gate"], r["value"], r["source"]) for r in records] == [
        ("refused", None, "off", "FATHOM_PSVI_CACHE"),
        ("refused", "tma", "fwd", "FATHOM_TMA"),
    ]
    assert "needs device cuda" in records[1]["reason"]
    events = list(read_events(tmp_path))
    assert [(e["event"], e["gate"], e["level"]) for e in events] == [
        ("gate.refused", None, "error"),
        ("gate.refused", "tma", "error"),
    ]


def test_accepted_changes_are_recorded(tmp_path: Path) -> None:
    audit, log = _open(tmp_path)
    installed.record_changes([GateChange("tma", "fwd", "off"), GateChange("gone", True, None)], audit, log)
    records = read_audit(audit_path(tmp_path))
    assert [(r["event"], r["gate"], r["value"], r["source"]) for r in records] == [
        ("change_accepted", "tma", "off", "--accept-gate-change"),
        ("change_accepted", "gone", None, "--accept-gate-change"),
    ]
    assert [(e["old"], e["new"]) for e in read_events(tmp_path)] == [("fwd", "off"), (True, None)]
