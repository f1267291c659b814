"""The training loop, the same for every lane and recipe: validate, save, step, until done or told to stop.

Not for building what it uses (start.py), nor for one step's arithmetic (step.py).
"""

from __future__ import annotations

import math
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from apps.train.anomaly import NonFiniteStop, write_bundle
from apps.train.config import TrainConfig
from apps.train.data.loader import Batch, BatchLoader, Cursor
from apps.train.evaluate import ValidationSet, validate
from apps.train.hooks import Sink, StepReport
from apps.train.kernels import KernelWatch
from apps.train.lane import Lane
from apps.train.metrics import StepClock, bits_per_byte, mean_context, mfu, peak_memory_bytes
from apps.train.optim import AnyOptimizer
from apps.train.prefetch import Prefetcher
from apps.train.save import Saved, TrainerState, checkpoint_dir, prune, rng_state
from apps.train.schedule import learning_rate
from apps.train.session import Outcome, Session, report_signal
from apps.train.signals import PHASES, Interrupted, SignalGuard
from apps.train.step import StepResult, train_step
from apps.train.writer import CheckpointWriter
from libs.flags.errors import ExitStatus
from libs.flags.events import (
    AnomalyNonfinite,
    CheckpointAbort,
    CheckpointBegin,
    CheckpointCommit,
    CursorRecord,
    EvalResult,
    TrainStep,
)
from libs.flags.gateset import GateSet
from libs.model import HybridLM, flops_per_token
from libs.model.checkpoint import checkpoint_step
from libs.parallel.data import Engine
from libs.parallel.exchange import gather_numbers
from libs.parallel.fp8_built import FirstUpdate
from libs.parallel.mesh import Groups
from libs.parallel.together import together


@dataclass
class Progress:
    """How far a run has come; what a checkpoint restores beside tensors and the cursor.

    step: finished steps. evaluated_at, saved_at: of the last validation and checkpoint, -1 before the first.
    skipped: steps left out because they were not finite.
    """

    step: int = 0
    tokens_total: int = 0
    evaluated_at: int = -1
    saved_at: int = -1
    skipped: int = 0


@dataclass
class Run:
    """Everything a run works with, built by start.py. first_update: until the first update of the attempt, where there
    is something to check after it."""

    session: Session
    guard: SignalGuard
    gates: GateSet
    lane: Lane
    groups: Groups
    threads: int
    model: HybridLM
    optimizer: AnyOptimizer
    engine: Engine
    loader: BatchLoader | Prefetcher
    validation: ValidationSet
    kernels: KernelWatch
    sinks: Sequence[Sink]
    progress: Progress
    first_step: int
    first_update: FirstUpdate | None = None

    @property
    def config(self) -> TrainConfig:
        return self.session.config


def train(run: Run) -> Outcome:
    """Run to the end, or to the next safe point after a signal to any rank.

    Raises:
        NonFiniteStop: a loss or gradient was not finite and may not be skipped. UserError: the disk is full.
    """
    settings, saves = run.config.checkpoint, Saves(run)
    writer = CheckpointWriter(
        run.session.run_dir, groups=run.groups, listener=saves, asynchronous=settings.asynchronous
    )
    with run.guard.during("step"), writer:
        try:
            return _train(run, writer, saves)
        except NonFiniteStop:
            writer.finish()  # all ranks stop here together, and what was saved before is good
            raise


def _train(run: Run, writer: CheckpointWriter, saves: Saves) -> Outcome:
    progress, settings = run.progress, run.config.train
    while True:
        validate_if_due(run)
        pause = _reason_to_pause(run)
        if pause is not None or _save_is_due(run):
            save(run, writer, saves)
            pause = pause or _reason_to_pause(run)
        else:
            writer.poll()
        done = progress.step == settings.steps and progress.evaluated_at == progress.step
        if done or pause is not None:
            writer.finish()
        if done:
            return Outcome("completed", ExitStatus.OK, f"all {settings.steps} steps done")
        if pause is not None:
            return Outcome("requeue", ExitStatus.REQUEUE, f"{pause}; saved at step {progress.step}")
        one_step(run)


