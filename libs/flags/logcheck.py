"""The rules that a run log keeps, in the manner of MLPerf's checker: `fathom log check RUN`.

Not for the audit chain's own soundness (see `verify`); the log's anchors are checked against it.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import from_json

from libs.flags.append_file import read_lines
from libs.flags.audit_record import audit_path, read_audit
from libs.flags.errors import ExitStatus, UserError, reading
from libs.flags.events import (
    AnomalyGeneric,
    CheckpointAbort,
    CheckpointBegin,
    CheckpointCommit,
    CheckpointRestore,
    DataFingerprint,
    Event,
    GateExposed,
    GateRefusedEvent,
    GatesResolved,
    KernelSelftest,
    RunStart,
    RunStop,
    TrainStep,
)
from libs.flags.runlog import TORN_LINE, Envelope, log_path, next_attempt, parse_line
from libs.flags.runs import verify_run

_BEFORE_TRAINING = ("config.resolved", "gates.resolved", "env.snapshot", "data.fingerprint")
_OPEN = "the run goes on, or it was killed and `fathom train --resume RUN` goes on with it"
_EXIT_OF: dict[str, set[int]] = {
    "completed": {ExitStatus.OK},
    "requeue": {ExitStatus.REQUEUE},
    "refused": {ExitStatus.GATE_REFUSED},
    "failed": set(range(1, 256)) - {ExitStatus.REQUEUE, ExitStatus.GATE_REFUSED},
}


class Finding(NamedTuple):
    """rule: its short name. line: of the log file, from 1; 0 for the log as a whole."""

    rule: str
    line: int
    message: str


class LogReport(NamedTuple):
    """violations: broken rules. notes: what no rule forbids but a reader should know (an earlier crash)."""

    events: int
    attempts: int
    violations: tuple[Finding, ...]
    notes: tuple[Finding, ...]


class _Entry(NamedTuple):
    line: int
    envelope: Envelope
    event: Event


Attempt = Sequence[_Entry]
Findings = Iterator[Finding]


@reading()
def check_log(run: Path, *, rank: int = 0, known: Sequence[dict[str, Any]] = ()) -> LogReport:
    """Apply every rule to the log of one rank. known: its first lines, as `read_events` gave them, not decoded again.

    Raises:
        UserError: there is no such log, or it cannot be read.
    """
    path = log_path(run, rank)
    if not path.is_file():
        raise UserError(f"no run log at {path}: not a run directory, or rank {rank} wrote nothing")
    with no_collections():
        return _judged(run, rank, path, known)


def _judged(run: Path, rank: int, path: Path, known: Sequence[dict[str, Any]]) -> LogReport:
    violations: list[Finding] = []
    notes: list[Finding] = []
    entries = _parse(path, known, violations, notes)
    violations += _same_run(entries, rank)
    attempts = [list(group) for _, group in itertools.groupby(entries, key=lambda entry: entry.envelope.attempt)]
    for attempt in attempts:
        for rule in _ATTEMPT_RULES:
            violations += rule(attempt)
    violations += _across(attempts)
    for attempt in attempts[:-1]:
        if not isinstance(attempt[-1].event, RunStop):
            last = attempt[-1]
            notes.append(Finding("run.stop", last.line, f"attempt {last.envelope.attempt} ended without run.stop"))
    if not attempts:
        violations.append(Finding("run.start", 0, "the log holds no event"))
    elif not isinstance(attempts[-1][-1].event, RunStop):
        last = attempts[-1][-1]
        # A rank that crashed and had no part in later attempts: the run went on with fewer ranks.
        left_out = rank != 0 and _has_later(run, last.envelope.attempt)
        found = Finding("run.stop", last.line, f"the last event is not run.stop: {_OPEN}")
        (notes if left_out else violations).append(found)
    violations += _against_audit(run, rank, attempts)
    ordered = tuple(sorted(set(violations), key=lambda finding: (finding.line, finding.rule)))
    return LogReport(len(entries), len(attempts), ordered, tuple(notes))


def _has_later(run: Path, attempt: int) -> bool:
    """Whether rank 0 tells of a later attempt. A log of it that is damaged excuses nobody."""
    try:
        return next_attempt(run) - 1 > attempt
    except UserError:
        return False


@contextmanager
def no_collections() -> Iterator[None]:
    """No cycle is made while a log is read, and looking for some again and again takes up to half of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _parse(
    path: Path, known: Sequence[dict[str, Any]], violations: list[Finding], notes: list[Finding]
) -> list[_Entry]:
    entries: list[_Entry] = []
    for line in read_lines(path):
        if line.torn:
            notes.append(Finding("schema", line.number, f"unfinished last line, {len(line.content)} bytes: a crash"))
            break
        try:
            record = known[line.number - 1] if line.number <= len(known) else from_json(line.content)
            if not isinstance(record, dict):
                raise UserError(f"not a JSON object: {line.content[:80]!r}")
            parsed = parse_line(record)
        except ValidationError as error:
            what = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            violations.append(Finding("schema", line.number, what))
        except ValueError as error:
            violations.append(Finding("schema", line.number, str(error)))
        else:
            entries.append(_Entry(line.number, parsed.envelope, parsed.event))
    return entries


