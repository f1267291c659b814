"""The table of gates in libs/flags/README.md, from the catalogue."""

from __future__ import annotations

from pathlib import Path

from apps.docs.blocks import table
from libs.flags.catalog import CATALOG
from libs.flags.registry import GateSpec

_COLUMNS = (
    "gate", "variable", "values", "default", "stage", "since", "owner", "expires", "what it needs", "summary",
)  # fmt: skip


def gate_table(_root: Path) -> str:
    """A row for every gate."""
    return table(_COLUMNS, map(_row, CATALOG.values()))


def _row(spec: GateSpec) -> tuple[str, ...]:
    return (
        spec.name,
        f"`{spec.variable}`",
        ", ".join(spec.values),
        spec.default,
        _stage(spec),
        spec.since,
        spec.owner,
        spec.expiry or "never",
        _needs(spec),
        spec.summary,
    )


def _stage(spec: GateSpec) -> str:
    """The gate's stage, and the values that have another."""
    others = [f"{value}: {spec.stage_of(value)}" for value in spec.values[1:] if spec.stage_of(value) is not spec.stage]
    return str(spec.stage) + (f" ({', '.join(others)})" if others else "")


def _needs(spec: GateSpec) -> str:
    if spec.decision is not None:
        return f"retired: {spec.decision}"
    needs = [p.requires + (f" ({', '.join(p.values)})" if p.values else "") for p in spec.preconditions]
    needs += [f"{d.gate} {' or '.join(d.values)} ({d.value})" for d in spec.depends_on]
    return "; ".join(needs)
