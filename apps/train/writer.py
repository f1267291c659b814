"""Writing checkpoints while training goes on: copied in the step, written by a thread, committed at a safe point.

Not for what is written (snapshot.py) nor for when (loop.py). The thread writes, hashes and flushes this rank's files
and nothing else: what needs the other ranks happens where the loop calls, so that collectives stay in one order.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Protocol, Self

from apps.train.optim import AnyOptimizer, held_state
from apps.train.save import (
    Saved,
    TrainerState,
    checkpoint_dir,
    commit_files,
    discard,
    save_checkpoint,
    stage,
    write_files,
)
from apps.train.snapshot import FileJob, file_jobs, take_snapshot
from libs.model import HybridLM
from libs.model.checkpoint import FileRecord
from libs.model.text.tokenizer import Tokenizer
from libs.parallel.mesh import Groups
from libs.parallel.together import Background, together

# How long an abort waits for the file that is being written: it must not hold up a job that has failed.
_ABORT_WAIT_S = 10.0


class SaveListener(Protocol):
    """Hears how each save ended; called on every rank, by the thread that called the writer."""

    def on_commit(self, saved: Saved) -> None:
        """The checkpoint is committed: told on every rank at the same safe point."""

    def on_abort(self, path: Path, reason: str) -> None:
        """It was given up, and nothing of it counts. An error follows, or is on its way already."""


class _Abandoned(RuntimeError):
    """The thread was told to stop; nobody waits for its result."""


class _Pending(NamedTuple):
    """A save under way: its folders, when it began, this rank's files, and the thread that writes them."""

    final: Path
    staging: Path
    started: float
    jobs: list[FileJob]
    stop: threading.Event
    work: Background[dict[str, FileRecord]]


class CheckpointWriter:
    """Saves now, or in the background. Every method but `abort` is called by all ranks at the same point of the loop.

    with CheckpointWriter(run_dir, groups=groups, listener=listener, asynchronous=True) as writer:
        writer.begin(...)   # copies the tensors; a save under way is finished first
        writer.poll()       # at each safe point: commits once all ranks have written, raises what failed
        writer.finish()     # waits and commits: at the end, on SIGTERM, and before a stop that all ranks agreed on

    Leaving the block normally finishes what is under way; leaving it by an exception aborts it, without collectives,
    since the other ranks may be gone. An aborted folder has no marker, and the next attempt reports and removes it.
    """

    def __init__(self, run_dir: Path, *, groups: Groups, listener: SaveListener, asynchronous: bool) -> None:
        self._run_dir, self._groups, self._listener = run_dir, groups, listener
        self._asynchronous = asynchronous
        self._pending: _Pending | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        else:
            self.abort(f"{type(error).__name__} during the save: {error}")

    @property
    def under_way(self) -> bool:
        """Whether a save has begun that is neither committed nor given up."""
        return self._pending is not None

    def begin(self, *, model: HybridLM, optimizer: AnyOptimizer, tokenizer: Tokenizer, state: TrainerState) -> None:
        """Save the present step: committed when this returns, or once the thread is through.

        Raises:
            UserError: the disk is full, or any rank's trouble; the earlier save's too.
        """
        self.finish()
        final, started = checkpoint_dir(self._run_dir, state.step), time.perf_counter()
        groups, listener = self._groups, self._listener
        with self._reported(final):
            if not self._asynchronous:
                saved = save_checkpoint(
                    self._run_dir,
                    model=model,
                    optimizer=optimizer,
                    tokenizer=tokenizer,
                    state=state,
                    groups=groups,
                )
            else:
                staging, stop = stage(final, groups), threading.Event()
                state_json, held = state.model_dump_json(indent=1), held_state(model, optimizer, groups)
                with together(groups.world, f"copying what goes into {final}"):  # host memory may be short on one
                    jobs = file_jobs(take_snapshot(model, held, tokenizer, state_json, groups, copy=True))
                work = Background(groups.world, f"saving {final}", lambda: _write_until(stop, staging, jobs))
                self._pending = _Pending(final, staging, started, jobs, stop, work)
                return
        listener.on_commit(saved)

    def poll(self) -> None:
        """Commit the save under way if every rank has written its files; no work and no collective when idle.

        Raises:
            UserError: on every rank, what failed on any of them since `begin`.
        """
        if self._pending is not None and self._pending.work.done():
            self._complete()

    def finish(self) -> None:
        """Wait for the save under way and commit it. Raises as `poll`."""
        if self._pending is not None:
            self._complete()

    def _complete(self) -> None:
        pending, self._pending = self._pending, None
        assert pending is not None
        with self._reported(pending.final):
            try:
                digest = commit_files(pending.staging, pending.final, pending.work.result(), self._groups)
            except BaseException:
                discard(self._run_dir, self._groups)
                raise
        self._listener.on_commit(Saved(pending.final, digest, time.perf_counter() - pending.started))

    @contextmanager
    def _reported(self, final: Path) -> Iterator[None]:
        """Tell the listener of a failure, whatever its kind."""
        try:
            yield
        except BaseException as error:
            self._listener.on_abort(final, str(error) or type(error).__name__)
            raise

    def abort(self, reason: str) -> None:
        """Give up the save under way, on this rank alone: removes this rank's files of it if they are finished."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        pending.stop.set()
        if pending.work.wait_here(_ABORT_WAIT_S):
            with suppress(OSError):
                for job in pending.jobs:
                    for name in job.names:
                        (pending.staging / name).unlink(missing_ok=True)
                pending.staging.rmdir()  # fails while another rank's files are there: the last one takes it
        self._listener.on_abort(pending.final, reason)


def _write_until(stop: threading.Event, staging: Path, jobs: list[FileJob]) -> dict[str, FileRecord]:
    records: dict[str, FileRecord] = {}
    for job in jobs:
        if stop.is_set():
            raise _Abandoned(staging.name)
        records |= write_files(staging, [job], sealed=True)
    return records