def _same_run(entries: Attempt, rank: int) -> Findings:
    for before, entry in itertools.pairwise(entries):
        if entry.envelope.run_id != entries[0].envelope.run_id:
            yield Finding("envelope", entry.line, f"run {entry.envelope.run_id!r} in the log of another run")
        if entry.envelope.attempt < before.envelope.attempt:
            yield Finding("envelope", entry.line, f"attempt {entry.envelope.attempt} after a later one")
    for entry in entries:
        if entry.envelope.rank != rank:
            yield Finding("envelope", entry.line, f"rank {entry.envelope.rank} in the log of rank {rank}")


def _clock(attempt: Attempt) -> Findings:
    for before, entry in itertools.pairwise(attempt):
        if entry.envelope.mono_ns < before.envelope.mono_ns:
            yield Finding("envelope", entry.line, "mono_ns goes back")


def _start(attempt: Attempt) -> Findings:
    starts = [entry for entry in attempt if isinstance(entry.event, RunStart)]
    number = attempt[0].envelope.attempt
    if len(starts) != 1:
        yield Finding("run.start", attempt[0].line, f"attempt {number} has {len(starts)} run.start, exactly one needed")
    # The cut-off line of a crash is reported while the log is opened, before anyone can write run.start.
    first = next((e for e in attempt if not (isinstance(e.event, AnomalyGeneric) and e.event.what == TORN_LINE)), None)
    if first is not None and not isinstance(first.event, RunStart):
        yield Finding("run.start", first.line, f"attempt {number} begins with {first.event.name}")


def _stop(attempt: Attempt) -> Findings:
    refusals = [entry for entry in attempt if isinstance(entry.event, GateRefusedEvent) or _failed(entry)]
    for entry in attempt[:-1]:
        if isinstance(entry.event, RunStop):
            yield Finding("run.stop", entry.line, "events follow run.stop in the same attempt")
    for entry in attempt:
        if not isinstance(entry.event, RunStop):
            continue
        status, code = entry.event.status, entry.event.exit_code
        if code not in _EXIT_OF[status]:
            yield Finding("run.stop", entry.line, f"status {status} does not go with exit code {code}")
        if (status == "refused") != bool(refusals):
            said = f"{len(refusals)} gate.refused or failed kernel.selftest"
            yield Finding("run.stop", entry.line, f"status {status} does not go with {said} in this attempt")


def _failed(entry: _Entry) -> bool:
    return isinstance(entry.event, KernelSelftest) and not entry.event.passed


def _steps(attempt: Attempt) -> Findings:
    last_step, last_tokens, seen, wrong_kernel = -1, -1, set[str](), False
    for entry in attempt:
        seen.add(entry.event.name)
        wrong_kernel = wrong_kernel or _failed(entry)
        step = entry.envelope.step
        if entry.event.needs_step and step is None:
            yield Finding("steps", entry.line, f"{entry.event.name} without a step")
        if isinstance(entry.event, CheckpointRestore) and step is not None:
            last_step = max(last_step, step)
        if not isinstance(entry.event, TrainStep) or step is None:
            continue
        if step <= last_step:
            yield Finding("steps", entry.line, f"train.step {step} after {last_step}: steps go up")
        if entry.event.tokens_total <= last_tokens:
            yield Finding("steps", entry.line, f"tokens_total {entry.event.tokens_total} after {last_tokens}")
        missing = [name for name in _BEFORE_TRAINING if name not in seen]
        if missing:
            yield Finding("order", entry.line, f"train.step before {', '.join(missing)}")
        if "gate.refused" in seen:
            yield Finding("gates", entry.line, "train.step after a refused gate")
        if wrong_kernel:
            yield Finding("selftest", entry.line, "train.step after a failed kernel.selftest")
        last_step, last_tokens = max(last_step, step), entry.event.tokens_total


