"""The plan's memory against a real run's peak, each run in a process of its own (tests/support/peak_memory.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
MIB = 2**20
COMMON = (
    *("--recipe", "cpu_demo", "--train.steps", "2", "--schedule.warmup_steps", "1", "--schedule.decay_steps", "1"),
    *("--train.threads", "1", "--data.valid_tokens", "500", "--data.valid_document_tokens", "1024"),
    *("--log.tensorboard", "false"),
)
CONFIGS = {
    "cpu_demo": (),
    "longer": ("--data.window", "2048"),
    "checkpointing": ("--train.activation_checkpointing", "block", "--data.windows_per_batch", "6"),
    "mtp": ("--model.pattern", "M-*-/*-"),
    "accumulation": ("--train.grad_accumulation", "2", "--data.windows_per_batch", "1"),
}


def estimate(train: Callable[..., int], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> float:
    """Bytes, as `--dry-run` prints them."""
    assert train(*words, "--dry-run") == 0
    said = capsys.readouterr().out
    rows = said[said.index("memory of one training step") :].splitlines()
    size, unit = next(row for row in rows if row.startswith("│ total")).split("│")[2].split()
    assert unit == "MiB"
    return float(size.replace(",", "")) * MIB


def measured(kind: str, words: tuple[str, ...]) -> int:
    """Bytes; every large tensor has pages of its own, so that what is freed is not resident."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "PYTHONPATH": str(REPOSITORY),
    }
    command = [sys.executable, "-m", "tests.support.peak_memory", kind, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout.splitlines()[-1])[kind])


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_the_plan_is_within_a_tenth_of_the_peak(
    name: str, train: Callable[..., int], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (*COMMON, "--data.dir", str(corpus), *CONFIGS[name])
    planned = estimate(train, words, capsys)
    assert planned == pytest.approx(measured("resident", (*words, "--run-dir", str(tmp_path / "run"))), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu_demo", "checkpointing", "mtp"])
def test_the_plan_is_what_the_allocator_hands_out(
    name: str, train: Callable[..., int], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (*COMMON, "--data.dir", str(corpus), *CONFIGS[name])
    planned = estimate(train, words, capsys)
    assert planned == pytest.approx(measured("tensors", (*words, "--run-dir", str(tmp_path / "run"))), rel=0.03)
