"""The human side of `fathom flags` and `fathom log`: rich tables, every cell whole.

Not for decisions: each function prints what it is given.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape as without_markup
from rich.table import Table

from libs.flags.compare import show
from libs.flags.errors import legible
from libs.flags.gateset import GateSet
from libs.flags.registry import GateSpec
from libs.flags.runs import RunGate, RunGates

_STYLES = {
    "active": "green",
    "refused": "red",
    "off": "dim",
    "tampered": "bold red",
    "torn": "yellow",
    "intact": "green",
}


def console() -> Console:
    """A terminal's own width; in a pipe, wide enough that no cell is folded where a reader would grep."""
    return Console(width=None if sys.stdout.isatty() else 240, highlight=False)


def new_table(title: str, *columns: str) -> Table:
    table = Table(title=escape(title), title_justify="left")
    for column in columns:
        table.add_column(escape(column), overflow="fold")
    return table


def escape(text: str) -> str:
    """Text from a file for a console: its brackets are no markup, its control characters and line breaks are shown."""
    return without_markup(legible(text).replace("\n", r"\n"))


def coloured(word: str) -> str:
    style = _STYLES.get(word)
    return f"[{style}]{escape(word)}[/]" if style else escape(word)


def nothing() -> None:
    """For a refusal, which goes to stderr whole."""


def catalog(specs: Mapping[str, GateSpec]) -> None:
    table = new_table(
        f"{len(specs)} gates", "gate", "variable", "values", "default", "stage", "owner", "expires", "summary"
    )
    for spec in specs.values():
        cells = (spec.name, spec.variable, ", ".join(spec.values), spec.default, str(spec.stage), spec.owner)
        table.add_row(*map(escape, (*cells, spec.expiry or "-", spec.summary)))
    console().print(table)


def gate_set(gates: GateSet) -> None:
    table = new_table(f"gate set {gates.hash}", "gate", "value", "outcome", "stage", "source", "reason")
    for r in gates.resolutions:
        table.add_row(r.gate, escape(show(r.value)), coloured(str(r.outcome)), str(r.stage), r.source, escape(r.reason))
    console().print(table)


def explain(spec: GateSpec, here: Mapping[str, Sequence[str]]) -> None:
    out = console()
    out.print(f"[bold]{spec.name}[/]  {spec.variable}  [dim]{spec.stage}, owner {spec.owner}, since {spec.since}[/]")
    out.print(escape(spec.summary))
    out.print(f"values: {escape(', '.join(spec.vocabulary()))} (default {spec.default})")
    lagging = {word: stage for word in spec.values[1:] if (stage := spec.stage_of(word)) is not spec.stage}
    for label, items in (
        ("built", [", ".join(spec.runnable()) or "nothing yet"] if spec.values[1:] else []),
        ("stage of a value", [f"{word}: {stage}" for word, stage in lagging.items()]),
        ("needs", [f"{p.requires}{_for(p.values)}  remedy: {p.remedy}" for p in spec.preconditions]),
        ("needs gate", [f"{d.gate} = {' or '.join(d.values)} (for {d.value})" for d in spec.depends_on]),
        ("conflicts with", [f"{c.gate}: {c.reason}" for c in spec.conflicts]),
        ("evidence", list(spec.evidence)),
        ("decision record", [spec.decision] if spec.decision else []),
        ("expires with version", [spec.expiry] if spec.expiry else []),
    ):
        for item in items:
            out.print(f"{label}: {escape(item)}")
    for word, failures in here.items():
        out.print(f"here, {spec.variable}={word}: {coloured('refused') if failures else coloured('active')}")
        for failure in failures:
            out.print(f"  - {escape(failure)}")


def _for(values: Sequence[str]) -> str:
    return f" (for {', '.join(values)})" if values else ""


def audit(records: Sequence[Mapping[str, Any]], verdict: Mapping[str, str]) -> None:
    columns = ("rank", "seq", "attempt", "time", "event", "gate", "value", "stage", "source", "reason")
    table = new_table(f"{len(records)} audit records", *columns)
    for record in records:
        numbers = (str(record["rank"]), str(record["seq"]), str(record["attempt"]), str(record["ts"]))
        rest = (
            record["gate"] or "-",
            _value(record["value"]),
            record["stage"] or "-",
            record["source"],
            record["reason"],
        )
        table.add_row(*map(escape, numbers), coloured(str(record["event"])), *map(escape, rest))
    out = console()
    out.print(table)
    for rank, says in verdict.items():
        out.print(f"rank {rank}: {escape(says)}")


