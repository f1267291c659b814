"""Checkpoints of a run: written aside, checksummed, committed by a marker, pruned; read back verified.

Not for the format of the weights nor of the marker (libs.model.checkpoint), nor for when to save (loop.py).

`groups` everywhere: the ranks that train together (None: one process). Such a call is a collective of all of them, and
what goes wrong on one is raised as UserError on all (libs.parallel.together). Only rank 0 creates, renames or deletes
folders; every rank writes the files of what it holds. Saving in the background: writer.py.
"""

from __future__ import annotations

import base64
import errno
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError

from apps.train.data.loader import Cursor
from apps.train.optim import AnyOptimizer, held_state, load_optimizer_tensors
from apps.train.snapshot import STATE, FileJob, file_jobs, take_snapshot
from libs.flags.errors import UserError
from libs.model import HybridLM
from libs.model.checkpoint import (
    CHECKPOINTS,
    MARKER,
    FileRecord,
    checkpoint_name,
    checkpoint_step,
    commit,
    committed_checkpoints,
    seal,
    staging_directory,
    unfinished_checkpoints,
    verify_checkpoint,
)
from libs.model.shard_files import LocalTensors, read_layout
from libs.model.text.tokenizer import Tokenizer
from libs.model.weights import load_parameters, read_parameters
from libs.parallel.mesh import Groups, single
from libs.parallel.together import everyones, first_does, run_together

SUPERSEDED = "superseded"
Value = TypeVar("Value")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class TrainerState(BaseModel):
    """Everything of a run that is neither weights nor optimizer tensors; `trainer.json` of a checkpoint.

    step: finished steps. evaluated_at: step of the last validation, -1 before it. rng: base64 of torch's
    generators. audit_anchor: "HASH:LEN" of the audit chain when the checkpoint was written.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    run_id: str
    attempt: int
    step: int
    tokens_total: int
    evaluated_at: int
    skipped: int
    cursor: Cursor
    rng: dict[str, str]
    threads: int
    precision: str
    device: str
    torch_version: str
    config_hash: str
    gates_hash: str
    gates: dict[str, bool | str]
    data_fingerprint: str
    audit_anchor: str


class Saved(NamedTuple):
    """A committed checkpoint: its folder, the sha256 of its manifest, and the seconds it took."""

    path: Path
    sha256: str
    seconds: float


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` is committed."""
    return run_dir / CHECKPOINTS / checkpoint_name(step)


def committed_steps(run_dir: Path) -> list[int]:
    """Steps with a committed checkpoint, ascending."""
    return [_step_of(path) for path in committed_checkpoints(run_dir)]


def _step_of(path: Path) -> int:
    step = checkpoint_step(path)
    assert step is not None, path
    return step


def rng_state() -> dict[str, str]:
    """torch's generators. Nothing in a run draws from Python's or numpy's."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: base64.b64encode(state.numpy().tobytes()).decode("ascii") for name, state in states.items()}


def set_rng_state(states: dict[str, str]) -> None:
    """Put back what `rng_state` gave; one this machine lacks is left out (start.py refuses other devices)."""
    for name, text in states.items():
        state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        if name == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(state)


@contextmanager
def disk_full_is_usage(what: str) -> Iterator[None]:
    """Turn "no space left" from Python or from safetensors (which has no errno) into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise UserError(f"the disk is full while {what}: {error}; free space and resume the run") from error
    except SafetensorError as error:
        if not any(f"os error {number}" in str(error) for number in _DISK_FULL):
            raise
        raise UserError(f"the disk is full while {what}: {error}; free space and resume the run") from error


def write_files(staging: Path, jobs: list[FileJob], *, sealed: bool) -> dict[str, FileRecord]:
    """Write this rank's files; `sealed`: hash and flush them here too, else `commit` does. No collective.

    Raises:
        UserError: the disk is full.
    """
    records: dict[str, FileRecord] = {}
    with disk_full_is_usage(f"saving {staging}"):
        for job in jobs:
            job.write(staging)
            records |= {name: seal(staging / name) for name in job.names if sealed}
    return records


