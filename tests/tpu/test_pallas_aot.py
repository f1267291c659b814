"""The Pallas kernels ahead of time: each row of the tile table compiles for v6e, and a step on four chips has them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from libs.kernels.attention.pallas.tiles import LONGEST, TABLE, Row

ROOT = Path(__file__).resolve().parents[2]
# A block too large has kept libtpu busy for minutes, so every compilation has an end.
LIMIT = 240
QUICK = (64, "bfloat16")


def compiled(S: int, row: Row) -> dict[str, Any]:
    environment = {n: v for n, v in os.environ.items() if n not in ("PJRT_DEVICE", "CPU_NUM_DEVICES")}
    words = ["attention", str(S), str(row.head_dim), row.dtype, "pallas"]
    command = [sys.executable, "-m", "tests.support.compile_operator", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=LIMIT)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("row", "S"),
    [
        pytest.param(row, S, marks=() if row[:2] == QUICK else pytest.mark.slow)
        for row in TABLE
        for S in (16384, LONGEST)
    ],
    ids=str,
)
def test_forward_and_backward_compile_for_v6e(row: Row, S: int) -> None:
    found = compiled(S, row)
    assert found["calls"] == 3
    # A score for every pair would be 12 S^2 numbers. Linear in S: a few copies in another layout, with head widths
    # rounded up to 128, and sums in fp32.
    assert found["temporaries"] <= 8 * 12 * S * max(row.head_dim, 128) * 4


def a_step(folder: Path, window: int) -> subprocess.CompletedProcess[str]:
    """Of two layers of attention on four chips, with the gate."""
    words = (
        "--recipe", "cpu_demo", "--model.preset", "cpu_tiny", "--model.pattern", "*-*", "--model.attention.head_dim",
        "64", "--data.window", str(window), "--data.valid_document_tokens", "512", "--data.windows_per_batch", "4",
        "--train.precision", "bf16", "--train.activation_checkpointing", "block", "--xla.fsdp", "4", "--aot", "v6e-4",
        "--aot-quick",
    )  # fmt: skip
    environment = {n: v for n, v in os.environ.items() if n not in ("PJRT_DEVICE", "CPU_NUM_DEVICES")}
    return subprocess.run(
        [sys.executable, "-m", "apps.cli", "train", *words], cwd=folder, capture_output=True, text=True,
        env=environment | {"PYTHONPATH": str(ROOT), "FATHOM_PALLAS_ATTENTION": "on"}, timeout=LIMIT,
    )  # fmt: skip


def test_a_step_on_four_chips_holds_the_kernels(tmp_path: Path) -> None:
    done = a_step(tmp_path, 512)
    assert done.returncode == 0, done.stderr[-3000:]
    # Each of two layers: forward, forward again, and two backward.
    assert "not in it: 8 kernel calls" in done.stdout
    refused = a_step(tmp_path, 500)
    assert refused.returncode == 78
    assert "the nearest is S=512" in refused.stderr