def _value(value: object) -> str:
    return "-" if value is None else show(value) if isinstance(value, bool | str) else str(value)


def verdicts(rows: Sequence[Mapping[str, Any]]) -> None:
    out = console()
    for row in rows:
        out.print(f"rank {row['rank']}: {coloured(row['status'])}: {escape(row['says'])}")
        out.print(f"  anchor {row['anchor']}", soft_wrap=True)


def outcome_cell(entries: Sequence[RunGate]) -> str:
    """ "off", "refused (all)", "active (fwd, exposed)": outcome first, so that none is taken for another."""
    cells = []
    for gate in entries:
        said = "" if gate.outcome == "off" else f" ({_value(gate.value)}{', exposed' if gate.exposed else ''})"
        where = f" in attempts {', '.join(map(str, gate.attempts))}" if len(entries) > 1 else ""
        cells.append(gate.outcome + said + where)
    return "; ".join(cells) or "absent"


def diff(left: RunGates, right: RunGates, rows: Sequence[Mapping[str, str]]) -> None:
    out = console()
    if not rows:
        out.print(f"{escape(left.run)} and {escape(right.run)} had the same gates")
        return
    table = new_table(f"{len(rows)} differences", "gate", left.run, right.run)
    for row in rows:
        table.add_row(escape(row["gate"]), escape(row["a"]), escape(row["b"]))
    out.print(table)


def history(rows: Sequence[Mapping[str, Any]], only: str | None) -> None:
    """One line per run: the gates that were active or refused by name, those only ever off as a count."""
    columns = ("run", "started", "attempts", "active", "refused", "only off", "changed on resume", "problem")
    table = new_table(f"{len(rows)} runs", *columns)
    for row in rows:
        gates: dict[str, list[dict[str, Any]]] = {g: v for g, v in row["gates"].items() if only in (None, g)}
        active, refused = (gates_with(gates, outcome, row["attempts"]) for outcome in ("active", "refused"))
        off = [gate for gate, entries in gates.items() if {entry["outcome"] for entry in entries} == {"off"}]
        table.add_row(
            escape(row["run"]),
            escape(row["started"] or "-"),
            str(len(row["attempts"])),
            escape(", ".join(active) or "-"),
            escape(", ".join([*refused, *(row["unknown"] if only is None else ())]) or "-"),
            str(len(off)) if only is None else ", ".join(off) or "-",
            escape(
                "; ".join(f"{c['gate']}={_value(c['new'])}" for c in row["changes"] if only in (None, c["gate"])) or "-"
            ),
            escape(row["problem"] or "-"),
        )
    console().print(table)


def gates_with(gates: Mapping[str, Sequence[Mapping[str, Any]]], outcome: str, attempts: Sequence[int]) -> list[str]:
    """ "tma=fwd" for each entry with this outcome, with its attempts where they are not all."""
    named = []
    for gate, entries in gates.items():
        for entry in entries:
            if entry["outcome"] == outcome:
                some = len(entry["attempts"]) < len(attempts)
                where = f" (attempts {', '.join(map(str, entry['attempts']))})" if some else ""
                named.append(f"{gate}={_value(entry['value'])}{where}")
    return named


def log_reports(rows: Sequence[Mapping[str, Any]]) -> None:
    out = console()
    for row in rows:
        count = len(row["violations"])
        verdict = f"[red]{count} violations[/]" if count else "[green]every rule holds[/]"
        out.print(f"rank {row['rank']}: {row['events']} events, {row['attempts']} attempts: {verdict}")
        for label, findings in (("violation", row["violations"]), ("note", row["notes"])):
            for finding in findings:
                where = f"line {finding['line']}" if finding["line"] else "the log"
                out.print(f"  {label} [{finding['rule']}] {where}: {escape(finding['message'])}".replace("[", r"\[", 1))
