"""One attempt from the command line to an exit status: gates first, then data, records, model, loop.

Not for the parts: each line here calls the file that knows.
"""

from __future__ import annotations

import sys

from apps.train.anomaly import NonFiniteStop
from apps.train.arguments import Arguments
from apps.train.circumstances import Circumstances, in_checkpoint, in_log
from apps.train.facts import rank_tokens
from apps.train.kernels import check_scan
from apps.train.loop import Run, train
from apps.train.ranks import Agreed, join
from apps.train.save import disk_full_is_usage
from apps.train.session import Session, open_session, point_latest, put_gates_in_force, write_config
from apps.train.signals import SignalGuard
from apps.train.start import Started, assemble, find_checkpoint
from libs.flags.environment import launch
from libs.flags.errors import ExitStatus, GateRefused
from libs.model import parameter_count
from libs.parallel.exchange import RanksLost, last_words
from libs.parallel.together import together


def run_attempt(arguments: Arguments, guard: SignalGuard) -> ExitStatus:
    """Train until done or told to stop. Nothing is written before gates are resolved and data is open.

    With several ranks a signal during start-up is answered at the first safe point of the loop, by all together.

    Raises:
        UserError, RunRefused, Interrupted: as the parts do, after run.stop has been written.
    """
    this = launch()
    if this.world_size == 1:
        guard.check()
    try:
        with join(arguments, this) as agreed, last_words(agreed.groups):
            status = _attempt(agreed, guard)
            guard.leave()
            return status
    except NonFiniteStop as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitStatus.NONFINITE
    except RanksLost as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitStatus.FAILURE


def _attempt(agreed: Agreed, guard: SignalGuard) -> ExitStatus:
    setup, records = agreed.setup, (agreed.identity, agreed.setup.resolved, agreed.setup.gates, guard, agreed.place)
    if isinstance(setup.gates, GateRefused):
        with open_session(*records):
            raise AssertionError("a refused session does not open")
    if agreed.groups.world.size == 1:
        guard.check()
    with open_session(*records) as session, last_words(agreed.groups), disk_full_is_usage("training"):
        return _train_in(session, agreed, guard)


def _train_in(session: Session, agreed: Agreed, guard: SignalGuard) -> ExitStatus:
    setup, groups, arguments = agreed.setup, agreed.groups, agreed.arguments
    assert not isinstance(setup.gates, GateRefused), "refused gates have no session"
    restored, before = None, Circumstances()
    if arguments.resume is not None:
        restored = find_checkpoint(session, arguments.from_step, groups)
        before = in_log(session.run_dir, session.log.attempt) if restored is None else in_checkpoint(restored.state)
    put_gates_in_force(
        session,
        setup.gates,
        before=before.gates,
        anchor=None if restored is None else restored.state.audit_anchor,
        accepted=set(arguments.accept_gate_change),
    )
    if groups.world.rank == 0 and arguments.resume is None:
        write_config(session.identity, session.resolved)
    assert setup.corpus is not None, "gates are in order, so the data was opened"
    run = assemble(session, guard, Started(setup.lane, setup.gates, setup.corpus), groups, restored, before)
    if groups.world.rank == 0:
        point_latest(session.identity, session.config.log.runs_dir)
    try:
        _greet(run)
        with together(groups.world, "checking the kernels"):
            _check_kernels(run)
        session.outcome = train(run)
        for sink in run.sinks:
            sink.on_note(f"{session.outcome.status}: {session.outcome.reason}; run {session.run_dir}")
            if session.outcome.status == "requeue":
                sink.on_note(f"go on with: fathom train --resume {session.run_dir}")
    finally:
        run.loader.close()
        for sink in run.sinks:
            sink.close()
    return session.outcome.exit_code


def _check_kernels(run: Run) -> None:
    tokens = rank_tokens(run.config, run.groups.layout)
    for result in check_scan(run.model, run.lane, run.session.log, run.kernels, tokens=tokens):
        for sink in run.sinks:
            sink.on_note(result.summary())
    if run.groups.world.size == 1:
        run.guard.check()


def _greet(run: Run) -> None:
    config, layout = run.config, run.groups.layout
    total = parameter_count(run.model.config).total
    batch = config.data.window * config.data.windows_per_batch * config.train.grad_accumulation
    spread = f"; {layout.world_size} processes, {layout}" if layout.world_size > 1 else ""
    lines = (
        f"run {run.session.run_dir}  attempt {run.session.log.attempt}  from step {run.progress.step}",
        f"model {config.model.name}: {total:,} parameters; {batch:,} tokens per step; "
        f"{run.lane.device_name}, {run.lane.precision}, {run.threads} threads{spread}",
    )
    for sink in run.sinks:
        for line in lines:
            sink.on_note(line)
