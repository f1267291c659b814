"""Faults of the machine: numbers that are not finite, a full disk, damaged checkpoints, signals to a real process."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from apps.train import loop, save, snapshot
from libs.flags.runlog import read_events

Train = Callable[..., int]
ROOT = Path(__file__).resolve().parents[3]


def of(run_dir: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run_dir) if event["event"] == name]


def poison(
    monkeypatch: pytest.MonkeyPatch, *, calls: set[int], value: float, parameter: str = "final_norm.weight"
) -> None:
    """In the given steps, put `value` into the gradient of one parameter, as a broken kernel would."""
    original = loop.train_step
    count = {"n": 0}

    def wrapped(model: Any, *args: Any, **kwargs: Any) -> Any:
        count["n"] += 1
        if count["n"] in calls:
            handle = dict(model.named_parameters())[parameter].register_hook(lambda grad: grad * value)
            try:
                return original(model, *args, **kwargs)
            finally:
                handle.remove()
        return original(model, *args, **kwargs)

    monkeypatch.setattr(loop, "train_step", wrapped)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nonfinite_gradient_stops_before_the_optimizer_step(
    train: Train,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    value: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    poison(monkeypatch, calls={3}, value=value)
    weights: list[torch.Tensor] = []
    original = loop.write_bundle

    def keep_weights(*args: Any, **kwargs: Any) -> Any:
        weights.extend(p.detach().clone() for p in kwargs["model"].parameters())
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "write_bundle", keep_weights)
    assert train("--recipe", recipe, "--run-dir", run, "--checkpoint.every", "2") == 70
    (anomaly,) = of(run, "anomaly.nonfinite")
    assert (anomaly["what"], anomaly["action"], anomaly["step"]) == ("gradient", "stop", 3)
    assert list(read_events(run))[-1]["exit_code"] == 70
    assert "step 3: gradient is" in capsys.readouterr().err
    saved = load_file(run / "checkpoints" / "step-00000002" / "model.safetensors")
    assert save.committed_steps(run) == [2]
    assert len(weights) == len(saved)
    assert all(torch.equal(w, saved[n]) for n, w in zip(_parameter_names(), weights, strict=True))
    bundle = run / "anomalies" / "step-00000003"
    report = json.loads((bundle / "report.json").read_text())
    assert report["nonfinite_gradients"] == ["final_norm.weight"]
    assert report["nonfinite_parameters"] == []
    assert report["grad_norms"]["final_norm.weight"] in ("nan", "inf")
    assert all(isinstance(norm, float) for name, norm in report["grad_norms"].items() if name != "final_norm.weight")
    assert len(report["window_ids"][0]) == 2
    assert report["cursor_before"]["index"] == 4
    assert report["config"]["train"]["steps"] == 8
    batch = load_file(bundle / "batch.safetensors")
    assert batch["0/tokens"].shape == (1, 128)
    assert set(json.loads((bundle / "rng.json").read_text())) >= {"cpu"}


def _parameter_names() -> list[str]:
    from libs.model import HybridLM, preset

    return [name for name, _ in HybridLM(preset("cpu_tiny")).named_parameters()]


def test_a_nonfinite_loss_stops(train: Train, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train("--recipe", recipe, "--run-dir", run, "--optim.lr", "1e38", "--optim.clip_norm", "none") == 70
    assert of(run, "anomaly.nonfinite")[0]["what"] in ("loss", "gradient", "validation bpb")


def test_skipping_is_counted_logged_and_bounded(
    train: Train, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, calls={2, 5, 6}, value=float("nan"))
    words = ["--recipe", recipe, "--train.nonfinite", "skip"]
    run = tmp_path / "run"
    assert train(*words, "--run-dir", run, "--train.nonfinite_budget", "2") == 70
    actions = [(event["step"], event["action"]) for event in of(run, "anomaly.nonfinite")]
    assert actions == [(2, "skipped, 1 of 2"), (5, "skipped, 2 of 2"), (6, "stop")]
    assert [event["step"] for event in of(run, "train.step")] == [1, 3, 4]
    assert [event["tokens_total"] for event in of(run, "train.step")] == [128, 384, 512]


def test_the_budget_is_part_of_the_checkpoint(
    train: Train, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    words = ["--recipe", recipe, "--train.nonfinite", "skip", "--train.nonfinite_budget", "1"]
    with monkeypatch.context() as patch:
        poison(patch, calls={2}, value=float("nan"))
        assert train(*words, "--run-dir", run, "--train.stop_after", "3") == 75
    poison(monkeypatch, calls={2}, value=float("nan"))
    assert train("--resume", run) == 70
    assert [event["action"] for event in of(run, "anomaly.nonfinite")] == ["skipped, 1 of 1", "stop"]


def _full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _full_disk_in_rust(*_: object, **__: object) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("module", "name", "fault"),
    [(snapshot, "save_model", _full_disk), (snapshot, "save_file", _full_disk_in_rust), (save, "commit", _full_disk)],
)
def test_a_full_disk_leaves_older_checkpoints_and_nothing_else(
    train: Train,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    module: Any,
    name: str,
    fault: Callable[..., None],
) -> None:
    run = tmp_path / "run"
    assert train("--recipe", recipe, "--run-dir", run, "--train.stop_after", "3") == 75
    monkeypatch.setattr(module, name, fault)
    assert train("--resume", run) == 2
    assert "disk is full" in capsys.readouterr().err
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000003"]
    (abort,) = of(run, "checkpoint.abort")
    assert "disk is full" in abort["reason"]
    assert list(read_events(run))[-1]["exit_code"] == 2
    monkeypatch.undo()
    assert train("--resume", run) == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs the right to mount a small file system")
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"cannot mount: {made.stderr.decode()}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_really_full_disk(train: Train, recipe: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = small_disk / "run"
    words = ["--checkpoint.every", "1", "--checkpoint.keep_last", "9"]
    assert train("--recipe", recipe, "--run-dir", run, *words) == 2
    assert "disk is full" in capsys.readouterr().err
    steps = save.committed_steps(run)
    assert steps
    assert {path.name for path in (run / "checkpoints").iterdir()} == {f"step-{step:08d}" for step in steps}
    for step in steps:
        save.verify_checkpoint(save.checkpoint_dir(run, step))


def test_a_corrupt_checkpoint_is_never_loaded_and_never_replaced(
    train: Train, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ["--checkpoint.every", "2", "--train.stop_after", "5"]
    assert train("--recipe", recipe, "--run-dir", run, *words) == 75
    target = run / "checkpoints" / "step-00000005" / "optimizer.safetensors"
    content = bytearray(target.read_bytes())
    content[-5] ^= 1
    target.write_bytes(content)
    assert train("--resume", run) == 2
    said = capsys.readouterr().err
    assert "optimizer.safetensors" in said
    assert "--from-step: [4]" in said
    assert not of(run, "checkpoint.restore")
    assert train("--resume", run, "--from-step", "4", "--train.stop_after", "none") == 0
    assert [event["step"] for event in of(run, "checkpoint.restore")] == [4]


def test_a_half_written_checkpoint_is_removed_and_the_committed_one_used(
    train: Train, recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert train("--recipe", recipe, "--run-dir", run, "--train.stop_after", "3") == 75
    folder = run / "checkpoints"
    shutil.copytree(folder / "step-00000003", folder / "step-00000006")
    (folder / "step-00000006" / "COMMITTED").unlink()
    shutil.copytree(folder / "step-00000003", folder / ".step-00000007.partial")
    assert train("--resume", run) == 0
    assert [event["step"] for event in of(run, "checkpoint.restore")] == [3]
    assert len(of(run, "checkpoint.abort")) == 2
    assert {path.name for path in folder.iterdir()} == {"step-00000003", "step-00000008"}


def test_checkpoints_that_vanished_are_not_a_fresh_start(train: Train, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train("--recipe", recipe, "--run-dir", run, "--train.stop_after", "3") == 75
    shutil.rmtree(run / "checkpoints")
    assert train("--resume", run) == 2


def _start(recipe: Path, run: Path, *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "apps.train", "--recipe", str(recipe), "--run-dir", str(run), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def _wait_for(run: Path, name: str, *, step: int, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    log = run / "logs" / "rank00000.jsonl"
    while time.monotonic() < deadline:
        if log.is_file() and any(e["event"] == name and (e["step"] or 0) >= step for e in read_events(run)):
            return
        time.sleep(0.01)
    raise AssertionError(f"{name} of step {step} did not come")


def test_a_real_process_saves_and_asks_to_be_requeued(train: Train, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = _start(recipe, run, "--train.steps", "100000", "--checkpoint.every", "100000")
    try:
        _wait_for(run, "train.step", step=5)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=60)[0].decode()
    finally:
        process.kill()
    assert process.returncode == 75, output
    assert f"fathom train --resume {run}" in output
    (step,) = save.committed_steps(run)
    assert of(run, "train.step")[-1]["step"] == step
    assert train("--resume", run, "--train.stop_after", str(step + 1)) == 75


def test_a_second_signal_ends_at_once_and_corrupts_nothing(train: Train, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = _start(recipe, run, "--train.steps", "100000", "--checkpoint.every", "1")
    try:
        _wait_for(run, "checkpoint.commit", step=3)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode in (75, 128 + signal.SIGTERM, 128 + signal.SIGINT)
    newest = save.committed_steps(run)[-1]
    assert train("--resume", run, "--train.stop_after", str(newest + 1)) == 75


def test_killed_without_warning_resumes_from_the_last_checkpoint(train: Train, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = _start(recipe, run, "--train.steps", "100000", "--checkpoint.every", "2")
    try:
        _wait_for(run, "checkpoint.commit", step=4)
    finally:
        process.kill()
        process.communicate(timeout=60)
    newest = save.committed_steps(run)[-1]
    assert train("--resume", run, "--train.stop_after", str(newest + 1)) == 75
    assert [event["step"] for event in of(run, "checkpoint.restore")] == [newest]
