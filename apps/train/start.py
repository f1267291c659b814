"""From a config to a run that can train: data, model, optimizer, loader; and on resume everything as it was.

Not for records (session.py) nor for the loop (loop.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from apps.train.circumstances import Circumstances, refuse_others, torch_anomaly
from apps.train.compiles import CompileWatch
from apps.train.config import TrainConfig
from apps.train.data.loader import BatchLoader
from apps.train.engine import build_engine
from apps.train.evaluate import ValidationSet, choose_documents
from apps.train.hooks import Sink, open_sinks
from apps.train.kernels import KernelWatch
from apps.train.lane import Lane, set_threads
from apps.train.loop import Progress, Run
from apps.train.prefetch import Prefetcher
from apps.train.save import (
    TrainerState,
    choose_checkpoint,
    committed_steps,
    read_state,
    remove_unfinished,
    restore_optimizer,
    restore_weights,
    set_aside_later,
    set_rng_state,
)
from apps.train.session import Session
from apps.train.signals import SignalGuard
from libs.flags.errors import UserError
from libs.flags.events import BackendChosen, CheckpointAbort, CheckpointRestore, DataFingerprint, EnvSnapshot
from libs.flags.gateset import GateSet
from libs.flags.provenance import snapshot
from libs.flags.runlog import read_events
from libs.kernels.attention.pallas.gates import requested_backend as requested_attention
from libs.kernels.backend import Choice
from libs.kernels.loss.gates import requested_backend
from libs.model import HybridLM
from libs.model.checkpoint import checkpoint_step
from libs.model.hybrid import between_blocks
from libs.model.sharding import model_partitions
from libs.model.text.shards import DataDir, PackedDataset
from libs.parallel.mesh import Groups, Parallel
from libs.parallel.seeds import role_seeds
from libs.parallel.together import together


class Corpus(NamedTuple):
    """The data a run reads, opened and checked."""

    train: PackedDataset
    validation: ValidationSet


class Started(NamedTuple):
    """What is decided and open before anything is built."""

    lane: Lane
    gates: GateSet
    corpus: Corpus


class Restored(NamedTuple):
    """A verified checkpoint and its trainer state."""

    path: Path
    state: TrainerState


def open_corpus(config: TrainConfig) -> Corpus:
    """Open the data directory and choose the held-out documents.

    Raises:
        UserError: no such directory (with the command that builds it), damaged, too small for a window, or a
            tokenizer larger than the model's vocabulary.
    """
    path = Path(config.data.dir)
    if not path.is_dir():
        raise UserError(
            f"data.dir = {config.data.dir!r} does not exist; build it with "
            f"`fathom data build --source installed --out {path}` (or --source with a directory of C++)"
        )
    data = DataDir.open(path)
    if data.tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size = {config.model.vocab_size} is less than the {data.tokenizer.vocab_size} ids "
            f"of the tokenizer in {path}; allowed: {data.tokenizer.vocab_size} or more"
        )
    train = PackedDataset(data, "train", config.data.window, config.data.seed)
    return Corpus(train, choose_documents(data, config.data))


def find_checkpoint(session: Session, from_step: int | None, groups: Groups) -> Restored | None:
    """The checkpoint to resume from, verified; None when the run was interrupted before its first one.

    All ranks look for it together and find the same one.

    Raises:
        UserError: the checkpoint is corrupt or of another run, or those the log tells of are gone.
    """
    run_dir, log = session.run_dir, session.log
    for path in remove_unfinished(run_dir, groups):
        step = checkpoint_step(path)
        event = CheckpointAbort(path=str(path), reason="left half-written by an interrupted attempt; removed")
        log.emit(event, step=step if step is not None else 0, level="warning")
    if not committed_steps(run_dir) and from_step is None:
        commits = [event for event in read_events(run_dir) if event["event"] == "checkpoint.commit"]
        if not commits:
            return None
        raise UserError(f"{run_dir}: the log tells of {len(commits)} checkpoints, but none is there any more")
    path = choose_checkpoint(run_dir, from_step, groups)
    state = read_state(path)
    if state.run_id != session.identity.run_id:
        raise UserError(f"{path} is a checkpoint of run {state.run_id!r}, not of {session.identity.run_id!r}")
    return Restored(path, state)


def assemble(
    session: Session,
    guard: SignalGuard,
    setup: Started,
    groups: Groups,
    restored: Restored | None,
    before: Circumstances,
) -> Run:
    """Build everything, restoring it from `restored` if there is one, and record what was built.

    before: what the run was at work with.

    Raises:
        UserError: that was other data, precision or device, or the checkpoint is of another model. Interrupted:
            by a signal.
    """
    config, state = session.config, None if restored is None else restored.state
    lane, corpus, alone = setup.lane, setup.corpus, groups.world.size == 1
    with together(groups.world, "starting"):
        refuse_others(before, corpus.train.fingerprint, lane)
        if (anomaly := torch_anomaly(before)) is not None:
            session.log.emit(anomaly, level="warning")
        threads = set_threads(config.train, before.threads)
        if alone:
            guard.check()
        torch.manual_seed(config.train.seed if alone else role_seeds(config.train.seed, groups).sharded)
        model = _build_model(config, lane, groups)
        loader = BatchLoader(
            corpus.train,
            windows_per_batch=config.data.windows_per_batch,
            seed=config.data.seed,
            rank=groups.dp.rank,
            world_size=groups.dp.size,
            cursor=None if state is None else state.cursor,
        )
    # Outside of `together`: a sharded optimizer is built by all replicas in one exchange.
    engine, optimizer, engine_choice, watch = build_engine(config, model, groups, lane.xla)
    progress = Progress()
    if restored is not None:
        restore_weights(restored.path, model, optimizer, groups)
        restore_optimizer(restored.path, model, optimizer, groups)
        progress = _restore_progress(session, restored, groups)
        if alone:  # with several ranks each has a seed of its own, and nothing draws from it
            set_rng_state(restored.state.rng)
    choices = {**lane.choices, "train.threads": threads, "parallel.engine": engine_choice, **model.choices}
    _record(session, setup, groups, choices)
    if alone:
        guard.check()
    scan = model.choices.get("mimo")
    return Run(
        session=session,
        guard=guard,
        gates=setup.gates,
        lane=lane,
        groups=groups,
        threads=int(threads.value),
        model=model,
        optimizer=optimizer,
        engine=engine,
        loader=loader if lane.xla is None else Prefetcher(loader, lane.move),
        validation=corpus.validation,
        kernels=_watch(session, lane, None if scan is None else scan.value),
        sinks=_sinks(session, groups, progress),
        progress=progress,
        first_step=progress.step,
        first_update=None if watch is None else watch(),
    )


def _sinks(session: Session, groups: Groups, progress: Progress) -> Sequence[Sink]:
    """The console and its like belong to rank 0; every rank has its own log."""
    if groups.world.rank != 0:
        return ()
    return open_sinks(session.config, session.run_dir, run_id=session.identity.run_id, first_step=progress.step)


def _watch(session: Session, lane: Lane, backend: str | None) -> KernelWatch:
    if lane.xla is None:
        return KernelWatch(session.log, backend)
    return CompileWatch(session.log, lane.xla, strict=session.config.xla.strict_compile)


def _build_model(config: TrainConfig, lane: Lane, groups: Groups) -> HybridLM:
    parallel = None if groups.world.size == 1 else Parallel(groups, config.parallel.sequence_parallel)
    checkpointing = config.train.activation_checkpointing
    model = HybridLM(config.model.architecture(), activation_checkpointing=checkpointing, parallel=parallel)
    model.reset_parameters(config.train.seed)
    model.to(lane.device)
    if lane.xla is not None and lane.xla.mesh is not None:
        lane.xla.mesh.cut_parameters(model, model_partitions(model, lane.xla.shape))
        lane.xla.mesh.keep_rows(between_blocks(model))
    train = config.train
    try:
        loss, attention = requested_backend(train.loss_backend), requested_attention(train.attention_backend)
        model.request_backends(mimo=train.mimo_backend, attention=attention, loss=loss)
    except ValueError as error:
        raise UserError(f"train: {error}") from error
    return model


def _restore_progress(session: Session, restored: Restored, groups: Groups) -> Progress:
    state = restored.state
    set_aside_later(session.run_dir, step=state.step, attempt=session.log.attempt, groups=groups)
    # The anchor in a checkpoint is of rank 0's chain.
    anchor = state.audit_anchor if groups.world.rank == 0 else None
    event = CheckpointRestore(path=str(restored.path), audit_anchor=anchor)
    session.log.emit(event, step=state.step)
    return Progress(
        step=state.step,
        tokens_total=state.tokens_total,
        evaluated_at=state.evaluated_at,
        saved_at=state.step,
        skipped=state.skipped,
    )


def _record(session: Session, setup: Started, groups: Groups, choices: dict[str, Choice]) -> None:
    """env.snapshot, data.fingerprint and every automatic choice with its reason."""
    lane, corpus, config, log = setup.lane, setup.corpus, session.config, session.log
    data = corpus.validation.data
    extra = {
        "device": str(lane.device),
        "device_name": lane.device_name,
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "layout": groups.layout._asdict(),
        "rank": groups.world.rank,
        "seeds": {"train": config.train.seed, "data": config.data.seed},
        "tokenizer_fingerprint": data.tokenizer.fingerprint,
        "data_fingerprint": corpus.train.fingerprint,
    }
    log.emit(EnvSnapshot.model_validate(snapshot(extra)))
    splits = data.manifest.splits
    fingerprint = DataFingerprint(
        fingerprint=corpus.train.fingerprint,
        data_dir=str(data.path),
        train_tokens=splits["train"].tokens,
        valid_tokens=splits["valid"].tokens,
        tokenizer=data.tokenizer.fingerprint,
    )
    log.emit(fingerprint)
    for op, choice in choices.items():
        log.emit(BackendChosen(op=op, value=choice.value, reason=choice.reason))
