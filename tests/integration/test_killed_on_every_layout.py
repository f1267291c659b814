"""Forty steps, killed with SIGKILL at a random moment five times, each time resumed on another layout."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from libs.flags.logcheck import check_log
from libs.flags.runlog import log_path, read_events
from tests.support.job import Ended, Job

RunJob = Callable[..., Ended]
Start = Callable[..., Job]

STEPS = 40
LAYOUTS = ((4, 1), (2, 2), (1, 4), (1, 1), (2, 1))  # dp x tp


@pytest.fixture
def words(recipe: Path) -> tuple[str, ...]:
    return (
        *("--recipe", str(recipe), "--train.steps", str(STEPS), "--train.eval_every", "20"),
        *("--model.mixer.ngroups", "4", "--model.attention.kv_heads", "4", "--data.windows_per_batch", "4"),
        *("--checkpoint.every", "2", "--parallel.timeout_s", "20"),
    )


def kill_within(job: Job, run: Path, *, after_step: int, draw: random.Random) -> None:
    """SIGKILL every rank at some moment after `after_step` was logged."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and after_step not in steps_of(run):
        assert any(process.is_alive() for process in job.processes), "the job ended before it could be killed"
        time.sleep(0.05)
    time.sleep(draw.uniform(0, 0.7))
    for process in job.processes:
        process.kill()
    job.wait(30)


def steps_of(run: Path) -> list[int]:
    if not log_path(run).is_file():
        return []
    return [event["step"] for event in read_events(run) if event["event"] == "train.step"]


def attempts(run: Path) -> list[list[dict[str, Any]]]:
    events = list(read_events(run))
    return [[e for e in events if e["attempt"] == number] for number in range(events[-1]["attempt"] + 1)]


@pytest.mark.slow
def test_killed_five_times(run_job: RunJob, start: Start, words: tuple[str, ...], tmp_path: Path) -> None:
    whole, run, draw = tmp_path / "whole", tmp_path / "run", random.Random(7)
    assert run_job(*words, "--run-dir", whole, ranks=1).statuses == [0]
    job = start(*words, "--run-dir", run, "--parallel.tp", "2", ranks=4)
    kill_within(job, run, after_step=4, draw=draw)
    for number, (dp, tp) in enumerate(LAYOUTS):
        layout = ("--resume", run, "--parallel.dp", dp, "--parallel.tp", tp)
        if number == len(LAYOUTS) - 1:
            ended = run_job(*layout, ranks=dp * tp)
            assert ended.statuses == [0] * (dp * tp), ended.said
        else:
            kill_within(start(*layout, ranks=dp * tp), run, after_step=max(steps_of(run)) + 3, draw=draw)
    check_order(whole, run)
    assert [check_log(run, rank=rank).violations for rank in range(4)] == [()] * 4


@pytest.mark.slow
def test_killed_on_one_layout_ends_with_the_same_bits(
    run_job: RunJob, start: Start, words: tuple[str, ...], tmp_path: Path
) -> None:
    whole, run, draw = tmp_path / "whole", tmp_path / "run", random.Random(11)
    layout = ("--parallel.dp", "1", "--parallel.tp", "2", "--parallel.sequence_parallel", "true")
    assert run_job(*words, *layout, "--run-dir", whole).statuses == [0, 0]
    kill_within(start(*words, *layout, "--run-dir", run), run, after_step=4, draw=draw)
    for _ in range(2):
        kill_within(start("--resume", run), run, after_step=max(steps_of(run)) + 3, draw=draw)
    assert run_job("--resume", run).statuses == [0, 0]
    assert len(attempts(run)) == 4
    kept, unbroken = check_order(whole, run)
    for step, event in unbroken.items():
        assert (kept[step]["loss"], kept[step]["grad_norm"]) == (event["loss"], event["grad_norm"]), step
    last = f"checkpoints/step-{STEPS:08d}"
    names = sorted(path.name for path in (whole / last).glob("*.safetensors"))
    assert len(names) == 4, "weights and optimizer of each rank"
    for name in names:
        one, other = (load_file(path / last / name) for path in (whole, run))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name


def check_order(whole: Path, run: Path) -> tuple[dict[int, dict[str, Any]], dict[int, dict[str, Any]]]:
    """Each attempt goes on where its checkpoint ended; put together, no step and no window is missing or twice.

    The steps of `run` that its last checkpoint stands on, and those of `whole`.
    """
    kept: dict[int, dict[str, Any]] = {}
    for events in attempts(run):
        restored = [event["step"] for event in events if event["event"] == "checkpoint.restore"]
        steps = [event for event in events if event["event"] == "train.step"]
        assert all(b["step"] == a["step"] + 1 for a, b in pairwise(steps))
        if restored and steps:
            assert steps[0]["step"] == restored[0] + 1
        if steps:
            kept = {step: event for step, event in kept.items() if step < steps[0]["step"]}
            kept |= {event["step"]: event for event in steps}
    unbroken = {event["step"]: event for event in read_events(whole) if event["event"] == "train.step"}
    assert list(kept) == list(unbroken) == list(range(1, STEPS + 1))
    for step, event in unbroken.items():
        assert kept[step]["cursor"] == event["cursor"]
        assert kept[step]["tokens_total"] == event["tokens_total"]
    assert kept[STEPS]["loss"] == pytest.approx(unbroken[STEPS]["loss"], rel=2e-3)
    last = [
        [e["metrics"]["bpb"] for e in read_events(path) if e["event"] == "eval.result"][-1] for path in (whole, run)
    ]
    assert last[0] == pytest.approx(last[1], rel=2e-3)
    return kept, unbroken
