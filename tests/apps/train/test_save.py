"""Which checkpoints stay, and which folders are debris."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from apps.train.save import (
    checkpoint_dir,
    choose_checkpoint,
    committed_steps,
    prune,
    remove_unfinished,
    rng_state,
    set_aside_later,
    set_rng_state,
)
from libs.flags.errors import UserError
from libs.model.checkpoint import commit, staging_directory


def make(run: Path, *steps: int) -> None:
    for step in steps:
        staging = staging_directory(checkpoint_dir(run, step))
        (staging / "x").write_text(str(step))
        commit(staging, checkpoint_dir(run, step))


@pytest.mark.parametrize(
    ("last", "every", "left"),
    [(1, None, [50]), (2, None, [40, 50]), (1, 20, [20, 40, 50]), (9, None, [10, 20, 30, 40, 50])],
)
def test_prune(tmp_path: Path, last: int, every: int | None, left: list[int]) -> None:
    make(tmp_path, 10, 20, 30, 40, 50)
    gone = prune(tmp_path, keep_last=last, keep_every=every)
    assert committed_steps(tmp_path) == left
    assert sorted([*gone, *left]) == [10, 20, 30, 40, 50]
    assert len(list((tmp_path / "checkpoints").iterdir())) == len(left)


def test_debris_is_removed_and_checkpoints_stay(tmp_path: Path) -> None:
    make(tmp_path, 10, 20)
    (checkpoint_dir(tmp_path, 20) / "COMMITTED").unlink()
    staging_directory(checkpoint_dir(tmp_path, 30))
    set_aside_later(tmp_path, step=5, attempt=1)
    make(tmp_path, 6)
    assert len(remove_unfinished(tmp_path)) == 2
    assert committed_steps(tmp_path) == [6]
    assert (tmp_path / "checkpoints" / "superseded" / "before-attempt-1" / "step-00000010" / "x").exists()


def test_choose(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no committed checkpoint"):
        choose_checkpoint(tmp_path, None)
    make(tmp_path, 10, 20)
    assert choose_checkpoint(tmp_path, None) == checkpoint_dir(tmp_path, 20)
    assert choose_checkpoint(tmp_path, 10) == checkpoint_dir(tmp_path, 10)
    with pytest.raises(UserError, match=r"--from-step 15.*\[10, 20\]"):
        choose_checkpoint(tmp_path, 15)
    (checkpoint_dir(tmp_path, 20) / "x").write_text("21")
    with pytest.raises(UserError, match=r"(?s)x has sha256.*--from-step: \[10\]"):
        choose_checkpoint(tmp_path, None)


def test_generators_come_back() -> None:
    state = rng_state()
    first = torch.rand(5)
    set_rng_state(state)
    assert torch.equal(torch.rand(5), first)
