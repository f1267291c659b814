"""Whole runs of `fathom train` on several ranks against the same run in one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from libs.flags.logcheck import check_log
from libs.flags.runlog import read_events
from tests.support.job import Ended

RunJob = Callable[..., Ended]


def history(run_dir: Path, rank: int = 0) -> dict[int, dict[str, Any]]:
    return {event["step"]: event for event in read_events(run_dir, rank=rank) if event["event"] == "train.step"}


def bpb(run_dir: Path) -> list[float]:
    return [event["metrics"]["bpb"] for event in read_events(run_dir) if event["event"] == "eval.result"]


def assert_same_training(left: Path, right: Path, *, steps: range = range(1, 9)) -> None:
    """Losses and norms to fp32, order of data and all counts exactly."""
    one, other = history(left), history(right)
    assert list(one) == list(other) == list(steps)
    for step in steps:
        for key in ("tokens", "tokens_total", "cursor"):
            assert one[step][key] == other[step][key], (step, key)
        for key in ("loss", "main_loss", "mtp_loss", "bpb"):
            assert one[step][key] == pytest.approx(other[step][key], rel=3e-5), (step, key)
        assert one[step]["grad_norm"] == pytest.approx(other[step]["grad_norm"], rel=1e-3), step
    assert bpb(left) == pytest.approx(bpb(right), rel=3e-5)


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps in one process, two micro-batches each."""
    from tests.support.job import start_job

    folder = tmp_path_factory.mktemp("whole")
    ended = start_job([*WORDS, "--recipe", recipe, "--run-dir", folder / "run"], 1, folder / "output").wait()
    assert ended.statuses == [0], ended.said
    return folder / "run"


WORDS = ("--train.grad_accumulation", "2", "--train.eval_every", "4")


@pytest.mark.parametrize(
    "layout",
    [
        ("--parallel.tp", "1"),
        ("--parallel.shard_optimizer", "true"),
        ("--parallel.tp", "2", "--parallel.sequence_parallel", "true"),
        ("--parallel.cp", "2", "--train.activation_checkpointing", "block"),
    ],
    ids=["dp2", "dp2-zero", "tp2-sp", "cp2"],
)
def test_two_ranks_train_as_one(
    run_job: RunJob, recipe: Path, tmp_path: Path, whole: Path, layout: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    ended = run_job("--recipe", recipe, "--run-dir", run, *WORDS, *layout)
    assert ended.statuses == [0, 0], ended.said
    assert_same_training(whole, run)
    assert "completed: all 8 steps done" in ended.said[0]
    assert ended.said[1] == ""
    for rank in (0, 1):
        assert check_log(run, rank=rank).violations == ()
    mine, other = history(run), history(run, 1)
    for step in mine:
        assert {key: mine[step][key] for key in ("loss", "grad_norm", "tokens")} == {
            key: other[step][key] for key in ("loss", "grad_norm", "tokens")
        }


def test_four_ranks_then_another_layout_then_one(run_job: RunJob, recipe: Path, tmp_path: Path, whole: Path) -> None:
    run = tmp_path / "run"
    words = ("--recipe", recipe, "--run-dir", run, *WORDS)
    ended = run_job(*words, "--parallel.tp", "2", "--train.stop_after", "3", ranks=4)
    assert ended.statuses == [75] * 4, ended.said
    second = run_job(
        *("--resume", run, "--parallel.tp", "1", "--parallel.shard_optimizer", "true", "--train.stop_after", "6"),
        *("--checkpoint.asynchronous", "true", "--checkpoint.every", "2"),
    )
    assert second.statuses == [75, 75], second.said
    assert run_job("--resume", run, "--parallel.tp", "1", ranks=1).statuses == [0]
    assert_same_training(whole, run)
    assert [check_log(run, rank=rank).violations for rank in range(4)] == [()] * 4
    assert json.loads((run / "checkpoints" / "step-00000008" / "trainer.json").read_text())["step"] == 8


def test_the_same_layout_resumes_bit_for_bit(run_job: RunJob, recipe: Path, tmp_path: Path) -> None:
    words = ("--recipe", recipe, *WORDS, "--parallel.tp", "2", "--parallel.sequence_parallel", "true")
    assert run_job(*words, "--run-dir", tmp_path / "a").statuses == [0, 0]
    assert run_job(*words, "--run-dir", tmp_path / "b", "--train.stop_after", "3").statuses == [75, 75]
    assert run_job("--resume", tmp_path / "b").statuses == [0, 0]
    one, other = history(tmp_path / "a"), history(tmp_path / "b")
    for step, event in one.items():
        assert {key: event[key] for key in ("loss", "grad_norm")} == {
            key: other[step][key] for key in ("loss", "grad_norm")
        }
    names = sorted(path.name for path in (tmp_path / "a" / "checkpoints" / "step-00000008").glob("*.safetensors"))
    assert len(names) == 4
    for name in names:
        one_file, other_file = (load_file(tmp_path / run / "checkpoints" / "step-00000008" / name) for run in "ab")
        assert one_file.keys() == other_file.keys()
        assert all(torch.equal(one_file[key], other_file[key]) for key in one_file), name


def test_a_layout_that_does_not_fit(run_job: RunJob, recipe: Path, tmp_path: Path) -> None:
    cases = (
        (("--parallel.tp", "3"), "a multiple of 3 processes"),
        (("--parallel.dp", "2", "--parallel.tp", "2"), "dp*cp*tp = 2*1*2 = 4 processes, but there are 2"),
        (
            ("--parallel.dp", "2", "--data.windows_per_batch", "1"),
            "data.windows_per_batch = 1 cannot be shared by parallel.dp = 2",
        ),
        (("--parallel.tp", "2", "--model.mixer.ngroups", "1"), "ngroups=1"),
        (("--parallel.engine", "megatron"), "needs a CUDA device"),
    )
    for number, (words, said) in enumerate(cases):
        ended = run_job("--recipe", recipe, "--run-dir", tmp_path / str(number), *words)
        assert ended.statuses == [2, 2], ended.said
        assert all(said in text for text in ended.said), ended.said
