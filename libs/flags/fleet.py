"""Questions about many runs, answered from their summaries; and how two runs differ.

Not for reading runs (see `index`, `summary`) nor for tables (see `fleet_views`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from libs.flags.catalog import CATALOG
from libs.flags.errors import UserError
from libs.flags.registry import GateSpec
from libs.flags.summary import RunSummary, summarise
from libs.flags.witness import read_digest

STATUSES = ("completed", "requeue", "refused", "failed", "open")
OUTCOMES = ("active", "refused", "off")
_ABSENT = "absent"


def gate_named(name: str) -> GateSpec:
    """The gate of this name or of this variable, in any case. Raises UserError: there is none."""
    bare = name.lower().removeprefix("fathom_")
    if bare not in CATALOG:
        raise UserError.unknown("gate", bare, CATALOG)
    return CATALOG[bare]


class Query(NamedTuple):
    """What a run must be to be listed; every condition given must hold. gate, value: with this outcome."""

    gate: str | None = None
    value: str | None = None
    outcome: str = "active"
    status: str | None = None
    refused: bool = False
    changed: bool = False
    untrusted: bool = False

    def matches(self, run: RunSummary) -> bool:
        return (
            (self.gate is None or run.has_gate(self.gate, self.outcome, self.value))
            and self.status in (None, run.status)
            and (not self.refused or bool(run.refusals))
            and (not self.changed or bool(run.changes))
            and (not self.untrusted or run.problem is not None)
        )

    @classmethod
    def about(cls, gate: str | None, outcome: str, **conditions: Any) -> Query:
        """From `GATE` or `GATE=VALUE`.

        Raises:
            UserError: no such gate, or not one of its values.
        """
        if gate is None:
            return cls(outcome=outcome, **conditions)
        name, equals, value = gate.partition("=")
        spec = gate_named(name)
        # A refused value can be anything that someone wrote.
        if equals and outcome != "refused" and value not in spec.values:
            raise UserError.unknown(f"value of {spec.name}", value, spec.values)
        return cls(gate=spec.name, value=value if equals else None, outcome=outcome, **conditions)


class Difference(NamedTuple):
    """One thing in which two runs differ. what: config.optim.lr, gate tma, package torch, ..."""

    what: str
    a: str
    b: str


def differences(run_a: Path, run_b: Path) -> list[Difference]:
    """Code, machine, data, packages, gates, config, and how far and how well the runs came; in this order.

    Raises:
        UserError: a chain that is not to be believed: what it says of gates would be compared; or a damaged log.
    """
    sides = []
    for run in (run_a, run_b):
        summary = summarise(run)
        if summary.problem is not None:
            raise UserError(f"{run}: {summary.problem}")
        try:
            sides.append(dict(_aspects(summary, read_digest(run).events)))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{run}: the run log is damaged ({error!r}); see `fathom log check`") from error
    left, right = sides
    names = dict.fromkeys([*left, *right])
    rows = (Difference(name, left.get(name, _ABSENT), right.get(name, _ABSENT)) for name in names)
    return [row for row in rows if row.a != row.b]


def _aspects(summary: RunSummary, events: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    def last(name: str) -> Mapping[str, Any]:
        return next((event for event in reversed(events) if event.get("event") == name), {})

    environment = last("env.snapshot")
    for name in ("git_commit", "git_dirty_hash", "python", "platform", "cpu"):
        yield name, _text(environment.get(name))
    yield "world_size", _text(summary.world_size)
    yield "data", _text(last("data.fingerprint").get("fingerprint"))
    for name, version in environment.get("packages", {}).items():
        yield f"package {name}", _text(version)
    for name, value in environment.get("variables", {}).items():
        yield f"variable {name}", _text(value)
    for gate, entries in summary.gates.items():
        yield f"gate {gate}", "; ".join(f"{e.outcome} ({_text(e.value)})" for e in entries)
    trained = [event for event in events if event.get("event") == "config.resolved" and "optim" in event["config"]]
    config = trained[-1] if trained else last("config.resolved")
    yield from _flat(config.get("config", {}), "config")
    for name in ("status", "step", "tokens", "loss", "bpb", "valid_bpb", "tokens_per_s"):
        yield name, _text(getattr(summary, name))


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}.{key}")
        else:
            yield f"{prefix}.{key}", _text(value)


def _text(value: object) -> str:
    if value is None:
        return _ABSENT
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)
