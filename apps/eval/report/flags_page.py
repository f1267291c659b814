"""`fathom report flags`: every gate with its stage and evidence, and what became of it in the runs of a folder.

Not for one run (build.py). Outcomes come from verified audit chains only; a chain that does not verify says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from apps.eval.report.evidence import Proof, proofs
from apps.eval.report.page import ALONE, Links, render_page
from libs.flags.catalog import CATALOG
from libs.flags.compare import show
from libs.flags.index import RunIndex
from libs.flags.registry import GateSpec
from libs.flags.summary import RunSummary


class GateLine(NamedTuple):
    """values: each but off with its stage. active, refused, off: in how many runs, in any attempt."""

    name: str
    stage: str
    values: list[tuple[str, str]]
    default: str
    active: int
    refused: int
    off: int
    evidence: list[Proof]
    needs: str
    owner: str
    expires: str
    summary: str


class OutcomeLine(NamedTuple):
    run: str
    started: str
    gate: str
    outcome: str
    value: str
    attempts: str
    why: str


def flags_page(folder: Path | None, links: Links = ALONE) -> str:
    """The page as text. folder: of runs; None shows the catalogue alone.

    Raises:
        UserError: no such folder.
    """
    runs: list[RunSummary] = []
    if folder is not None:
        index = RunIndex.open(folder)
        runs = index.runs()
        index.close()
    gates = [_gate(spec, runs) for spec in CATALOG.values()]
    outcomes = [line for run in runs for line in outcome_lines(run)]
    return render_page("flags.html.j2", links=links, folder=folder, gates=gates, outcomes=outcomes, runs=runs)


def _gate(spec: GateSpec, runs: Sequence[RunSummary]) -> GateLine:
    active, refused, off = (sum(run.has_gate(spec.name, word) for run in runs) for word in ("active", "refused", "off"))
    needs = [p.requires + (f" ({', '.join(p.values)})" if p.values else "") for p in spec.preconditions]
    needs += [f"{d.gate} {' or '.join(d.values)} ({d.value})" for d in spec.depends_on]
    return GateLine(
        spec.name, str(spec.stage), [(value, str(spec.stage_of(value))) for value in spec.values[1:]], spec.default,
        active, refused, off, proofs(spec),
        "; ".join(needs), spec.owner, spec.expiry or "never", spec.summary,
    )  # fmt: skip


def outcome_lines(run: RunSummary) -> Iterator[OutcomeLine]:
    """What became of gates in a run, where it was not simply off."""
    started = (run.started or "")[:19]
    why: Mapping[tuple[str | None, object], str] = {(r.gate, r.value): r.why for r in run.refusals}
    for gate, entries in run.gates.items():
        for entry in entries:
            if entry.outcome != "off":
                attempts = ", ".join(map(str, entry.attempts))
                said = why.get((gate, entry.value), "") if entry.outcome == "refused" else ""
                said = said or (
                    "exposed" if entry.exposed else "never branched on" if entry.outcome == "active" else ""
                )
                yield OutcomeLine(run.run, started, gate, entry.outcome, show(entry.value), attempts, said)
    for refusal in run.refusals:
        if refusal.gate is None:
            value = str(refusal.value)
            yield OutcomeLine(run.run, started, refusal.variable, "refused", value, str(refusal.attempt), refusal.why)
    for change in run.changes:
        value = show(change.new)
        yield OutcomeLine(run.run, started, change.gate, "changed", value, str(change.attempt), change.note)