def _gates(attempt: Attempt) -> Findings:
    resolved: GatesResolved | None = None
    started: RunStart | None = None
    for entry in attempt:
        if isinstance(entry.event, RunStart):
            started = entry.event
        if isinstance(entry.event, GatesResolved):
            if resolved is not None:
                yield Finding("gates", entry.line, "gates.resolved twice: gates are resolved once")
            resolved = entry.event
            if started is not None and started.gates_hash != resolved.hash:
                yield Finding("gates", entry.line, f"hash {resolved.hash} is not run.start's {started.gates_hash}")
        if isinstance(entry.event, GateExposed):
            values = {row.gate: row.value for row in resolved.gates} if resolved else {}
            if values.get(entry.event.gate) != entry.event.value:
                yield Finding("gates", entry.line, f"{entry.event.gate} exposed with another value than resolved")


def _checkpoints(attempt: Attempt) -> Findings:
    open_path: str | None = None
    begun = False
    for entry in attempt:
        if isinstance(entry.event, CheckpointAbort) and not begun and entry.envelope.attempt > 0:
            continue  # left half-written by an earlier attempt that could not say so
        begun = begun or isinstance(entry.event, CheckpointBegin)
        if isinstance(entry.event, CheckpointBegin):
            if open_path is not None:
                yield Finding("checkpoint", entry.line, f"begins while {open_path} is open")
            open_path = entry.event.path
        elif isinstance(entry.event, CheckpointCommit | CheckpointAbort):
            if entry.event.path != open_path:
                yield Finding("checkpoint", entry.line, f"{entry.event.name} of {entry.event.path}, never begun")
            open_path = None
        elif isinstance(entry.event, RunStop) and open_path is not None:
            yield Finding("checkpoint", entry.line, f"run.stop while {open_path} is neither committed nor aborted")


_ATTEMPT_RULES: tuple[Callable[[Attempt], Findings], ...] = (
    _clock,
    _start,
    _stop,
    _steps,
    _gates,
    _checkpoints,
)


def _across(attempts: Sequence[Attempt]) -> Findings:
    """What later attempts owe to earlier ones: the same data, and a restored checkpoint before they go on."""
    fingerprint: str | None = None
    trained = False
    committed: set[int | None] = set()
    nothing_to_restore = True
    for attempt in attempts:
        restored = False
        for entry in attempt:
            event, step = entry.event, entry.envelope.step
            # A crash can come between the marker and the line that tells of it: begun and not given up is enough.
            if isinstance(event, CheckpointBegin | CheckpointCommit):
                committed.add(step)
            if isinstance(event, CheckpointCommit):
                nothing_to_restore = False
            if isinstance(event, CheckpointAbort):
                committed.discard(step)
            if isinstance(event, CheckpointRestore):
                restored = True
                # Other ranks than 0 need not have been there when it was committed.
                if trained and step not in committed and entry.envelope.rank == 0:
                    yield Finding("checkpoint", entry.line, f"restores step {step}, which this log never committed")
            if isinstance(event, DataFingerprint):
                if fingerprint not in (None, event.fingerprint):
                    yield Finding("data", entry.line, f"data {event.fingerprint}, earlier attempts had {fingerprint}")
                fingerprint = event.fingerprint
            if isinstance(event, TrainStep) and trained and not restored:
                # Interrupted before the first commit, a run begins anew.
                if not (nothing_to_restore and step == 1):
                    yield Finding("steps", entry.line, "training goes on in a new attempt without checkpoint.restore")
                restored = True
        trained = trained or any(isinstance(entry.event, TrainStep) for entry in attempt)


def _against_audit(run: Path, rank: int, attempts: Sequence[Attempt]) -> Findings:
    if not audit_path(run, rank).is_file() and not any(
        getattr(entry.event, "audit_anchor", None) for attempt in attempts for entry in attempt
    ):
        yield Finding("anchor", 0, "the run has no audit chain")
        return
    try:
        verdicts = verify_run(run)
    except UserError as error:
        yield Finding("anchor", 0, str(error))
        return
    for other, verdict in verdicts.items():
        if other != rank and verdict.kind == "missing":  # it may have no log of its own to tell
            yield Finding("anchor", 0, f"audit chain of rank {other} {verdict.describe()}")
    if verdicts[rank].status == "tampered":
        yield Finding("anchor", 0, f"audit chain {verdicts[rank].describe()}")
        return
    recorded: dict[tuple[int, str], object] = {
        (record["attempt"], record["gate"]): record["value"]
        for record in read_audit(audit_path(run, rank))
        if record["event"] in ("off", "active")
    }
    for attempt in attempts:
        for entry in attempt:
            if isinstance(entry.event, RunStop) and entry.event.audit_anchor is None:
                yield Finding("anchor", entry.line, "run.stop without the audit chain's anchor")
            if isinstance(entry.event, GatesResolved):
                for row in entry.event.gates:
                    if recorded.get((entry.envelope.attempt, row.gate)) != row.value:
                        yield Finding("gates", entry.line, f"{row.gate}={row.value} is not what the audit chain says")
