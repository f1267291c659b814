"""One run in a few lines: how it ended, which gates it had, what was refused or changed, whether its chain holds.

Not for storing (see `index`) nor for asking (see `fleet`). Everything about gates comes from the verified chain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from libs.flags.audit_record import audit_path
from libs.flags.canonical import printable
from libs.flags.errors import UserError
from libs.flags.registry import GateValue
from libs.flags.runs import RankRecords, gates_of, missing_ranks, name_of, ranks, read_rank, refuse_no_chain
from libs.flags.verify import VerifyResult

Event = dict[str, Any]
OPEN = "open"  # the status of a run whose last attempt has no run.stop: it goes on, or it crashed
_ANOMALIES_KEPT = 20


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class GateEntry(_Row):
    """An outcome and value that a gate had, in these attempts. exposed: code branched on it."""

    outcome: Literal["off", "refused", "active"]
    value: GateValue | None
    stage: str | None
    exposed: bool
    attempts: tuple[int, ...]


class RefusalRow(_Row):
    """gate is None when the variable names no gate."""

    attempt: int
    gate: str | None
    variable: str
    value: GateValue | None
    why: str


class ChangeRow(_Row):
    """A gate that a resumed run went on with although it differed. note: what the checkpoint had."""

    attempt: int
    gate: str
    new: GateValue | None
    note: str


class AnomalyRow(_Row):
    attempt: int
    step: int | None
    what: str
    action: str


class RunSummary(_Row):
    """problem: why the chain is not to be believed; gates, refusals and changes are then empty.

    step, tokens, loss, bpb: of the last train step. valid_bpb: of the last validation. last: time of the last event.
    attempts: those that resolved gates. anomalies: the last ones; n_anomalies counts all.
    """

    run: str
    run_id: str | None
    started: str | None
    last: str | None
    recipe: str | None
    command: str
    status: str
    exit_code: int | None
    reason: str
    world_size: int | None
    step: int | None
    tokens: int | None
    loss: float | None
    bpb: float | None
    valid_bpb: float | None
    tokens_per_s: float | None
    config_hash: str | None
    gates_hash: str | None
    git_commit: str | None
    git_dirty: bool | None
    attempts: tuple[int, ...]
    gates: dict[str, tuple[GateEntry, ...]]
    unknown: tuple[str, ...]
    refusals: tuple[RefusalRow, ...]
    changes: tuple[ChangeRow, ...]
    n_anomalies: int
    anomalies: tuple[AnomalyRow, ...]
    chain: Literal["intact", "torn", "tampered", "none"]
    problem: Annotated[str, BeforeValidator(printable)] | None

    def has_gate(self, gate: str, outcome: str, value: str | None = None) -> bool:
        """Whether the gate had this outcome, and this value where one is given, in any attempt."""
        entries = self.gates.get(gate, ())
        return any(e.outcome == outcome and value in (None, e.value, _word(e.value)) for e in entries)


def summarise(run: Path) -> RunSummary:
    """Read and judge one run. A run that cannot be read is a summary with a problem, not an error."""
    read: dict[int, RankRecords] = {}
    verdicts: dict[int, VerifyResult] = {}
    try:
        for rank in ranks(run):
            read[rank] = read_rank(run, rank)
            verdicts[rank] = read[rank].verdict
        verdicts |= missing_ranks(run, read)
        refuse_no_chain(run, verdicts)
        problem = _tampered(verdicts)
    except UserError as error:
        problem = str(error)
    except OSError as error:
        problem = f"cannot be read: {error}"
    rank0 = read.get(0)
    events = [] if rank0 is None else rank0.log.events
    base = {"run": name_of(run), "chain": _chain(run, verdicts)}
    chain = _of_chain(run.name, rank0.records if rank0 is not None and problem is None else [])
    try:
        return RunSummary.model_validate(base | chain | _of_log(events) | {"problem": problem})
    except (KeyError, TypeError, AttributeError, ValidationError) as error:
        problem = problem or f"the run log is damaged ({type(error).__name__}: {error}); see `fathom log check`"
    return RunSummary.model_validate(base | _of_chain(run.name, []) | _of_log([]) | {"problem": problem})


def _tampered(verdicts: Mapping[int, VerifyResult]) -> str | None:
    bad = [f"rank {rank}: {verdict.describe()}" for rank, verdict in verdicts.items() if verdict.status == "tampered"]
    return "; ".join(bad) or None


def _chain(run: Path, verdicts: Mapping[int, VerifyResult]) -> str:
    """The worst verdict of all ranks; of one without a chain it counts only where that is tampering."""
    found = {v.status for rank, v in verdicts.items() if v.status == "tampered" or audit_path(run, rank).is_file()}
    return next((status for status in ("tampered", "torn", "intact") if status in found), "none")


def _of_log(events: Sequence[Event]) -> dict[str, Any]:
    def last(name: str) -> Event:
        return next((event for event in reversed(events) if event.get("event") == name), {})

    starts = [event for event in events if event.get("event") == "run.start"]
    start = next((event for event in reversed(starts) if event.get("recipe") is not None), starts[-1] if starts else {})
    step, stop, environment = last("train.step"), last("run.stop"), last("env.snapshot")
    ended = bool(events) and events[-1].get("event") == "run.stop"
    validations = [e for e in events if e.get("event") == "eval.result" and e.get("suite") == "validation"]
    anomalies = [event for event in events if str(event.get("event")).startswith("anomaly.")]
    return {
        "run_id": events[0].get("run_id") if events else None,
        "last": events[-1].get("ts") if events else None,
        "recipe": start.get("recipe"),
        "command": " ".join(start.get("command", ())),
        "status": stop["status"] if ended else OPEN,
        "exit_code": stop["exit_code"] if ended else None,
        "reason": stop["reason"] if ended else "no run.stop: still going, or ended by a crash",
        "world_size": start.get("world_size"),
        "step": step.get("step"),
        "tokens": step.get("tokens_total"),
        **{name: step.get(name) for name in ("loss", "bpb", "tokens_per_s")},
        "valid_bpb": validations[-1]["metrics"].get("bpb") if validations else None,
        "config_hash": start.get("config_hash"),
        "gates_hash": start.get("gates_hash"),
        "git_commit": environment.get("git_commit"),
        "git_dirty": environment.get("git_dirty"),
        "n_anomalies": len(anomalies),
        "anomalies": [_anomaly(event) for event in anomalies[-_ANOMALIES_KEPT:]],
    }


def _anomaly(event: Event) -> dict[str, Any]:
    return {
        "attempt": event["attempt"],
        "step": event["step"],
        "what": f"{event['event'].removeprefix('anomaly.')}: {event['what']}",
        "action": event["action"] or "",
    }


def _of_chain(name: str, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found = gates_of(name, records)
    return {
        "started": found.started,
        "attempts": found.attempts,
        "gates": {gate: [entry._asdict() for entry in entries] for gate, entries in found.gates.items()},
        "unknown": found.unknown,
        "refusals": [
            {
                "attempt": record["attempt"],
                "gate": record["gate"],
                "variable": record["source"],
                "value": record["value"],
                "why": record["reason"],
            }
            for record in records
            if record["event"] == "refused"
        ],
        "changes": [
            {"attempt": record["attempt"], "gate": record["gate"], "new": record["value"], "note": record["reason"]}
            for record in records
            if record["event"] == "change_accepted"
        ],
    }


def _word(value: GateValue | None) -> str | None:
    return ("on" if value else "off") if isinstance(value, bool) else value
