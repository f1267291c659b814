"""One attempt from the resolved settings to an exit status: gates first, then data, records, model, loop.

Not for the parts: each line here calls the file that knows.
"""

from __future__ import annotations

import sys

from apps.train.anomaly import NonFiniteStop
from apps.train.arguments import Arguments
from apps.train.hooks import refuse_missing_sinks
from apps.train.lane import Lane, choose_lane, gather_facts
from apps.train.loop import Run, train
from apps.train.origins import Resolved
from apps.train.save import disk_full_is_usage
from apps.train.session import (
    Identity,
    Session,
    gates_or_refusal,
    open_session,
    point_latest,
    put_gates_in_force,
    write_config,
)
from apps.train.signals import SignalGuard
from apps.train.start import Corpus, assemble, find_checkpoint, open_corpus
from libs.flags.environment import launch
from libs.flags.errors import ExitStatus, GateRefused, UserError
from libs.flags.gateset import GateSet


def run_attempt(arguments: Arguments, identity: Identity, resolved: Resolved, guard: SignalGuard) -> ExitStatus:
    """Train until done or told to stop. Nothing is written before gates are resolved and data is open.

    Raises:
        UserError, GateRefused, Interrupted: as the parts do, after run.stop has been written.
    """
    if launch().world_size != 1:
        raise UserError(f"WORLD_SIZE = {launch().world_size}: this version trains on one device; allowed: 1")
    config = resolved.config
    refuse_missing_sinks(config.log)
    lane = choose_lane(config.train)
    gates = gates_or_refusal(gather_facts(config, lane))
    if isinstance(gates, GateRefused):
        with open_session(identity, resolved, gates, guard):
            raise AssertionError("a refused session does not open")
    corpus = open_corpus(config)
    guard.check()
    try:
        with open_session(identity, resolved, gates, guard) as session, disk_full_is_usage("training"):
            return _train_in(session, arguments, gates, lane, corpus, guard)
    except NonFiniteStop as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitStatus.NONFINITE


def _train_in(
    session: Session, arguments: Arguments, gates: GateSet, lane: Lane, corpus: Corpus, guard: SignalGuard
) -> ExitStatus:
    resumes = arguments.resume is not None
    restored = find_checkpoint(session, arguments.from_step) if resumes else None
    state = None if restored is None else restored.state
    put_gates_in_force(
        session,
        gates,
        before=None if state is None else state.gates,
        anchor=None if state is None else state.audit_anchor,
        accepted=set(arguments.accept_gate_change),
    )
    if not resumes:
        write_config(session.identity, session.resolved)
    point_latest(session.identity, session.config.log.runs_dir)
    run = assemble(session, guard, gates, lane, corpus, restored)
    try:
        _greet(run)
        session.outcome = train(run)
        for sink in run.sinks:
            sink.on_note(f"{session.outcome.status}: {session.outcome.reason}; run {session.run_dir}")
            if session.outcome.status == "requeue":
                sink.on_note(f"go on with: fathom train --resume {session.run_dir}")
    finally:
        for sink in run.sinks:
            sink.close()
    return session.outcome.exit_code


def _greet(run: Run) -> None:
    config, total = run.config, sum(parameter.numel() for parameter in run.model.parameters())
    batch = config.data.window * config.data.windows_per_batch * config.train.grad_accumulation
    lines = (
        f"run {run.session.run_dir}  attempt {run.session.log.attempt}  from step {run.progress.step}",
        f"model {config.model.name}: {total:,} parameters; {batch:,} tokens per step; "
        f"{run.lane.device_name}, {run.lane.precision}, {run.threads} threads",
    )
    for sink in run.sinks:
        for line in lines:
            sink.on_note(line)
