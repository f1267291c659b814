"""Checkpoints of a run: written aside, checksummed, committed by a marker, pruned; read back verified.

Not for the format of the weights nor of the marker (libs.model.checkpoint), nor for when to save (loop.py).
"""

from __future__ import annotations

import base64
import errno
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from apps.train.data.loader import Cursor
from apps.train.optim import load_optimizer_tensors, optimizer_tensors
from libs.flags.errors import UserError
from libs.model import HybridLM
from libs.model.checkpoint import (
    CHECKPOINTS,
    MARKER,
    checkpoint_name,
    checkpoint_step,
    commit,
    committed_checkpoints,
    staging_directory,
    verify_checkpoint,
)
from libs.model.weights import save_model

OPTIMIZER = "optimizer.safetensors"
STATE = "trainer.json"
SUPERSEDED = "superseded"
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


def save_checkpoint(
    run_dir: Path,
    *,
    model: HybridLM,
    optimizer: torch.optim.Optimizer,
    tokenizer_file: Path,
    state: TrainerState,
) -> Saved:
    """Write everything aside, then commit. On failure nothing of it is left, and older ones are untouched.

    Raises:
        UserError: the disk is full.
    """
    started = time.perf_counter()
    final = checkpoint_dir(run_dir, state.step)
    try:
        with disk_full_is_usage(f"saving {final}"):
            staging = staging_directory(final)
            save_model(staging, model)
            save_file(optimizer_tensors(model, optimizer), staging / OPTIMIZER)
            shutil.copyfile(tokenizer_file, staging / "tokenizer.json")
            (staging / STATE).write_text(state.model_dump_json(indent=1) + "\n", encoding="utf-8")
            digest = commit(staging, final)
    except BaseException:
        remove_unfinished(run_dir)
        raise
    return Saved(final, digest, time.perf_counter() - started)


def prune(run_dir: Path, *, keep_last: int, keep_every: int | None) -> list[int]:
    """Delete checkpoints beyond the newest `keep_last`, sparing multiples of `keep_every`."""
    old = committed_steps(run_dir)[:-keep_last]
    gone = [step for step in old if keep_every is None or step % keep_every]
    for step in gone:
        # Without its marker a half-deleted checkpoint is not one.
        (checkpoint_dir(run_dir, step) / MARKER).unlink()
        shutil.rmtree(checkpoint_dir(run_dir, step))
    return gone


def remove_unfinished(run_dir: Path) -> list[Path]:
    """Delete what an interrupted save or deletion left: everything of a step that has no marker."""
    committed = committed_checkpoints(run_dir)
    folder = run_dir / CHECKPOINTS
    left = [path for path in folder.iterdir() if path not in committed] if folder.is_dir() else []
    left = [path for path in left if path.name != SUPERSEDED]
    for path in left:
        shutil.rmtree(path)
    return left


def choose_checkpoint(run_dir: Path, from_step: int | None) -> Path:
    """The newest committed checkpoint, or that of `from_step`, with every checksum verified.

    Raises:
        UserError: none, not that one, or one whose files are not what was written (no older one instead).
    """
    steps = committed_steps(run_dir)
    if not steps:
        raise UserError(f"{run_dir} has no committed checkpoint: nothing to resume from; start a new run")
    step = steps[-1] if from_step is None else from_step
    if step not in steps:
        raise UserError(f"--from-step {from_step}: {run_dir} has no such checkpoint; committed: {steps}")
    path = checkpoint_dir(run_dir, step)
    try:
        verify_checkpoint(path)
    except UserError as error:
        others = [other for other in steps if other != step]
        way_out = f"choose another with --from-step: {others}" if others else "there is no other checkpoint"
        raise UserError(f"{error}\n{way_out}") from error
    return path


def set_aside_later(run_dir: Path, *, step: int, attempt: int) -> list[int]:
    """Move committed checkpoints after `step` out of the way: the run is going to write its own."""
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


def restore_optimizer(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load the optimizer's tensors of a verified checkpoint."""
    load_optimizer_tensors(model, optimizer, load_file(checkpoint / OPTIMIZER))