def stage(final: Path, groups: Groups) -> Path:
    """The empty folder that every rank writes into."""

    def make() -> Path:
        with disk_full_is_usage(f"saving {final}"):
            return staging_directory(final)

    return first_does(groups.world, f"saving {final}", make)


def commit_files(staging: Path, final: Path, sealed: dict[str, FileRecord], groups: Groups) -> str:
    """Make what all ranks have written a checkpoint; the sha256 of its manifest."""
    everything = {name: record for of_rank in everyones(groups.world, sealed) for name, record in of_rank.items()}

    def finish() -> str:
        with disk_full_is_usage(f"saving {final}"):
            return commit(staging, final, everything)

    return first_does(groups.world, f"committing {final}", finish)


def discard(run_dir: Path, groups: Groups) -> None:
    """After a save that failed on all ranks: rank 0 removes what there is of it; the rest falls to the next attempt."""
    if groups.world.rank == 0:
        with suppress(OSError):
            remove_unfinished(run_dir)


def save_checkpoint(
    run_dir: Path,
    *,
    model: HybridLM,
    optimizer: AnyOptimizer,
    tokenizer: Tokenizer,
    state: TrainerState,
    groups: Groups | None = None,
) -> Saved:
    """Write everything aside, then commit. On failure nothing of it is left, and older ones are untouched.

    Raises:
        UserError: the disk is full; with several ranks, whatever went wrong on one of them.
    """
    started, groups = time.perf_counter(), single() if groups is None else groups
    final, several = checkpoint_dir(run_dir, state.step), groups.world.size > 1
    try:
        staging = stage(final, groups)
        state_json, held = state.model_dump_json(indent=1), held_state(model, optimizer, groups)
        jobs = file_jobs(take_snapshot(model, held, tokenizer, state_json, groups, copy=False))
        sealed = run_together(groups.world, f"saving {final}", lambda: write_files(staging, jobs, sealed=several))
        digest = commit_files(staging, final, sealed, groups)
    except BaseException:
        discard(run_dir, groups)
        raise
    return Saved(final, digest, time.perf_counter() - started)


def prune(run_dir: Path, *, keep_last: int, keep_every: int | None, groups: Groups | None = None) -> list[int]:
    """Delete checkpoints beyond the newest `keep_last`, sparing multiples of `keep_every`; their steps."""
    return _first(groups, "pruning", lambda: _prune(run_dir, keep_last, keep_every))


def _first(groups: Groups | None, what: str, work: Callable[[], Value]) -> Value:
    return work() if groups is None else first_does(groups.world, f"{what} checkpoints", work)


def _prune(run_dir: Path, keep_last: int, keep_every: int | None) -> list[int]:
    old = committed_steps(run_dir)[:-keep_last]
    gone = [step for step in old if keep_every is None or step % keep_every]
    gone = [step for step in gone if not checkpoint_dir(run_dir, step).is_symlink()]  # kept elsewhere: not ours
    for step in gone:
        # Without its marker a half-deleted checkpoint is not one.
        (checkpoint_dir(run_dir, step) / MARKER).unlink()
        shutil.rmtree(checkpoint_dir(run_dir, step))
    return gone


def remove_unfinished(run_dir: Path, groups: Groups | None = None) -> list[Path]:
    """Delete what an interrupted save or deletion left, and nothing else that lies there; the folders deleted."""
    return _first(groups, "removing unfinished", lambda: _remove_unfinished(run_dir))


def _remove_unfinished(run_dir: Path) -> list[Path]:
    left = unfinished_checkpoints(run_dir)
    for path in left:
        shutil.rmtree(path)
    return left


