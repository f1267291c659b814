"""Whole runs of `fathom train` with Megatron's engine, on gloo through the facade, against the torch engine's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from libs.flags.logcheck import check_log
from libs.flags.runlog import read_events
from libs.model.checkpoint import resolve_checkpoint
from libs.model.shard_files import read_layout
from tests.integration.test_layouts import WORDS, assert_same_training, history
from tests.support.job import Ended

if torch.cuda.is_available():
    pytest.skip("the facade is for machines without CUDA", allow_module_level=True)

from tests.support import megatron_job

RunJob = Callable[..., Ended]
MEGATRON = ("--parallel.engine", "megatron")
TORCH = ("--parallel.engine", "torch")
ON_CPU = {"prepare": megatron_job.on_cpu}


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps by the torch engine in one process."""
    from tests.support.job import start_job

    folder = tmp_path_factory.mktemp("whole")
    ended = start_job([*WORDS, "--recipe", recipe, "--run-dir", folder / "run"], 1, folder / "output").wait()
    assert ended.statuses == [0], ended.said
    return folder / "run"


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of the last checkpoint of a run that had tp = 1."""
    path = resolve_checkpoint(run)
    layout = read_layout(path)
    return {
        key: tensor for name in (*layout.weights, *layout.optimizer) for key, tensor in load_file(path / name).items()
    }


def apart(left: Path, right: Path) -> float:
    one, other = tensors(left), tensors(right)
    assert one.keys() == other.keys()
    assert any(key.startswith("exp_avg/") for key in one)
    return max(float((one[key] - other[key]).abs().max()) for key in one)


def test_one_process_is_the_torch_engine(run_job: RunJob, recipe: Path, tmp_path: Path, whole: Path) -> None:
    """A group of one process; the same files as any run of one process writes."""
    run = tmp_path / "run"
    ended = run_job("--recipe", recipe, "--run-dir", run, *WORDS, *MEGATRON, ranks=1, **ON_CPU)
    assert ended.statuses == [0], ended.said
    assert_same_training(whole, run)
    assert apart(whole, run) < 1e-5
    assert {p.name for p in resolve_checkpoint(run).iterdir()} == {p.name for p in resolve_checkpoint(whole).iterdir()}
    chosen = [e for e in read_events(run) if e["event"] == "backend.chosen" and e["op"] == "parallel.engine"]
    assert [(e["value"], "megatron-core 0.16.1" in e["reason"]) for e in chosen] == [("megatron", True)]
    assert check_log(run).violations == ()


def test_from_megatron_to_torch_and_back(run_job: RunJob, recipe: Path, tmp_path: Path, whole: Path) -> None:
    """Other engines and layouts in the middle of a run: dp 2, then tp 2 by torch, then tp 2 by Megatron, then one."""
    run = tmp_path / "run"
    first = run_job("--recipe", recipe, "--run-dir", run, *WORDS, *MEGATRON, "--train.stop_after", "2", **ON_CPU)
    assert first.statuses == [75, 75], first.said
    names = read_layout(resolve_checkpoint(run)).optimizer
    assert names == tuple(f"optimizer-tp000of001-part00{part}of002.safetensors" for part in (0, 1))
    tp2 = ("--parallel.tp", "2")
    second = run_job("--resume", run, *TORCH, *tp2, "--train.stop_after", "4")
    assert second.statuses == [75, 75], second.said
    third = run_job(
        *("--resume", run, *MEGATRON, *tp2, "--parallel.sequence_parallel", "true", "--train.stop_after", "6"),
        *("--checkpoint.asynchronous", "true", "--checkpoint.every", "5"),
        **ON_CPU,
    )
    assert third.statuses == [75, 75], third.said
    assert run_job("--resume", run, *TORCH, ranks=1).statuses == [0]
    assert_same_training(whole, run)
    assert apart(whole, run) < 1e-4


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_same_layout_resumes_bit_for_bit(run_job: RunJob, recipe: Path, tmp_path: Path, ranks: int) -> None:
    words = ("--recipe", recipe, *WORDS, *MEGATRON)
    # Two are told by a signal to one of them.
    stop = {"prepare": megatron_job.gets_sigterm} if ranks == 2 else ON_CPU
    after = () if ranks == 2 else ("--train.stop_after", "3")
    assert run_job(*words, "--run-dir", tmp_path / "a", ranks=ranks, **ON_CPU).statuses == [0] * ranks
    assert run_job(*words, "--run-dir", tmp_path / "b", *after, ranks=ranks, **stop).statuses == [75] * ranks
    assert run_job("--resume", tmp_path / "b", ranks=ranks, **ON_CPU).statuses == [0] * ranks
    one, other = history(tmp_path / "a"), history(tmp_path / "b")
    assert [(e["loss"], e["grad_norm"]) for e in one.values()] == [(e["loss"], e["grad_norm"]) for e in other.values()]
    found, again = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert found.keys() == again.keys()
    assert [key for key in found if not torch.equal(found[key], again[key])] == []


def test_a_nan_names_its_rank(run_job: RunJob, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = run_job("--recipe", recipe, "--run-dir", run, *MEGATRON, prepare=megatron_job.has_a_nan)
    assert ended.statuses == [70, 70], ended.said
    assert all("step 3: gradient on rank 1 is nan" in text for text in ended.said)


def test_a_rank_that_dies_stops_the_other(run_job: RunJob, recipe: Path, tmp_path: Path) -> None:
    """In the middle of exchanges that nobody waits for yet."""
    run = tmp_path / "run"
    words = ("--recipe", recipe, "--run-dir", run, *MEGATRON, "--parallel.timeout_s", "3", "--checkpoint.every", "2")
    ended = run_job(*words, prepare=megatron_job.dies, seconds=60, patience=1)
    assert ended.statuses[0] == 1, ended.said
    assert "rank 1 does not answer: it died or hangs" in ended.said[0]
    assert run_job("--resume", run, **ON_CPU).statuses == [0, 0]


def test_a_checkpoint_before_the_first_step(run_job: RunJob, recipe: Path, tmp_path: Path, whole: Path) -> None:
    """There is no optimizer state yet, in either engine."""
    run = tmp_path / "run"
    words = ("--recipe", recipe, "--run-dir", run, *WORDS, *MEGATRON)
    assert run_job(*words, prepare=megatron_job.gets_sigterm_in_start_up).statuses == [75, 75]
    assert resolve_checkpoint(run).name == "step-00000000"
    assert run_job("--resume", run, *TORCH, "--train.stop_after", "1", ranks=1).statuses == [75]
    assert run_job("--resume", run, *MEGATRON, **ON_CPU).statuses == [0, 0]
    assert_same_training(whole, run)


def test_a_skipped_step(run_job: RunJob, recipe: Path, tmp_path: Path) -> None:
    """The exchange that the spoilt step began is brought to its end, and the run goes on."""
    run = tmp_path / "run"
    skip = ("--train.nonfinite", "skip", "--train.nonfinite_budget", "1")
    ended = run_job("--recipe", recipe, "--run-dir", run, *MEGATRON, *skip, prepare=megatron_job.has_a_nan_once)
    assert ended.statuses == [0, 0], ended.said
    assert [e["step"] for e in read_events(run) if e["event"] == "train.step"] == [1, 2, 4, 5, 6, 7, 8]
    bad: list[dict[str, Any]] = [e for e in read_events(run) if e["event"] == "anomaly.nonfinite"]
    assert [(e["what"], e["action"]) for e in bad] == [("gradient on rank 1", "skipped, 1 of 1")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        ("--parallel.tp", "2"),
        ("--parallel.cp", "2"),
        ("--parallel.tp", "1", "--data.windows_per_batch", "4"),
    ],
    ids=["dp2-tp2", "dp2-cp2", "dp4"],
)
def test_four_ranks(run_job: RunJob, recipe: Path, tmp_path: Path, layout: tuple[str, ...]) -> None:
    both = {"megatron": ON_CPU, "torch": {}}
    for engine, options in both.items():
        words = ("--recipe", recipe, "--run-dir", tmp_path / engine, *WORDS, *layout, "--parallel.engine", engine)
        ended = run_job(*words, ranks=4, **options)
        assert ended.statuses == [0] * 4, ended.said
    assert_same_training(tmp_path / "torch", tmp_path / "megatron")
