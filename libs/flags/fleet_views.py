"""The human side of `fathom runs`: tables of runs, one run, two runs.

Not for decisions: each function prints what it is given.
"""

from __future__ import annotations

from collections.abc import Sequence

from libs.flags.fleet import Difference
from libs.flags.summary import RunSummary
from libs.flags.views import coloured, console, escape, gates_with, new_table

_STATUS_STYLE = {"completed": "green", "refused": "red", "failed": "red", "requeue": "yellow", "open": "yellow"}


def runs(found: Sequence[RunSummary], of: int) -> None:
    """One line per run: how it stands, its gates that were asked for, and what is wrong."""
    columns = ("run", "started", "status", "step", "bpb", "active", "refused", "changed on resume", "chain", "problem")
    rows = new_table(f"{len(found)} of {of} runs", *columns)
    for run in found:
        rows.add_row(
            escape(run.run),
            escape((run.started or "-")[:19]),
            _status(run.status),
            "-" if run.step is None else f"{run.step:,}",
            _number(run.valid_bpb if run.valid_bpb is not None else run.bpb),
            escape(", ".join(gates_with(run.model_dump()["gates"], "active", run.attempts)) or "-"),
            escape("; ".join(dict.fromkeys(f"{r.variable}={r.value}" for r in run.refusals)) or "-"),
            escape("; ".join(f"{change.gate}={change.new}" for change in run.changes) or "-"),
            coloured(run.chain),
            escape(run.problem or "-"),
        )
    console().print(rows)


def run(found: RunSummary) -> None:
    """Everything a summary holds, a line each."""
    out = console()
    out.print(f"[bold]{escape(found.run)}[/]  {_status(found.status)}  {escape(found.reason)}")
    for label, text in (
        ("id", found.run_id or "-"),
        ("command", found.command or "-"),
        ("recipe", found.recipe or "-"),
        ("from", f"{found.started or '-'} to {found.last or '-'}"),
        ("attempts with gates", ", ".join(map(str, found.attempts)) or "none"),
        ("step", f"{found.step if found.step is not None else '-'}, {found.tokens or 0:,} tokens"),
        ("loss", f"{_number(found.loss)}; bits per byte {_number(found.bpb)}, held out {_number(found.valid_bpb)}"),
        ("commit", f"{found.git_commit or 'unknown'}{', with uncommitted changes' if found.git_dirty else ''}"),
        ("config", found.config_hash or "-"),
        ("gates", found.gates_hash or "-"),
        ("audit chain", found.chain),
        ("problem", found.problem or "none"),
        ("anomalies", str(found.n_anomalies)),
    ):
        out.print(f"{label}: {escape(text)}", soft_wrap=True)
    for gate, entries in found.gates.items():
        if {entry.outcome for entry in entries} != {"off"}:
            for entry in entries:
                where = ", ".join(map(str, entry.attempts))
                said = f"{entry.outcome} ({entry.value}{', exposed' if entry.exposed else ''}) in attempts {where}"
                out.print(escape(f"gate {gate}: {said}"))
    for refusal in found.refusals:
        out.print(
            f"refused in attempt {refusal.attempt}: {escape(f'{refusal.variable}={refusal.value}: {refusal.why}')}"
        )
    for change in found.changes:
        said = escape(f"{change.gate} = {change.new}; {change.note}")
        out.print(f"changed on resume, attempt {change.attempt}: {said}")
    for anomaly in found.anomalies:
        at = f"attempt {anomaly.attempt}, step {anomaly.step}"
        out.print(f"anomaly, {at}: {escape(anomaly.what)} {escape(anomaly.action)}")


def diff(a: str, b: str, rows: Sequence[Difference]) -> None:
    out = console()
    if not rows:
        out.print(f"{escape(a)} and {escape(b)} do not differ in anything that is recorded")
        return
    listed = new_table(f"{len(rows)} differences", "what", a, b)
    for row in rows:
        listed.add_row(*map(escape, row))
    out.print(listed)


def _status(status: str) -> str:
    return f"[{_STATUS_STYLE[status]}]{status}[/]" if status in _STATUS_STYLE else escape(status)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
