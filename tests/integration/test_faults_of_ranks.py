"""One rank of two differs, dies, hangs, breaks or is told to stop: what the job does, says and leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apps.train.save import committed_steps
from libs.flags.logcheck import check_log
from libs.flags.runlog import read_events
from tests.support import job_faults
from tests.support.job import Ended

RunJob = Callable[..., Ended]


def of(run_dir: Path, name: str, rank: int = 0) -> list[dict[str, Any]]:
    return [event for event in read_events(run_dir, rank=rank) if event["event"] == name]


def stop(run_dir: Path, rank: int = 0) -> dict[str, Any]:
    last = list(read_events(run_dir, rank=rank))[-1]
    assert last["event"] == "run.stop"
    return last


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"variables": {1: {"FATHOM_AUTO_PLAN": "x"}}}, "rank 1 differs in set-up: 'GateRefused: FATHOM_AUTO_PLAN=x"),
        (
            {"variables": {1: {"FATHOM_PREFIX_CACHE": "memory_only"}}},
            "rank 1 differs in gate prefix_cache: \"'memory_only'\", but rank 0 has \"'off'\"",
        ),
        ({"words_of": {1: ["--optim.lr", "3e-4"]}}, "rank 1 differs in config optim.lr: '0.0003', but rank 0 has"),
        ({"words_of": {1: ["--parallel.tp", "2"]}}, "rank 1 differs in config parallel.tp: '2', but rank 0 has '1'"),
        ({"prepare": job_faults.has_other_code}, "rank 1 differs in code: 'edited'"),
        ({"prepare": job_faults.has_no_data}, "rank 1 differs in set-up: \"UserError: data.dir = 'not_here'"),
    ],
    ids=["refused gate", "gate", "config", "layout", "code", "data"],
)
def test_a_rank_that_differs(run_job: RunJob, recipe: Path, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    run = tmp_path / "run"
    ended = run_job("--recipe", recipe, "--run-dir", run, **options)
    assert ended.statuses == [78, 78], ended.said
    assert all(said in text for text in ended.said), ended.said
    assert ended.seconds < 60
    assert not run.exists()


def test_a_signal_to_one_rank_saves_once_and_stops_all(run_job: RunJob, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = run_job("--recipe", recipe, "--run-dir", run, prepare=job_faults.gets_sigterm)
    assert ended.statuses == [75, 75], ended.said
    assert committed_steps(run) == [3]
    assert [len(of(run, "signal.received", rank)) for rank in (0, 1)] == [0, 1]
    for rank in (0, 1):
        assert "SIGTERM on rank 1 during step; saved at step 3" in stop(run, rank)["reason"]
        assert check_log(run, rank=rank).violations == ()
    assert run_job("--resume", run).statuses == [0, 0]
    assert committed_steps(run)[-1] == 8


@pytest.mark.parametrize(
    ("fault", "phase", "step"),
    [
        (job_faults.gets_sigterm_in_start_up, "startup", 0),
        (job_faults.gets_sigterm_in_validation, "evaluation", 4),
        (job_faults.gets_sigterm_while_saving, "checkpoint", 3),
    ],
)
@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_signal_anywhere(
    run_job: RunJob,
    recipe: Path,
    tmp_path: Path,
    fault: Callable[[int], None],
    phase: str,
    step: int,
    asynchronous: str,
) -> None:
    run = tmp_path / "run"
    words = ("--checkpoint.every", "3", "--checkpoint.asynchronous", asynchronous)
    ended = run_job("--recipe", recipe, "--run-dir", run, *words, prepare=fault)
    assert ended.statuses == [75, 75], ended.said
    assert f"SIGTERM on rank 1 during {phase}; saved at step {step}" in stop(run)["reason"]
    assert committed_steps(run)[-1] == step
    for rank in (0, 1):
        assert check_log(run, rank=rank).violations == ()
        # A validation under way is given up by all, not waited for.
        evaluated = [event["step"] for event in of(run, "eval.result", rank)]
        assert evaluated == ([0] if step > 0 else [])


def test_a_nan_names_its_rank(run_job: RunJob, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = run_job("--recipe", recipe, "--run-dir", run, prepare=job_faults.has_a_nan)
    assert ended.statuses == [70, 70], ended.said
    assert all("step 3: gradient on rank 1 is nan" in text for text in ended.said)
    assert of(run, "anomaly.nonfinite")[0]["what"] == "gradient on rank 1"
    assert sorted(path.name for path in (run / "anomalies").iterdir()) == ["step-00000003", "step-00000003-rank-1"]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (job_faults.dies, "rank 1 does not answer: it died or hangs"),
        (job_faults.hangs, "rank 1 does not answer: it died or hangs"),
        (job_faults.has_a_bug, "rank 1 stopped: KeyError: 'a bug of ours'"),
    ],
    ids=["dies", "hangs", "bug"],
)
def test_a_rank_that_is_lost_stops_the_others(
    run_job: RunJob, recipe: Path, tmp_path: Path, fault: Callable[[int], None], reason: str
) -> None:
    run = tmp_path / "run"
    words = ("--recipe", recipe, "--run-dir", run, "--parallel.timeout_s", "3", "--checkpoint.every", "2")
    ended = run_job(*words, prepare=fault, seconds=60, patience=1)
    assert ended.statuses[0] == 1, ended.said
    assert reason in ended.said[0]
    assert reason in stop(run)["reason"]
    assert reason in of(run, "anomaly.generic")[0]["details"]["reason"]
    assert committed_steps(run) == [2]


def test_a_run_without_a_name_on_several_machines(run_job: RunJob, recipe: Path, tmp_path: Path) -> None:
    """Each machine would look for the run of the first attempt on its own: said before the first one begins."""
    agents = {"LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_MAX_RESTARTS": "2"}
    words = ("--recipe", recipe, "--log.runs_dir", tmp_path / "runs")
    ended = run_job(*words, variables={0: agents, 1: agents})
    assert ended.statuses == [2, 2], ended.said
    assert all("may restart this job 2 times on several machines" in text for text in ended.said)
    assert not (tmp_path / "runs").exists()
    never = agents | {"TORCHELASTIC_MAX_RESTARTS": "0"}
    assert run_job(*words, "--train.stop_after", "1", variables={0: never, 1: never}).statuses == [75, 75]
    named = ("--recipe", recipe, "--run-dir", tmp_path / "run", "--train.stop_after", "1")
    assert run_job(*named, variables={0: agents, 1: agents}).statuses == [75, 75]


def test_a_restart_by_torchrun_goes_on(run_job: RunJob, recipe: Path, tmp_path: Path) -> None:
    """The same command line again, without --run-dir: torchrun's name for the job leads to the run."""
    words = ("--recipe", recipe, "--log.runs_dir", tmp_path / "runs", "--checkpoint.every", "2")
    first = run_job(*words, "--parallel.timeout_s", "3", prepare=job_faults.dies)
    assert first.statuses[0] == 1, first.said
    second = run_job(*words, "--parallel.timeout_s", "3", restarts=1)
    assert second.statuses == [0, 0], second.said
    (run,) = [path for path in (tmp_path / "runs").iterdir() if not path.is_symlink()]
    assert [event["attempt"] for event in of(run, "run.start")] == [0, 1]
    assert [event["step"] for event in of(run, "checkpoint.restore")] == [2]
    steps = [event["step"] for event in of(run, "train.step")]
    assert steps[-6:] == [3, 4, 5, 6, 7, 8]
