"""Ahead of time: a small step is compiled by libtpu for v6e-4, and what does not fit or does not exist is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from libs.parallel.xla import pins

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--recipe", "cpu_demo", "--model.preset", "cpu_tiny", "--model.pattern", "M-*", "--data.window", "64",
    "--data.windows_per_batch", "4", "--train.precision", "bf16", "--aot-quick",
)  # fmt: skip


def aot(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {n: v for n, v in os.environ.items() if n not in ("PJRT_DEVICE", "CPU_NUM_DEVICES")}
    return subprocess.run(
        [sys.executable, "-m", "apps.cli", "train", *SMALL, *words], cwd=folder, capture_output=True, text=True,
        env=environment | {"PYTHONPATH": str(ROOT)}, timeout=280,
    )  # fmt: skip


def test_a_step_is_compiled_for_four_chips(tmp_path: Path) -> None:
    done = aot(tmp_path, "--aot", "v6e-4", "--xla.fsdp", "4")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "MODELLED time of a step" in done.stdout
    (path,) = (tmp_path / "runs" / "aot").glob("*.json")
    record = json.loads(path.read_text())
    compiled = record["compiled"]
    # What is updated in place shares its memory: parameters, moments and step counts of one chip.
    held = record["argument_bytes_per_chip"]
    assert compiled["shared"] >= 0.9 * (held["parameters"] + held["optimizer"])
    # Two fp32 moments for each fp32 parameter, and a step count.
    assert held["optimizer"] == pytest.approx(2 * held["parameters"], rel=0.02)
    assert record["peak_bytes_per_chip"] < record["usable_bytes_per_chip"]
    assert compiled["modelled"]["cycles"] > 0
    assert compiled["modelled"]["unknown"] == []


def test_what_cannot_be_is_refused_with_the_way_out(tmp_path: Path) -> None:
    unknown = aot(tmp_path, "--aot", "v9x-4")
    assert unknown.returncode == 2
    assert "v6e-4" in unknown.stderr
    other = aot(tmp_path, "--aot", "v6e-8", "--xla.fsdp", "4")
    assert other.returncode == 2
    assert "8 chips" in other.stderr
    assert set(pins.AHEAD_OF_TIME) <= set(pins.PINS)