def _reason_to_pause(run: Run) -> str | None:
    """Why to stop here: the same answer on every rank, whichever has got a signal."""
    report_signal(run.session.log, run.guard)
    received = run.guard.received
    if run.groups.world.size > 1:
        mine = (0, 0) if received is None else (signal.Signals[received.signal], PHASES.index(received.phase))
        for rank, (number, phase) in enumerate(gather_numbers(run.groups.world, mine)):
            if number:
                return f"{signal.Signals(int(number)).name} on rank {rank} during {PHASES[int(phase)]}"
    elif received is not None:
        return f"{received.signal} during {received.phase}"
    stop_after = run.config.train.stop_after
    if stop_after is not None and run.first_step < stop_after == run.progress.step:
        return f"train.stop_after = {stop_after}"
    return None


def _save_is_due(run: Run) -> bool:
    step = run.progress.step
    return step > 0 and (step % run.config.checkpoint.every == 0 or step == run.config.train.steps)


def validate_if_due(run: Run) -> None:
    """Bits per byte of the held-out documents at step 0, every `eval_every` steps, and at the end."""
    progress, settings = run.progress, run.config.train
    due = progress.step % settings.eval_every == 0 or progress.step == settings.steps
    if not due or progress.evaluated_at == progress.step:
        return
    run.engine.settle()
    try:
        with run.guard.during("evaluation"):
            found = validate(run.model, run.validation, run.lane, run.guard, run.groups)
    except Interrupted:
        return  # not evaluated: a resumed run does it again
    run.kernels.report("evaluation", progress.step)
    if not math.isfinite(found.bpb):
        event = AnomalyNonfinite(what="validation bpb", value=found.bpb, bundle=None, action="stop")
        run.session.log.emit(event, step=progress.step, level="error")
        raise NonFiniteStop(f"validation bpb is {found.bpb} at step {progress.step}")
    metrics = {"bpb": found.bpb, "bytes": float(found.n_bytes)}
    excluded = run.validation.excluded + found.n_excluded
    event_result = EvalResult(suite="validation", metrics=metrics, n=found.n_documents, excluded=excluded)
    run.session.log.emit(event_result, step=progress.step)
    progress.evaluated_at = progress.step
    for sink in run.sinks:
        sink.on_eval(progress.step, metrics)


def one_step(run: Run) -> None:
    """Draw the micro-batches, update the weights, and tell everyone."""
    config, progress = run.config, run.progress
    clock = StepClock(run.lane.device)
    cursor_before, rng_before = run.loader.cursor, rng_state()
    with clock.phase("data"):
        batches = [run.loader.next_batch() for _ in range(config.train.grad_accumulation)]
    rate = learning_rate(progress.step, peak=config.optim.lr, steps=config.train.steps, schedule=config.schedule)
    result = train_step(
        run.model,
        run.engine,
        batches,
        rate=rate,
        clip_norm=config.optim.clip_norm,
        lane=run.lane,
        clock=clock,
        groups=run.groups,
    )
    if result.nonfinite is not None:
        _stop_or_skip(run, result, batches, cursor_before, rng_before)
    elif run.first_update is not None:
        run.engine.settle()
        with together(run.groups.world, "the check after the first update"):
            run.first_update.refuse_unless_trained(result.losses.loss)
        run.first_update = None
    progress.step += 1
    run.kernels.report("step", progress.step)
    progress.tokens_total += result.losses.tokens
    if result.nonfinite is None:
        _report(run, result, batches, rate, clock)


def _stop_or_skip(run: Run, result: StepResult, batches: Sequence[Batch], cursor: Cursor, rng: dict[str, str]) -> None:
    """Write the bundle; then stop, or count the step against the budget."""
    settings, number = run.config.train, run.progress.step + 1
    bundle = write_bundle(
        run.session.run_dir,
        step=number,
        attempt=run.session.log.attempt,
        result=result,
        model=run.model,
        gradients=run.engine.gradients(),
        batches=batches,
        cursor_before=cursor,
        rng_before=rng,
        config=run.config.to_json(),
        rank=run.groups.world.rank,
    )
    assert result.nonfinite is not None
    what = result.nonfinite if result.rank is None else f"{result.nonfinite} on rank {result.rank}"
    value = result.losses.loss if result.nonfinite == "loss" else result.grad_norm
    may_skip = settings.nonfinite == "skip" and run.progress.skipped < settings.nonfinite_budget
    run.progress.skipped += may_skip
    action = f"skipped, {run.progress.skipped} of {settings.nonfinite_budget}" if may_skip else "stop"
    event = AnomalyNonfinite(what=what, value=value, bundle=str(bundle), action=action)
    run.session.log.emit(event, step=number, level="warning" if may_skip else "error")
    message = f"step {number}: {what} is {value}; see {bundle}"
    if not may_skip:
        raise NonFiniteStop(message)
    run.engine.zero_grad()
    for sink in run.sinks:
        sink.on_note(f"{message}; {action}")


