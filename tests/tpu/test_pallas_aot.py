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
from tests.tpu.test_aot import aot

ROOT = Path(__file__).resolve().parents[2]
# A block too large has kept libtpu busy for minutes, so every compilation has an end.
LIMIT = 240
QUICK = (64, "bfloat16")


def compiled(S: int, row: Row) -> dict[str, Any]:
    environment = {n: v for n, v in os.environ.items() if n not in ("PJRT_DEVICE", "CPU_NUM_DEVICES")}
    command = [sys.executable, "-m", "tests.support.pallas_compile", str(S), str(row.head_dim), row.dtype]
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
    # A score for every pair would be 8 S^2 numbers, which a chip does not hold at the longest. Linear in S: a few
    # copies in another layout, with head widths rounded up to 128, and sums in fp32.
    assert found["temporaries"] <= 24 * 8 * S * max(row.head_dim, 128) * 4


def test_a_step_on_four_chips_holds_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FATHOM_PALLAS_ATTENTION", "on")
    words = (
        "--model.pattern", "*-*", "--model.attention.head_dim", "64", "--data.window", "512",
        "--data.valid_document_tokens", "512", "--train.activation_checkpointing", "block",
    )  # fmt: skip
    done = aot(tmp_path, "--aot", "v6e-4", "--xla.fsdp", "4", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    # Each of two layers: forward, forward again, and two backward.
    assert "not in it: 8 kernel calls" in done.stdout
    refused = aot(tmp_path, "--aot", "v6e-4", "--xla.fsdp", "4", *words[:4], "--data.window", "500")
    assert refused.returncode == 78
    assert "the nearest is S=512" in refused.stderr
