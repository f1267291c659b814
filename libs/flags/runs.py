"""Reading runs back: finding a run directory, its ranks, the verdict on its chains, and which gates it had.

Not for writing one, and not for judging the run log (see `logcheck`).
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from libs.flags.audit_record import GENESIS, Anchor, audit_path, read_audit
from libs.flags.canonical import printable
from libs.flags.errors import UserError, nearest, reading
from libs.flags.registry import GateValue
from libs.flags.runlog import log_path, read_events
from libs.flags.verify import Kind, VerifyResult, verify_records
from libs.flags.witness import LogDigest, read_digest

RUNS = Path("runs")
_LONGEST_PATH = 4096
_RANK_FILE = re.compile(r"rank(\d{5})\.jsonl")
_OUTCOMES = ("off", "refused", "active")


class RunGate(NamedTuple):
    """An outcome (off, refused or active) and value that a gate had in a run, and in which attempts."""

    outcome: str
    value: GateValue | None
    stage: str | None
    exposed: bool
    attempts: tuple[int, ...]


class RunGates(NamedTuple):
    """The gates of a run, over all of its attempts: a gate has several entries if the attempts differ.

    attempts: all of them that resolved gates. unknown: refused variables that name no gate.
    """

    run: str
    started: str | None
    attempts: tuple[int, ...]
    gates: dict[str, tuple[RunGate, ...]]
    unknown: tuple[str, ...]


def is_run(path: Path) -> bool:
    """Whether there are records in it, or it may not be asked: such a run has a problem, and is not left out."""
    try:
        return (path / "logs").is_dir() or (path / "audit").is_dir()
    except OSError as error:
        return error.errno != errno.ENAMETOOLONG  # no file has that name


def name_of(run: Path) -> str:
    """Its name as text: what is not UTF-8 is escaped, and so is the backslash, so that no two runs get one name."""
    return printable(run.name.replace("\\", "\\\\"))


@reading()
def find_run(name: str) -> Path:
    """The run directory that `name` means: a path, a name under runs/, or a file holding one (runs/latest).

    Raises:
        UserError: there is none; the message names the runs that are near.
    """
    for path in (Path(name), RUNS / name):
        for candidate in (path, *_named_in(path)):
            if is_run(candidate):
                return candidate
    wanted = Path(name)
    if os.path.exists(wanted):
        raise UserError(f"{name} is not a run directory: it has no logs/ and no audit/")
    folder = wanted.parent if os.path.isdir(wanted.parent) and wanted.parent != Path(".") else RUNS
    names = [path.name for path in list_runs(folder)]
    close = nearest(wanted.name, names)
    hint = f"; did you mean {folder / close}?" if close else ""
    listed = f"runs in {folder}: {', '.join(names[-10:])}" if names else f"there are no runs in {folder}"
    raise UserError(f"no run at {name}{hint} ({listed})")


def _named_in(path: Path) -> tuple[Path, ...]:
    """What the first line of a file may name; nothing where there is no such file."""
    if not os.path.isfile(path):
        return ()
    with path.open("rb") as file:
        target = os.fsdecode(file.readline(_LONGEST_PATH)).strip()
    return (Path(target), path.parent / target) if target else ()


@reading()
def list_runs(folder: Path) -> list[Path]:
    """The run directories in `folder`, by name; not links, so that runs/latest does not count twice.

    Raises:
        UserError: the folder cannot be read.
    """
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if not path.is_symlink() and is_run(path))


@reading()
def ranks(run: Path) -> list[int]:
    """Rank 0, which every run has, and every other rank that has a log or an audit chain."""
    files = [*(run / "logs").glob("rank*.jsonl"), *(run / "audit").glob("rank*.jsonl")]
    return sorted({0, *(int(match.group(1)) for file in files if (match := _RANK_FILE.fullmatch(file.name)))})


def run_id(run: Path, rank: int) -> str | None:
    """The id in the run log, or None when this rank has no log."""
    if not log_path(run, rank).is_file():
        return None
    for record in read_events(run, rank=rank):
        return str(record.get("run_id"))
    return None


def checkpoint_anchors(run: Path) -> dict[str, Anchor]:
    """Checkpoint -> the anchor of rank 0's chain in it. Only a committed checkpoint vouches for anything.

    Raises:
        UserError: the state of a committed checkpoint cannot be read.
    """
    found: dict[str, Anchor] = {}
    for state in sorted((run / "checkpoints").glob("*/trainer.json")):
        if (state.parent / "COMMITTED").exists():
            try:
                if not state.is_file():
                    raise ValueError("not a file")  # a pipe would be waited for
                text = json.loads(state.read_bytes()).get("audit_anchor")
            except (OSError, ValueError, AttributeError, RecursionError) as error:
                raise UserError(f"{state} is not readable: {error}") from error
            if text is not None:
                found[f"checkpoint {state.parent.name}"] = Anchor.parse(str(text))
    return found


class RankRecords(NamedTuple):
    """The chain of one rank: the verdict, the records that hold, and the log it was judged against."""

    verdict: VerifyResult
    records: list[dict[str, Any]]
    log: LogDigest


def read_rank(run: Path, rank: int, extra: Iterable[Anchor] = ()) -> RankRecords:
    """Judge the chain of one rank by itself, by every anchor found, and by what the run log tells of it.

    A tail cut after the last anchor shows when the log tells of a record that is gone; a record put after the end
    shows because nothing is written once the log says run.stop. extra: anchors of rank 0 kept elsewhere.
    """
    log = read_digest(run, rank)
    anchors = [*log.anchors().values(), *((*checkpoint_anchors(run).values(), *extra) if rank == 0 else ())]
    path = audit_path(run, rank)
    verdict, records = verify_records(path, anchors, run_id=log.run_id, rank=rank)
    if verdict.status != "tampered":
        verdict = _cut_tail(path, verdict, records, log) or _beyond_the_end(verdict, run, rank, log) or verdict
    return RankRecords(verdict, records, log)


def _cut_tail(
    path: Path, verdict: VerifyResult, records: Sequence[Mapping[str, Any]], log: LogDigest
) -> VerifyResult | None:
    held = {(record["attempt"], record["event"], record["gate"]) for record in records}
    for told in log.told():
        if told not in held:
            what = f"{told.event} of gate {told.gate} in attempt {told.attempt}"
            problem = f"the run log tells of {what}, which is not among the {len(records)} records that are left"
            kind: Kind = "truncate" if path.is_file() else "missing"
            return verdict._replace(status="tampered", kind=kind, first_bad=len(records), problem=problem)
    return None


def _beyond_the_end(verdict: VerifyResult, run: Path, rank: int, log: LogDigest) -> VerifyResult | None:
    end = log.end()
    if end is None or verdict.anchor.length <= end.length:
        return None
    if read_digest(run, rank).end() != end:
        return None  # a new attempt has begun while this one was read
    problem = f"it follows the end: run.stop, the last event of the run log, attests {end.length} records"
    return verdict._replace(status="tampered", kind="insert", first_bad=end.length, problem=problem)


@reading()
def verify_run(run: Path, extra: Iterable[Anchor] = ()) -> dict[int, VerifyResult]:
    """Rank -> the verdict on its chain (see `read_rank`).

    Raises:
        UserError: the run has no audit chain at all and nothing says that it had one.
    """
    kept = list(extra)
    read = {rank: read_rank(run, rank, kept) for rank in ranks(run)}
    results = {rank: found.verdict for rank, found in read.items()} | missing_ranks(run, read)
    refuse_no_chain(run, results)
    return dict(sorted(results.items()))


def missing_ranks(run: Path, read: Mapping[int, RankRecords]) -> dict[int, VerifyResult]:
    """The ranks that the logs which are left prove to have begun, and whose own chain or log is gone.

    Raises:
        UserError: a log is damaged where it says how many ranks there were.
    """
    world = max((found.log.world() for found in read.values()), default=0)
    missing: dict[int, VerifyResult] = {}
    for rank in range(world):
        gone = [str(path) for path in (audit_path(run, rank), log_path(run, rank)) if not path.is_file()]
        known = read.get(rank)
        if gone and (known is None or known.verdict.status != "tampered"):
            problem = f"no {' and no '.join(gone)}, but the run log tells of {world} ranks that all had begun theirs"
            anchor = Anchor(GENESIS, 0) if known is None else known.verdict.anchor
            missing[rank] = VerifyResult("tampered", anchor, 0, 0, "missing", anchor.length, problem)
    return missing


def refuse_no_chain(run: Path, results: Mapping[int, VerifyResult]) -> None:
    """Raise UserError where no rank has a chain and no verdict tells that one is missing."""
    if not any(audit_path(run, rank).is_file() for rank in results) and all(
        result.status != "tampered" for result in results.values()
    ):
        raise UserError(f"{run} has no audit chain (audit/rank00000.jsonl)")


def run_gates(run: Path) -> RunGates:
    """The gates of a run, as rank 0's audit chain has them (unverified: see `verify_run`)."""
    return gates_of(run.name, read_audit(audit_path(run)))