def choose_checkpoint(run_dir: Path, from_step: int | None, groups: Groups | None = None) -> Path:
    """The newest committed checkpoint, or that of `from_step`, with every checksum verified.

    Several ranks hash a share of the files each, and must all see the same checkpoint.

    Raises:
        UserError: none, not that one, or one whose files are not what was written (no older one instead).
    """
    world = (single() if groups is None else groups).world
    path, others = first_does(world, f"choosing a checkpoint of {run_dir}", lambda: _choose(run_dir, from_step))

    def verify() -> str:
        try:
            return verify_checkpoint(path, reader=world.rank, readers=world.size)
        except UserError as error:
            way_out = f"choose another with --from-step: {others}" if others else "there is no other checkpoint"
            raise UserError(f"{error}\n{way_out}") from error

    digests = everyones(world, run_together(world, f"verifying {path}", verify))
    if odd := [rank for rank, digest in enumerate(digests) if digest != digests[0]]:
        raise UserError(f"{path}: ranks {odd} read another manifest than rank 0: it must lie on one shared file system")
    return path


def _choose(run_dir: Path, from_step: int | None) -> tuple[Path, list[int]]:
    """The checkpoint, and the steps that there are beside it."""
    steps = committed_steps(run_dir)
    if not steps:
        raise UserError(f"{run_dir} has no committed checkpoint: nothing to resume from; start a new run")
    step = steps[-1] if from_step is None else from_step
    if step not in steps:
        raise UserError(f"--from-step {from_step}: {run_dir} has no such checkpoint; committed: {steps}")
    return checkpoint_dir(run_dir, step), [other for other in steps if other != step]


def set_aside_later(run_dir: Path, *, step: int, attempt: int, groups: Groups | None = None) -> list[int]:
    """Move committed checkpoints after `step` out of the way: the run is going to write its own."""
    return _first(groups, "setting aside later", lambda: _set_aside_later(run_dir, step, attempt))


def _set_aside_later(run_dir: Path, step: int, attempt: int) -> list[int]:
    later = [other for other in committed_steps(run_dir) if other > step]
    for other in later:
        path = checkpoint_dir(run_dir, other)
        target = path.parent / SUPERSEDED / f"before-attempt-{attempt}" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    return later


def read_state(checkpoint: Path) -> TrainerState:
    """`trainer.json` of a verified checkpoint.

    Raises:
        UserError: not written by `fathom train` of this version, or under another step's name.
    """
    path = checkpoint / STATE
    try:
        state = TrainerState.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(f"{path} is not the state of a fathom training run: {error}") from error
    if state.step != checkpoint_step(checkpoint):
        raise UserError(f"{checkpoint} holds step {state.step}, which is not what its name says")
    return state


def restore_model(checkpoint: Path, model: HybridLM, groups: Groups | None = None) -> None:
    """Copy the weights of a verified checkpoint of any layout into a model of this one.

    Raises:
        UserError: weights of another model, or damaged files.
    """
    world = (single() if groups is None else groups).world
    run_together(world, f"reading the weights of {checkpoint}", lambda: load_parameters(checkpoint, model))


def restore_weights(checkpoint: Path, model: HybridLM, optimizer: AnyOptimizer, groups: Groups) -> None:
    """The same for a run: into the optimizer that owns the weights where one does, and through it into the model.

    Raises:
        UserError: as `restore_model`.
    """
    if isinstance(optimizer, torch.optim.Optimizer) or not optimizer.owns_weights:
        restore_model(checkpoint, model, groups)
        return
    what = f"reading the weights of {checkpoint}"
    optimizer.restore_weights(run_together(groups.world, what, lambda: read_parameters(checkpoint, model)))


def restore_optimizer(checkpoint: Path, model: HybridLM, optimizer: AnyOptimizer, groups: Groups | None = None) -> None:
    """Load the optimizer's tensors of a verified checkpoint of any layout.

    `load_optimizer_tensors` is given a mapping that reads a tensor when it is asked for: a sharded optimizer takes
    what it holds and leaves the rest on the disk.
    """
    world = (single() if groups is None else groups).world
    rank, size = (0, 1) if model.parallel is None else (model.parallel.tp.rank, model.parallel.tp.size)

    def load() -> None:
        files = [checkpoint / name for name in read_layout(checkpoint).optimizer]
        load_optimizer_tensors(model, optimizer, LocalTensors(files, model.config, rank, size))

    run_together(world, f"reading the optimizer state of {checkpoint}", load)
