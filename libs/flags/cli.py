"""`fathom flags ...` and `fathom log check`: gates and the records of runs, as tables or as JSON.

Not for running anything. Needs no torch, so it answers at once and on any machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from libs.flags import views
from libs.flags.audit_record import Anchor, audit_path, read_audit
from libs.flags.catalog import CATALOG
from libs.flags.environment import fathom_variables
from libs.flags.errors import ExitStatus, GateRefused, UserError
from libs.flags.facts import Facts
from libs.flags.fleet import gate_named
from libs.flags.fleet_cli import Handler, add_index_options, adder, exit_status, indexed_runs
from libs.flags.logcheck import check_log
from libs.flags.promotions import promote
from libs.flags.registry import GateSpec
from libs.flags.resolve import resolve
from libs.flags.runs import RunGates, as_json, find_run, ranks, run_gates, verify_run
from libs.flags.verify import VerifyResult

# What `history` tells of a run: its gates, and what became of them on resume.
_HISTORY = {"run", "started", "attempts", "gates", "unknown", "changes", "problem"}


def _list(options: argparse.Namespace) -> int:
    rows = [spec.describe() for spec in CATALOG.values()]
    _show(options, rows, lambda: views.catalog(CATALOG))
    return ExitStatus.OK


def _status(options: argparse.Namespace) -> int:
    try:
        gates = resolve(fathom_variables(), _facts(options.facts))
    except GateRefused as error:
        refused = [refusal._asdict() for refusal in error.refusals]
        _show(options, {"refused": True, "hash": None, "gates": [], "refusals": refused}, views.nothing)
        print(f"error: {error}", file=sys.stderr)
        return ExitStatus.GATE_REFUSED
    result = {"refused": False, "hash": gates.hash, "gates": gates.summary(), "refusals": []}
    _show(options, result, lambda: views.gate_set(gates))
    return ExitStatus.OK


def _explain(options: argparse.Namespace) -> int:
    spec = gate_named(options.gate)
    here = {word: _missing(spec, word, _facts(options.facts)) for word in spec.values[1:]}
    _show(options, spec.describe() | {"refused_here": here}, lambda: views.explain(spec, here))
    return ExitStatus.OK


def _missing(spec: GateSpec, word: str, facts: Facts) -> list[str]:
    """What keeps `word` from being honoured when nothing else is requested."""
    try:
        resolve({spec.variable: word}, facts)
    except GateRefused as error:
        return [failure for refusal in error.refusals for failure in refusal.failures]
    return []


def _audit(options: argparse.Namespace) -> int:
    run = find_run(options.run)
    verdict = {str(rank): result.describe() for rank, result in _verdicts(run).items()}
    chains = [audit_path(run, rank) for rank in ranks(run)]
    records = [record for path in chains if path.is_file() for record in read_audit(path)]
    _show(options, {"verdict": verdict, "records": records}, lambda: views.audit(records, verdict))
    return ExitStatus.OK


def _verdicts(run: Path) -> dict[int, VerifyResult]:
    """`verify_run`, with a UserError for a tampered chain: what it says is worth nothing."""
    verdicts = verify_run(run)
    for rank, result in verdicts.items():
        if result.status == "tampered":
            raise UserError(f"{audit_path(run, rank)}: {result.describe()}")
    return verdicts


def _verify(options: argparse.Namespace) -> int:
    run = find_run(options.run)
    extra = [Anchor.parse(text) for text in options.anchor]
    verdicts = verify_run(run, extra)
    rows = [
        {"rank": rank, "file": str(audit_path(run, rank)), "says": result.describe()}
        | result._asdict()
        | {"anchor": str(result.anchor)}
        for rank, result in verdicts.items()
    ]
    _show(options, rows, lambda: views.verdicts(rows))
    bad = [row for row in rows if row["status"] == "tampered"]
    if bad:
        raise UserError("; ".join(f"{row['file']}: {row['says']}" for row in bad))
    return ExitStatus.OK


def _diff(options: argparse.Namespace) -> int:
    left, right = _verified_gates(find_run(options.run_a)), _verified_gates(find_run(options.run_b))
    rows = []
    for gate in dict.fromkeys([*left.gates, *right.gates]):
        a, b = left.gates.get(gate, ()), right.gates.get(gate, ())
        if {(g.outcome, g.value) for g in a} != {(g.outcome, g.value) for g in b}:
            rows.append({"gate": gate, "a": views.outcome_cell(a), "b": views.outcome_cell(b)})
    for variable in sorted(set(left.unknown) ^ set(right.unknown)):
        sides = ["refused" if variable in run.unknown else "absent" for run in (left, right)]
        rows.append({"gate": variable, "a": sides[0], "b": sides[1]})
    result = {"a": as_json(left), "b": as_json(right), "identical": not rows, "differences": rows}
    _show(options, result, lambda: views.diff(left, right, rows))
    return ExitStatus.OK


def _verified_gates(run: Path) -> RunGates:
    _verdicts(run)
    return run_gates(run)


def _history(options: argparse.Namespace) -> int:
    only = None if options.gate is None else gate_named(options.gate).name
    found = indexed_runs(Path(options.runs_dir), rebuild=options.rebuild)
    # One run that cannot be read must not hide the others, and must not look like a run with its gates off.
    rows = [run.model_dump(mode="json", include=_HISTORY) for run in found]
    _show(options, rows, lambda: views.history(rows, only))
    return exit_status(found, len(found))


def _promote(options: argparse.Namespace) -> int:
    name, equals, value = options.gate.partition("=")
    spec = gate_named(name)
    done = promote(spec, value if equals else None, Path(options.receipt))
    said = f"{done.gate}={done.value} is measured, by {done.receipt}; commit libs/flags/promotions.json with it"
    table = "the gate table of libs/flags/README.md changes too: renew it with `fathom docs`"
    _show(options, done.model_dump(), lambda: print(f"{said}\n{table}"))
    return ExitStatus.OK


def _check(options: argparse.Namespace) -> int:
    run = find_run(options.run)
    reports = {rank: check_log(run, rank=rank) for rank in ranks(run)}
    rows = [
        {
            "rank": rank,
            "events": report.events,
            "attempts": report.attempts,
            "violations": [finding._asdict() for finding in report.violations],
            "notes": [finding._asdict() for finding in report.notes],
        }
        for rank, report in reports.items()
    ]
    _show(options, rows, lambda: views.log_reports(rows))
    broken = sum(len(report.violations) for report in reports.values())
    if broken:
        print(f"error: {run}: {broken} rules of the run log are broken", file=sys.stderr)
    return ExitStatus.FAILURE if broken else ExitStatus.OK


def _facts(path: str | None) -> Facts:
    """The facts in a JSON file, or what is known without probing: a CPU and the installed packages."""
    if path is None:
        return Facts()
    try:
        return Facts.model_validate_json(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        what = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UserError(f"{path} does not hold facts: {what}; known: {', '.join(Facts.model_fields)}") from error


def _show(options: argparse.Namespace, value: Any, human: Callable[[], None]) -> None:
    if options.json:
        print(json.dumps(value, indent=2))
    else:
        human()


def flags_parser() -> argparse.ArgumentParser:
    """The options of `fathom flags`."""
    parser = argparse.ArgumentParser("fathom flags", description="Gates and their records.", allow_abbrev=False)
    command = adder(parser)
    command("list", _list, "every gate: variable, values, stage")
    status = command("status", _status, "what this environment resolves to; exit 78 if it would be refused")
    explain = command("explain", _explain, "one gate: what it is, what it needs, what is missing here")
    explain.add_argument("gate", metavar="GATE")
    for sub in (status, explain):
        sub.add_argument("--facts", metavar="FILE", help="facts of another machine, as JSON")
    command("audit", _audit, "the audit records of a run").add_argument("run", metavar="RUN")
    verify = command("verify", _verify, "check a run's audit chain; exit 2 if tampered with, naming the record")
    verify.add_argument("run", metavar="RUN")
    verify.add_argument(
        "--anchor",
        action="append",
        default=[],
        metavar="HASH:LEN",
        help="an anchor kept elsewhere (repeatable)",
    )
    diff = command("diff", _diff, "the gates in which two runs differ")
    diff.add_argument("run_a", metavar="RUN_A")
    diff.add_argument("run_b", metavar="RUN_B")
    history = command("history", _history, "which runs had which gate active, refused or off")
    add_index_options(history)
    history.add_argument("--gate", metavar="GATE", help="only this gate")
    rise = command("promote", _promote, "raise a value of a gate to `measured`, by a receipt of the whole step")
    rise.add_argument("gate", metavar="GATE[=VALUE]")
    rise.add_argument("--receipt", required=True, metavar="PATH", help="infra/receipts/.../receipt.json")
    return parser


def log_parser() -> argparse.ArgumentParser:
    """The options of `fathom log`."""
    parser = argparse.ArgumentParser("fathom log", description="The run log.", allow_abbrev=False)
    check = adder(parser)("check", _check, "apply the rules of the run log; exit 1 if one is broken")
    check.add_argument("run", metavar="RUN")
    return parser


def main_flags(argv: Sequence[str] | None = None) -> int:
    """`fathom flags ...`."""
    options = flags_parser().parse_args(argv)
    handler: Handler = options.handler
    return handler(options)


def main_log(argv: Sequence[str] | None = None) -> int:
    """`fathom log check RUN`."""
    options = log_parser().parse_args(argv)
    handler: Handler = options.handler
    return handler(options)
