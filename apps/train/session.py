"""One attempt of a run: its directory, run log, audit chain and gates, from run.start to run.stop.

Not for training: whatever happens inside, the log ends with how it ended.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from apps.train.anomaly import NonFiniteStop
from apps.train.config import TrainConfig
from apps.train.origins import Resolved, resolve_config, saved_layer
from apps.train.signals import Interrupted, SignalGuard
from libs.flags.audit import AuditLog
from libs.flags.audit_record import Anchor, audit_path
from libs.flags.compare import compare_for_resume
from libs.flags.environment import fathom_variables
from libs.flags.errors import ExitStatus, GateRefused, UserError
from libs.flags.events import ConfigResolved, RunStart, RunStop, SignalReceived
from libs.flags.facts import Facts
from libs.flags.gateset import GateSet
from libs.flags.installed import install, record_changes, record_refusals
from libs.flags.provenance import redact_command
from libs.flags.resolve import resolve
from libs.flags.runlog import RunLog, next_attempt
from libs.flags.verify import verify_chain
from libs.model.checkpoint import resolve_run

CONFIG_FILE = "config.json"
LATEST = "latest"
Status = Literal["completed", "requeue", "refused", "failed"]


class Identity(NamedTuple):
    """What a run is, from its first attempt on."""

    run_dir: Path
    run_id: str
    recipe: str


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


def new_identity(config: TrainConfig, recipe: str, run_dir: str | None) -> Identity:
    """A directory for a new run.

    Raises:
        UserError: it exists already and is not empty.
    """
    recipe_name = Path(recipe).stem
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    run_id = f"{stamp}-{recipe_name}-{secrets.token_hex(3)}"
    path = Path(config.log.runs_dir) / run_id if run_dir is None else Path(run_dir)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        way_out = f"go on with `fathom train --resume {path}`, or " if (path / CONFIG_FILE).is_file() else ""
        raise UserError(f"run directory {path} exists and is not empty: {way_out}choose another --run-dir")
    return Identity(path, run_id, recipe)


def saved_run(run: str) -> tuple[Identity, Resolved]:
    """What an existing run is, and the config it began with.

    Raises:
        UserError: not a run directory, or a config this version does not read.
    """
    run_dir = resolve_run(Path(run))
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"--resume {run}: no {CONFIG_FILE} in {run_dir}: not a run of `fathom train`")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        identity = Identity(run_dir.resolve(), saved["run_id"], saved["recipe"])
        layer = saved_layer(saved["config"], saved["origins"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error!r}") from error
    return identity, resolve_config([layer])


def gates_or_refusal(facts: Facts) -> GateSet | GateRefused:
    """Resolve the environment's gates; a refusal is kept until there is a run log to write it to."""
    try:
        return resolve(fathom_variables(), facts)
    except GateRefused as refusal:
        return refusal


@contextmanager
def open_session(
    identity: Identity, resolved: Resolved, gates: GateSet | GateRefused, guard: SignalGuard
) -> Iterator[Session]:
    """Open the records, write run.start and config.resolved, refuse refused gates; at the end write run.stop.

    Raises:
        GateRefused: `gates` is a refusal, now recorded. UserError: the audit chain has been tampered with.
    """
    run_dir, attempt = identity.run_dir, next_attempt(identity.run_dir)
    with RunLog.open(run_dir, run_id=identity.run_id, attempt=attempt) as log:
        start = RunStart(
            command=redact_command(sys.argv),
            recipe=identity.recipe,
            config_hash=resolved.config.hash(),
            gates_hash=gates.hash if isinstance(gates, GateSet) else None,
            world_size=1,
        )
        log.emit(start)
        log.emit(ConfigResolved(config=resolved.config.to_json(), origins=resolved.origins))
        session: Session | None = None
        outcome = Outcome("failed", ExitStatus.FAILURE, "the process died of an error that is not the user's")
        try:
            session = Session(identity, resolved, log, AuditLog.open(audit_path(run_dir), identity.run_id, attempt))
            if isinstance(gates, GateRefused):
                record_refusals(gates, session.audit, log)
                raise gates
            yield session
            assert session.outcome is not None, "an attempt ends with an outcome"
            outcome = session.outcome
        except GateRefused as error:
            outcome = Outcome("refused", ExitStatus.GATE_REFUSED, str(error))
            raise
        except UserError as error:
            outcome = Outcome("failed", ExitStatus.USAGE, str(error))
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
    if anchor is not None:
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
    """runs/latest -> this run, when it lies in the folder of runs."""
    folder = Path(runs_dir)
    if identity.run_dir.resolve().parent != folder.resolve():
        return
    aside = folder / f".{LATEST}-{os.getpid()}"
    aside.symlink_to(identity.run_dir.name)
    aside.replace(folder / LATEST)
