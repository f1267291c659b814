"""Who hears of a step: lines for a pipe, a live bar for a terminal, TensorBoard, W&B only if it is there."""

from __future__ import annotations

import io
import shlex
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from apps.train.hooks import LineSink, ProgressSink, StepReport, WandbSink
from apps.train.origins import command_line_layer, resolve_config

Train = Callable[..., int]
ROOT = Path(__file__).parents[3]
SCALARS = {"loss": 2.5, "bpb": 1.25, "tokens_per_s": 1234.0, "time_s": 2.0}


def test_lines_come_every_n_steps() -> None:
    stream = io.StringIO()
    sink = LineSink(steps=11, every=5, stream=stream)
    for step in range(1, 12):
        sink.on_step(StepReport(step, SCALARS))
    sink.on_eval(11, {"bpb": 1.5})
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/11", "5/11", "10/11", "11/11", "11/11"]
    assert "loss 2.5000  bpb 1.250  1,234 tok/s  left about 12 s" in lines[1]
    assert "validation bpb 1.5000" in lines[-1]


def test_training_goes_on_when_nobody_reads(recipe: Path, tmp_path: Path) -> None:
    """The lines are lost and nothing else: neither steps nor the exit status."""
    run = tmp_path / "run"
    words = [sys.executable, "-m", "apps.train", "--recipe", str(recipe), "--run-dir", str(run)]
    script = f"set -o pipefail; {shlex.join(words)} | head -n 1"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (run / "checkpoints" / "step-00000008" / "COMMITTED").exists()


def test_bar_shows_loss_bpb_speed_and_time_left() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80)
    sink = ProgressSink(steps=10_000, first_step=2, console=console)
    sink.on_eval(2, {"bpb": 7.0})
    for step in (3, 4, 5):
        sink.on_step(StepReport(step, SCALARS))
    sink.on_note("a [note] as it is")
    sink.close()
    said = stream.getvalue()
    for part in ("loss 2.500", "bpb 1.250", "1,234 tok/s", "   5/10000", "left", "(valid 7.000)", "a [note] as it is"):
        assert part in said
    assert "…" not in said


def test_tensorboard_has_the_numbers_of_both_attempts(train: Train, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["--log.tensorboard", "true"]
    assert train("--recipe", recipe, "--run-dir", run, "--train.stop_after", "3", *words) == 75
    assert train("--resume", run) == 0
    steps: dict[int, float] = {}
    for path in sorted((run / "tensorboard").iterdir()):
        found = EventAccumulator(str(path))
        found.Reload()
        steps |= {event.step: event.value for event in found.Scalars("train/loss")}
    assert sorted(steps) == list(range(1, 9))
    assert steps[8] < steps[1]


def test_wandb_gets_the_same_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[str, Any]] = []

    class FakeRun:
        def log(self, values: dict[str, float], step: int) -> None:
            calls.append(("log", (step, values)))

        def finish(self) -> None:
            calls.append(("finish", None))

    fake = types.ModuleType("wandb")
    fake.init = lambda **options: (calls.append(("init", options["project"])), FakeRun())[1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = resolve_config([command_line_layer(["--model.preset", "cpu_tiny"])]).config
    sink = WandbSink(tmp_path, project="p", run_id="r", config=config)
    sink.on_step(StepReport(4, {"loss": 1.0}))
    sink.on_eval(4, {"bpb": 2.0})
    sink.close()
    assert calls == [
        ("init", "p"),
        ("log", (4, {"train/loss": 1.0})),
        ("log", (4, {"valid/bpb": 2.0})),
        ("finish", None),
    ]
