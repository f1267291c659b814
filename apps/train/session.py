"""One attempt of a run: its directory, run log, audit chain and gates, from run.start to run.stop.

Not for training: whatever happens inside, the log ends with how it ended.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from apps.train.anomaly import NonFiniteStop
from apps.train.config import TrainConfig, hash_values
from apps.train.origins import Resolved, resolve_config, saved_layer
from apps.train.signals import Interrupted, SignalGuard
from libs.flags.audit import AuditLog
from libs.flags.audit_record import Anchor, audit_path
from libs.flags.canonical import printable
from libs.flags.compare import compare_for_resume
from libs.flags.environment import Launch, fathom_variables
from libs.flags.errors import ExitStatus, GateRefused, RunRefused, UserError
from libs.flags.events import AnomalyGeneric, ConfigResolved, RunStart, RunStop, SignalReceived
from libs.flags.facts import Facts
from libs.flags.gateset import GateSet
from libs.flags.installed import install, record_changes, record_refusals
from libs.flags.provenance import redact_command
from libs.flags.resolve import resolve
from libs.flags.runlog import RunLog, log_path, next_attempt, read_events
from libs.flags.runs import find_run
from libs.flags.verify import verify_chain
from libs.model.checkpoint import resolve_run
from libs.parallel.exchange import RanksLost

CONFIG_FILE = "config.json"
LATEST = "latest"
Status = Literal["completed", "requeue", "refused", "failed"]


class Identity(NamedTuple):
    """What a run is, from its first attempt on."""

    run_dir: Path
    run_id: str
    recipe: str


class Place(NamedTuple):
    """Whose records: which rank of how many, in which attempt of the run (of all ranks alike)."""

    rank: int
    world_size: int
    attempt: int


class Outcome(NamedTuple):
    """How an attempt ended, for run.stop and for the exit status."""

    status: Status
    exit_code: ExitStatus
    reason: str


class Session:
    """The open records of one attempt."""

    def __init__(self, identity: Identity, resolved: Resolved, log: RunLog, audit: AuditLog) -> None:
        self.identity = identity
        self.resolved = resolved
        self.log = log
        self.audit = audit
        self.outcome: Outcome | None = None

    @property
    def run_dir(self) -> Path:
        return self.identity.run_dir

    @property
    def config(self) -> TrainConfig:
        return self.resolved.config


def new_identity(config: TrainConfig, recipe: str, run_dir: str | None, this: Launch | None = None) -> Identity:
    """A directory for a new run. After a restart by torchrun: that of an earlier attempt which died before it began.

    Raises:
        UserError: it exists already and is not empty.
    """
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    suffix = _job_suffix(this) if this is not None and this.job else secrets.token_hex(3)
    run_id = f"{stamp}-{_stem(recipe)}-{suffix}"
    path = Path(config.log.runs_dir) / run_id if run_dir is None else Path(run_dir)
    if this is not None and this.attempt > 0 and not is_run(path):
        return Identity(path, _logged_run_id(path) or run_id, recipe)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        way_out = f"go on with `fathom train --resume {path}`, or " if is_run(path) else ""
        raise UserError(f"run directory {path} exists and is not empty: {way_out}choose another --run-dir")
    return Identity(path, run_id, recipe)


def _stem(recipe: str) -> str:
    """Its part of the run's name, which is in every record."""
    return printable(Path(recipe).stem)


def _job_suffix(this: Launch) -> str:
    """The same for all processes and attempts of one torchrun job on this machine, whose agent is their parent."""
    return hashlib.sha256(f"{this.job}:{os.getppid()}".encode()).hexdigest()[:6]


def run_of_job(runs_dir: str, recipe: str, this: Launch) -> Path | None:
    """The directory that an earlier attempt of this torchrun job made, if it came to that."""
    found = sorted(Path(runs_dir).glob(f"*-{_stem(recipe)}-{_job_suffix(this)}")) if this.job else []
    return found[-1] if found else None


def _logged_run_id(run_dir: Path) -> str | None:
    if not log_path(run_dir).is_file():
        return None
    return next((str(event["run_id"]) for event in read_events(run_dir)), None)


def is_run(run_dir: Path) -> bool:
    """Whether a run has begun here: it can be resumed."""
    return (run_dir / CONFIG_FILE).is_file()


def has_gone_back(run_dir: Path, step: int, attempts: int) -> bool:
    """Whether one of the last `attempts` attempts of a run restored `step`."""
    path = resolve_run(run_dir)
    first = next_attempt(path) - attempts
    restored = [event for event in read_events(path) if event["event"] == "checkpoint.restore"]
    return any(event["attempt"] >= first and event["step"] == step for event in restored)


def saved_run(run: str) -> tuple[Identity, Resolved]:
    """What an existing run is, and the config it began with.

    Raises:
        UserError: not a run directory, or a config that this version does not read or that was edited since.
    """
    run_dir = resolve_run(Path(run))
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        if not run_dir.is_dir():
            found = find_run(run)  # raises, naming the runs that are near
            raise UserError(f"--resume {run}: there is no such folder; is it --resume {found}?")
        raise UserError(
            f"--resume {run}: no {CONFIG_FILE} in {run_dir}: not a run of `fathom train`, or one that was refused "
            "before it began: start it anew, without --resume"
        )
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        identity = Identity(run_dir.resolve(), saved["run_id"], saved["recipe"])
        layer = saved_layer(saved["config"], saved["origins"])
        edited = hash_values(saved["config"]) != saved["config_hash"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error!r}") from error
    if edited:
        raise UserError(
            f"{path} is not what the run began with: its config does not have its config_hash; put the file back as "
            "it was, and give what may change on resume as --section.key VALUE"
        )
    return identity, resolve_config([layer])


