"""The Pallas kernels ahead of time: each row of the tile table compiles for v6e, and a step on four chips has them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from apps.train.__main__ import main
from libs.flags.errors import ExitStatus, run_entry
from libs.kernels.attention.pallas.tiles import LONGEST, TABLE, Row
from tests.support import compile_operator
from tests.support.own_process import ROOT, XLA, fathom

# A block too large has kept libtpu busy for minutes, so every compilation has an end.
LIMIT = 240
QUICK = (64, "bfloat16")


def words_of(row: Row) -> list[str]:
    return [str(row.head_dim), row.dtype, "pallas"]


def compiled_apart(S: int, row: Row) -> dict[str, Any]:
    environment = {n: v for n, v in os.environ.items() if n not in XLA}
    command = [sys.executable, "-m", "tests.support.compile_operator", "attention", str(S), *words_of(row)]
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
    # In this process where it is known to be quick.
    quick = row[:2] == QUICK
    found = compile_operator.compiled("attention", S, words_of(row)) if quick else compiled_apart(S, row)
    assert found["calls"] == 3
    # A score for every pair would be 12 S^2 numbers. Linear in S: a few copies in another layout, with head widths
    # rounded up to 128, and sums in fp32.
    assert found["temporaries"] <= 8 * 12 * S * max(row.head_dim, 128) * 4


def a_step(window: int) -> list[str]:
    """Of two layers of attention on four chips."""
    return [
        "--recipe", "cpu_demo", "--model.preset", "cpu_tiny", "--model.pattern", "*-*", "--model.attention.head_dim",
        "64", "--data.window", str(window), "--data.valid_document_tokens", "512", "--data.windows_per_batch", "4",
        "--train.precision", "bf16", "--train.activation_checkpointing", "block", "--xla.fsdp", "4", "--aot", "v6e-4",
        "--aot-quick",
    ]  # fmt: skip


def test_a_step_on_four_chips_holds_the_kernels(tmp_path: Path) -> None:
    status, out, err = fathom(tmp_path, "train", *a_step(512), timeout=LIMIT, FATHOM_PALLAS_ATTENTION="on")
    assert status == 0, err[-3000:]
    # Each of two layers: forward, forward again, and two backward.
    assert "not in it: 8 kernel calls" in out
    record = json.loads((tmp_path / "runs" / "aot" / "cpu_demo_v6e-4_quick_pallas_attention.json").read_text())
    assert record["gates"] == {"pallas_attention": True}


def test_a_window_outside_the_table_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FATHOM_PALLAS_ATTENTION", "on")
    assert run_entry(main, a_step(500)) == ExitStatus.GATE_REFUSED
    assert "the nearest is S=512" in capsys.readouterr().err
