"""The gates in force in this process: installed once, then only read, and every first branch on one recorded.

Not for resolving. Code that branches on a gate calls `is_enabled` or `value_of` here and nothing else.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from libs.flags.audit import AuditLog
from libs.flags.audit_record import AuditEvent
from libs.flags.catalog import CATALOG
from libs.flags.compare import GateChange, show
from libs.flags.errors import GateRefused, Refusal
from libs.flags.events import GateChanged, GateExposed, GateRefusedEvent, GateRow, GatesResolved
from libs.flags.gateset import GateSet, Resolution
from libs.flags.registry import NEEDS_EVIDENCE, GateSpec, GateValue, Outcome, Stage
from libs.flags.runlog import RunLog


class GatesNotInstalled(RuntimeError):
    """Code asked for a gate before the program installed any: our mistake, not the user's."""


class GateState:
    """One process's gates and where it records them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._gates: GateSet | None = None
        self._audit: AuditLog | None = None
        self._log: RunLog | None = None
        self._exposed: set[str] = set()

    def install(self, gates: GateSet, audit: AuditLog | None, log: RunLog | None) -> None:
        with self._lock:
            if self._gates is not None and self._gates != gates:
                raise RuntimeError(
                    f"gates are installed once per process: {self._gates.hash} is in force, got {gates.hash}"
                )
            self._gates = gates
            if audit is None and log is None:
                return
            # The same gates for another run of this process: its records are its own, exposures included.
            self._audit, self._log = audit, log
            self._exposed = set()
        if audit is not None:
            for r in gates.resolutions:
                _audit_resolution(audit, r, "active" if r.outcome is Outcome.ACTIVE else "off", r.reason)
        if log is not None:
            rows = [GateRow.model_validate(row) for row in gates.summary()]
            log.emit(GatesResolved(hash=gates.hash, gates=rows))

    @property
    def gates(self) -> GateSet:
        if self._gates is None:
            raise GatesNotInstalled(
                "no gates are installed: the program calls install(resolve(fathom_variables(), Facts(...))) "
                "at its start, before any model code"
            )
        return self._gates

    def expose(self, gate: str) -> Resolution:
        """The resolution of `gate`, recorded if this is the first time code branches on it."""
        resolution = self.gates[gate]
        with self._lock:
            if gate in self._exposed:
                return resolution
            self._exposed.add(gate)
            if self._audit is not None and not self._audit.closed:
                _audit_resolution(self._audit, resolution, "exposed", "first branch on this gate")
            if self._log is not None and not self._log.closed:
                event = GateExposed(gate=gate, value=resolution.value, stage=str(resolution.stage))
                self._log.emit(event)
        return resolution

    def exposed(self, gate: str) -> bool:
        return self.gates[gate].gate in self._exposed


_PROCESS = GateState()


def install(gates: GateSet, audit: AuditLog | None = None, log: RunLog | None = None) -> None:
    """Put `gates` in force and record every outcome in `audit` and `gates.resolved` in `log`.

    Installing an equal set again is allowed: it directs the records to another run of the same process.

    Raises:
        RuntimeError: another set is in force.
    """
    _PROCESS.install(gates, audit, log)


def record_refusals(error: GateRefused, audit: AuditLog | None, log: RunLog | None) -> None:
    """Write each refusal as `refused` to the audit chain and as `gate.refused` to the run log."""
    for refusal in error.refusals:
        if audit is not None:
            spec = CATALOG.get(refusal.gate or "")
            audit.record(
                "refused",
                gate=refusal.gate,
                value=refusal.value,
                default=None if spec is None else spec.encode(spec.default),
                stage=None if spec is None else str(spec.stage),
                reason="; ".join(refusal.failures),
                source=refusal.variable,
                spec_hash=None if spec is None else spec.spec_hash,
            )
        if log is not None:
            log.emit(_refused_event(refusal), level="error")


def record_changes(found: Iterable[GateChange], audit: AuditLog | None = None, log: RunLog | None = None) -> None:
    """Write the changes accepted on resume to the audit chain and, as `gate.changed`, to the run log."""
    for change in found:
        if audit is not None:
            reason = f"the checkpoint had {show(change.old)}"
            audit.record(
                "change_accepted",
                gate=change.gate,
                value=change.new,
                reason=reason,
                source="--accept-gate-change",
            )
        if log is not None:
            log.emit(GateChanged(gate=change.gate, old=change.old, new=change.new), level="warning")


def installed_gates() -> GateSet:
    """The set in force, for records. Reading it exposes nothing."""
    return _PROCESS.gates


def is_enabled(gate: str) -> bool:
    """Whether `gate` is in force. The first call per gate is recorded as its exposure."""
    resolution = _PROCESS.expose(gate)
    return installed_gates().is_enabled(resolution.gate)


def value_of(gate: str) -> GateValue:
    """The typed value of `gate`. The first call per gate is recorded as its exposure."""
    return _PROCESS.expose(gate).value


def includes(gate: str, wanted: str) -> bool:
    """Whether the value of `gate` brings `wanted`: psiv_cache=gmem_pool includes python_precompute."""
    _PROCESS.expose(gate)
    return installed_gates().includes(gate, wanted)


def exposed(gate: str) -> bool:
    """Whether code has branched on `gate` since its records began."""
    return _PROCESS.exposed(gate)


def refuse_if_gated(gate: str) -> None:
    """For code that does not implement `gate`: refuse to go on where it is in force.

    Raises:
        GateRefused: the gate is in force.
    """
    resolution = _PROCESS.expose(gate)
    if installed_gates().is_enabled(gate):
        failure = "the code that runs here does not implement it"
        remedy = f"unset {resolution.variable}, or choose a backend that implements it"
        raise GateRefused([Refusal(gate, resolution.variable, show(resolution.value), (failure,), (remedy,))])


class GateStatus(NamedTuple):
    """How far a gate has come. values: the stage of each value but off, so psiv_cache shows four."""

    stage: Stage
    values: dict[str, Stage]
    evidence: tuple[str, ...]

    @property
    def built(self) -> tuple[str, ...]:
        """The values that can be asked for."""
        return tuple(word for word, stage in self.values.items() if stage is not Stage.SCAFFOLD)

    @property
    def measured(self) -> tuple[str, ...]:
        """The values whose gain a receipt in `evidence` shows."""
        return tuple(word for word, stage in self.values.items() if stage in NEEDS_EVIDENCE)


def scaffold_status(catalog: Mapping[str, GateSpec] = CATALOG) -> dict[str, GateStatus]:
    """The stage of every gate and of each of its values: what is built, and what is measured. Needs no installed
    gates."""
    return {
        name: GateStatus(spec.stage, {word: spec.stage_of(word) for word in spec.values[1:]}, spec.evidence)
        for name, spec in catalog.items()
    }


def _refused_event(refusal: Refusal) -> GateRefusedEvent:
    return GateRefusedEvent(
        gate=refusal.gate,
        variable=refusal.variable,
        value=refusal.value,
        failures=list(refusal.failures),
        remedies=list(refusal.remedies),
    )


def _audit_resolution(audit: AuditLog, resolution: Resolution, event: AuditEvent, reason: str) -> None:
    audit.record(
        event,
        gate=resolution.gate,
        value=resolution.value,
        default=resolution.default,
        stage=str(resolution.stage),
        reason=reason,
        source=resolution.source,
        spec_hash=resolution.spec_hash,
    )
