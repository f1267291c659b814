"""An evaluation in the records of the run that its checkpoint belongs to: one more attempt, start to stop.

The attempt has no recipe, which tells it from training. Not for the result file (results.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from libs.flags.audit import AuditLog
from libs.flags.audit_record import audit_path
from libs.flags.canonical import hash_json
from libs.flags.errors import ExitStatus, GateRefused, UserError
from libs.flags.events import ConfigResolved, EnvSnapshot, RunStart, RunStop
from libs.flags.gateset import GateSet
from libs.flags.installed import install, record_refusals
from libs.flags.provenance import redact_command
from libs.flags.runlog import RunLog, log_path, next_attempt
from libs.flags.runs import run_id
from libs.model.checkpoint import CHECKPOINTS


class Settings(NamedTuple):
    """What was asked for: the command line, the resolved config as JSON, and where each value came from."""

    command: Sequence[str]
    config: Mapping[str, Any]
    origins: Mapping[str, str]


class _Outcome(NamedTuple):
    status: Literal["completed", "refused", "failed"]
    exit_code: ExitStatus
    reason: str


def owning_run(checkpoint: Path) -> Path | None:
    """The run directory that a checkpoint lies in, or None when it lies elsewhere."""
    run_dir = checkpoint.resolve().parent.parent
    inside = checkpoint.resolve().parent.name == CHECKPOINTS
    return run_dir if inside and log_path(run_dir).is_file() else None


@contextmanager
def recorded(
    run_dir: Path, settings: Settings, gates: GateSet | GateRefused, environment: Mapping[str, Any]
) -> Iterator[RunLog]:
    """Open the run's log and audit chain for one attempt; run.stop says how it ended.

    Raises:
        GateRefused: `gates` is a refusal, now recorded.
        UserError: the run is being written by another process, or its audit chain has been tampered with.
    """
    name = run_id(run_dir, 0)
    if name is None:
        raise UserError(f"{log_path(run_dir)} holds no event: not the log of a run")
    attempt = next_attempt(run_dir)
    try:
        log = RunLog.open(run_dir, run_id=name, attempt=attempt)
    except UserError as error:
        raise UserError(f"{error}\nor evaluate without touching the run's records: --detached") from error
    with log:
        log.emit(_start(settings, gates))
        log.emit(ConfigResolved(config=dict(settings.config), origins=dict(settings.origins)))
        audit: AuditLog | None = None
        outcome = _Outcome("failed", ExitStatus.FAILURE, "the process died of an error that is not the user's")
        try:
            audit = AuditLog.open(audit_path(run_dir), name, attempt)
            if isinstance(gates, GateRefused):
                record_refusals(gates, audit, log)
                raise gates
            install(gates, audit, log)
            log.emit(EnvSnapshot.model_validate(environment))
            yield log
            outcome = _Outcome("completed", ExitStatus.OK, "evaluation finished")
        except GateRefused as error:
            outcome = _Outcome("refused", ExitStatus.GATE_REFUSED, str(error))
            raise
        except UserError as error:
            outcome = _Outcome("failed", ExitStatus.USAGE, str(error))
            raise
        finally:
            _stop(log, audit, outcome)


def _start(settings: Settings, gates: GateSet | GateRefused) -> RunStart:
    return RunStart(
        command=redact_command(settings.command),
        recipe=None,
        config_hash=hash_json(dict(settings.config)),
        gates_hash=gates.hash if isinstance(gates, GateSet) else None,
        world_size=1,
    )


def _stop(log: RunLog, audit: AuditLog | None, outcome: _Outcome) -> None:
    anchor = None if audit is None else str(audit.anchor())
    event = RunStop(status=outcome.status, exit_code=int(outcome.exit_code), reason=outcome.reason, audit_anchor=anchor)
    log.emit(event, level="info" if outcome.status == "completed" else "error")
    if audit is not None:
        audit.close()