def gates_of(name: str, records: Sequence[Mapping[str, Any]]) -> RunGates:
    """The gates of the run of that name, given the records of rank 0."""
    found: dict[str, dict[tuple[str, str], RunGate]] = {}
    current: dict[str, tuple[str, str]] = {}
    attempts: dict[int, None] = {}
    unknown: dict[str, None] = {}
    for record in records:
        gate, event, attempt = record["gate"], record["event"], int(record["attempt"])
        if event in _OUTCOMES:
            attempts[attempt] = None
        if event in _OUTCOMES and gate is None:
            unknown[str(record["source"])] = None
        elif event in _OUTCOMES:
            key = current[gate] = (event, repr(record["value"]))
            fresh = RunGate(event, record["value"], record["stage"], exposed=False, attempts=())
            entry = found.setdefault(gate, {}).get(key, fresh)
            found[gate][key] = entry._replace(attempts=(*entry.attempts, attempt))
        elif event == "exposed" and gate in current:
            found[gate][current[gate]] = found[gate][current[gate]]._replace(exposed=True)
    started = str(records[0]["ts"]) if records else None
    gates = {gate: tuple(entries.values()) for gate, entries in found.items()}
    return RunGates(name, started, tuple(attempts), gates, tuple(unknown))


def as_json(gates: RunGates) -> dict[str, Any]:
    rows = {name: [entry._asdict() for entry in entries] for name, entries in gates.gates.items()}
    return gates._asdict() | {"gates": rows}
