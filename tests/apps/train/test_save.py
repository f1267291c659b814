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


def test_what_is_not_debris_stays(tmp_path: Path) -> None:
    """Folders of other names, files and links are the user's, whatever they are called."""
    make(tmp_path, 10)
    folder, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "x").write_text("mine")
    for name in ("best", "step-5", "step-00000007.old", ".step-00000008", "step-00000009.partial"):
        (folder / name).mkdir()
    for name in ("notes.txt", "step-00000002", ".step-00000003.partial"):
        (folder / name).write_text("mine")
    (folder / "step-00000004").symlink_to(elsewhere)
    (folder / "step-00000006").symlink_to("gone")
    before = sorted(folder.iterdir())
    (folder / "step-00000020").mkdir()
    (folder / ".step-00000030.partial").mkdir()
    gone = sorted(path.name for path in remove_unfinished(tmp_path))
    assert gone == [".step-00000030.partial", "step-00000020"]
    assert sorted(folder.iterdir()) == before
    assert (elsewhere / "x").read_text() == "mine"
    for step in (2, 6):
        with pytest.raises(UserError, match="is in the way of a checkpoint"):
            make(tmp_path, step)


def test_a_checkpoint_kept_elsewhere_is_not_pruned(tmp_path: Path) -> None:
    make(tmp_path, 10, 20, 30)
    checkpoint_dir(tmp_path, 10).rename(tmp_path / "kept")
    checkpoint_dir(tmp_path, 10).symlink_to(tmp_path / "kept")
    assert prune(tmp_path, keep_last=1, keep_every=None) == [20]
    assert committed_steps(tmp_path) == [10, 30]


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