def gates_or_refusal(facts: Facts) -> GateSet | GateRefused:
    """Resolve the environment's gates; a refusal is kept until there is a run log to write it to."""
    try:
        return resolve(fathom_variables(), facts)
    except GateRefused as refusal:
        return refusal


@contextmanager
def open_session(
    identity: Identity,
    resolved: Resolved,
    gates: GateSet | GateRefused,
    guard: SignalGuard,
    place: Place | None = None,
) -> Iterator[Session]:
    """Open the records of this rank, write run.start and config.resolved, refuse refused gates; at the end write
    run.stop.

    Raises:
        GateRefused: `gates` is a refusal, now recorded. UserError: the audit chain has been tampered with.
    """
    run_dir = identity.run_dir
    rank, world_size, attempt = place or Place(0, 1, next_attempt(run_dir))
    with RunLog.open(run_dir, run_id=identity.run_id, attempt=attempt, rank=rank) as log:
        start = RunStart(
            command=redact_command(sys.argv),
            recipe=identity.recipe,
            config_hash=resolved.config.hash(),
            gates_hash=gates.hash if isinstance(gates, GateSet) else None,
            world_size=world_size,
        )
        log.emit(start)
        log.emit(ConfigResolved(config=resolved.config.to_json(), origins=resolved.origins))
        session: Session | None = None
        outcome = Outcome("failed", ExitStatus.FAILURE, "the process died of an error that is not the user's")
        try:
            audit = AuditLog.open(audit_path(run_dir, rank), identity.run_id, attempt, rank)
            session = Session(identity, resolved, log, audit)
            if isinstance(gates, GateRefused):
                record_refusals(gates, session.audit, log)
                raise gates
            yield session
            assert session.outcome is not None, "an attempt ends with an outcome"
            outcome = session.outcome
        except RunRefused as error:
            outcome = Outcome("refused", ExitStatus.GATE_REFUSED, str(error))
            raise
        except UserError as error:
            outcome = Outcome("failed", ExitStatus.USAGE, str(error))
            raise
        except RanksLost as error:
            outcome = Outcome("failed", ExitStatus.FAILURE, str(error))
            log.emit(AnomalyGeneric(what="ranks lost", details={"reason": str(error)}, action="stop"), level="error")
            raise
        except NonFiniteStop as error:
            outcome = Outcome("failed", ExitStatus.NONFINITE, str(error))
            raise
        except Interrupted as error:
            outcome = Outcome("requeue", ExitStatus.REQUEUE, f"{error} during start-up: nothing to save yet")
            raise
        finally:
            _stop(log, session, outcome, guard)


def _stop(log: RunLog, session: Session | None, outcome: Outcome, guard: SignalGuard) -> None:
    report_signal(log, guard)
    log.emit(
        RunStop(
            status=outcome.status,
            exit_code=int(outcome.exit_code),
            reason=outcome.reason,
            audit_anchor=None if session is None else str(session.audit.anchor()),
        ),
        level="info" if outcome.status in ("completed", "requeue") else "error",
    )
    if session is not None:
        session.audit.close()


def report_signal(log: RunLog, guard: SignalGuard) -> None:
    """Write the signal that came, once: the handler itself must not touch the log."""
    received = guard.take_unreported()
    if received is not None:
        log.emit(SignalReceived(signal=received.signal, phase=received.phase), level="warning")


def put_gates_in_force(
    session: Session,
    gates: GateSet,
    *,
    before: Mapping[str, bool | str] | None,
    anchor: str | None,
    accepted: set[str],
) -> None:
    """Install the gates; on resume only those of the checkpoint, or with each change accepted by name.

    `before`, `anchor`: the gates and the audit chain's head in the checkpoint, None in a run without one.

    Raises:
        GateRefused: a change that was not accepted. UserError: the audit chain has lost what it held.
    """
    # Anchors are of rank 0's chain; the others hold by their own links.
    if anchor is not None and session.log.rank == 0:
        found = verify_chain(session.audit.path, [Anchor.parse(anchor)], run_id=session.identity.run_id)
        if found.status == "tampered":
            raise UserError(f"{session.audit.path}: {found.describe()}; the checkpoint attests to it")
    try:
        changed = compare_for_resume(before if before is not None else gates.values(), gates, accepted)
    except GateRefused as error:
        record_refusals(error, session.audit, session.log)
        raise
    install(gates, session.audit, session.log)
    record_changes(changed, session.audit, session.log)


def write_config(identity: Identity, resolved: Resolved) -> None:
    """RUN/config.json: the settings the run began with; written once, whole or not at all."""
    content: dict[str, Any] = {
        "run_id": identity.run_id,
        "recipe": identity.recipe,
        "config": resolved.config.to_json(),
        "origins": resolved.origins,
        "config_hash": resolved.config.hash(),
    }
    path = identity.run_dir / CONFIG_FILE
    aside = path.with_name(f".{CONFIG_FILE}")
    aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    aside.rename(path)


def point_latest(identity: Identity, runs_dir: str) -> None:
    """runs/latest -> this run, when it lies in the folder of runs. A convenience: a run goes on without it, warned."""
    folder = Path(runs_dir)
    if identity.run_dir.resolve().parent != folder.resolve():
        return
    aside = folder / f".{LATEST}-{os.getpid()}"
    try:
        aside.unlink(missing_ok=True)
        aside.symlink_to(identity.run_dir.name)
        aside.replace(folder / LATEST)
    except OSError as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        print(f"warning: {folder / LATEST} does not point to this run: {error}", file=sys.stderr)