def _report(run: Run, result: StepResult, batches: Sequence[Batch], rate: float, clock: StepClock) -> None:
    losses, progress, total = result.losses, run.progress, clock.total()
    context = mean_context([batch.cu_seqlens for batch in batches])
    flops = flops_per_token(run.model.config, run.config.data.window, mean_context=context)
    utilisation = mfu(
        flops_per_token=flops.train,
        tokens_per_s=losses.tokens / total / run.groups.world.size / run.lane.chips,
        device_name=run.lane.device_name,
        precision=run.lane.precision,
    )
    event = TrainStep(
        loss=losses.loss,
        main_loss=losses.main_loss,
        mtp_loss=losses.mtp_loss,
        bpb=bits_per_byte(losses.main_nll_sum, losses.n_bytes),
        lr=rate,
        grad_norm=result.grad_norm,
        tokens=losses.tokens,
        tokens_total=progress.tokens_total,
        tokens_per_s=losses.tokens / total,
        time_s=total,
        data_s=clock.seconds["data"],
        forward_backward_s=clock.seconds["forward_backward"],
        optimizer_s=clock.seconds["optimizer"],
        other_s=clock.other(total),
        mfu=utilisation.value,
        mfu_reason=utilisation.reason,
        max_memory_bytes=peak_memory_bytes(run.lane.device),
        cursor=CursorRecord.model_validate(run.loader.cursor.model_dump()),
    )
    run.session.log.emit(event, step=progress.step)
    values = event.model_dump(exclude={"cursor", "mfu_reason"})
    report = StepReport(progress.step, {name: float(value) for name, value in values.items() if value is not None})
    for sink in run.sinks:
        sink.on_step(report)


class Saves:
    """Tells the log how each save ended, and prunes old checkpoints after it."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.anchor = ""

    def on_commit(self, saved: Saved) -> None:
        run, step = self._run, checkpoint_step(saved.path)
        event = CheckpointCommit(
            path=str(saved.path), sha256=saved.sha256, seconds=saved.seconds, audit_anchor=self.anchor
        )
        run.session.log.emit(event, step=step)
        settings = run.config.checkpoint
        prune(run.session.run_dir, keep_last=settings.keep_last, keep_every=settings.keep_every, groups=run.groups)

    def on_abort(self, path: Path, reason: str) -> None:
        event = CheckpointAbort(path=str(path), reason=reason)
        self._run.session.log.emit(event, step=checkpoint_step(path), level="error")


def save(run: Run, writer: CheckpointWriter, saves: Saves) -> None:
    """Save the present step, unless that is done: committed when this returns, or later in the background."""
    progress, log = run.progress, run.session.log
    if progress.saved_at == progress.step:
        return
    run.engine.settle()
    with run.guard.during("checkpoint"):
        writer.finish()
        path = checkpoint_dir(run.session.run_dir, progress.step)
        saves.anchor = str(run.session.audit.anchor())
        log.emit(CheckpointBegin(path=str(path), audit_anchor=saves.anchor), step=progress.step)
        writer.begin(
            model=run.model,
            optimizer=run.optimizer,
            tokenizer=run.validation.data.tokenizer,
            state=_state(run, saves.anchor),
        )
    progress.saved_at = progress.step


def _state(run: Run, anchor: str) -> TrainerState:
    progress = run.progress
    return TrainerState(
        run_id=run.session.identity.run_id,
        attempt=run.session.log.attempt,
        step=progress.step,
        tokens_total=progress.tokens_total,
        evaluated_at=progress.evaluated_at,
        skipped=progress.skipped,
        cursor=run.loader.cursor,
        rng=rng_state(),
        threads=run.threads,
        precision=run.lane.precision,
        device=run.lane.device.type,
        torch_version=torch.__version__,
        config_hash=run.config.hash(),
        gates_hash=run.gates.hash,
        gates=run.gates.values(),
        data_fingerprint=run.loader.dataset.fingerprint,
        audit_anchor=anchor,
    )
