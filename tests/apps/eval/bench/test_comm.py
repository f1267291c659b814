"""`fathom bench comm`: one quick run on two processes, its receipt, the red gate, and the refusals."""

from __future__ import annotations

import argparse

import pytest
from rich.console import Console
from torch import Tensor

from apps.eval.bench import comm
from apps.eval.bench.__main__ import main
from apps.eval.bench.comm import CommReceipt
from apps.eval.bench.comm_command import (
    QUICK_SEQ_LENS,
    QUICK_SHAPE,
    QUICK_STEP,
    _layer_table,
    _plan,
    _step_table,
    add_comm_options,
)
from apps.eval.bench.comm_job import METHODS, Measured
from apps.eval.bench.comm_step import STEP_METHODS, StepPlan, _Taker, step_works
from apps.eval.bench.correctness import Outcome
from apps.eval.bench.table import print_receipt
from libs.flags.errors import run_entry
from libs.parallel.mesh import single


@pytest.fixture(scope="module")
def receipt(tmp_path_factory: pytest.TempPathFactory) -> CommReceipt:
    parent = tmp_path_factory.mktemp("receipts")
    options = ["--quick", "--n", "1", "--threads", "1", "--receipt-dir", str(parent), "--machine", "test"]
    assert main(["comm", *options]) == 0
    (path,) = parent.glob("*_comm_test/receipt.json")
    return CommReceipt.model_validate_json(path.read_text())


def test_every_way_is_checked_and_timed_at_every_length(receipt: CommReceipt) -> None:
    assert len(receipt.correctness) == 4 + 4
    assert all(check.passed for check in receipt.correctness)
    layer, step = set(METHODS) - set(STEP_METHODS), f"S{QUICK_STEP.seq_len}"
    expected = {f"{m}_S{s}" for m in layer for s in QUICK_SEQ_LENS} | {f"{m}_{step}" for m in STEP_METHODS}
    assert {s.name for s in receipt.contenders} == expected
    assert [aim.met for aim in receipt.aims] == [True, True]
    speed_ups = {f"step_one_process_over_{way}_{step}" for way in ("step_dp", "step_cp")}
    assert speed_ups < {ratio.name for ratio in receipt.ratios}


def test_the_table_has_a_row_for_every_length(receipt: CommReceipt, capsys: pytest.CaptureFixture[str]) -> None:
    """And no heading without rows."""
    console = Console(width=110)
    print_receipt(receipt, console, [_layer_table(receipt), _step_table(receipt)])
    said = capsys.readouterr().out
    rows = [line.split("│")[1].strip() for line in said.splitlines() if line.startswith("│")]
    assert [row for row in rows if row.isdigit()] == [str(seq_len) for seq_len in QUICK_SEQ_LENS]
    assert {"step_dp_S64", "step_cp_S64"} < set(rows)
    assert "memory" not in said
    assert f"{receipt.traffic[0].all_to_all_bytes / 1e6:.2f}" in said


def test_long_rows_are_not_scanned_by_one_process() -> None:
    parser = argparse.ArgumentParser()
    add_comm_options(parser)
    plan = _plan(parser.parse_args([]))
    assert plan.seq_lens == (8192, 16384, 32768, 65536)
    assert [left.name for left in comm._left_out(plan)] == ["one_process_S32768", "one_process_S65536"]
    assert comm._left_out(_plan(parser.parse_args(["--seq-len", "65536"]))) == []


def test_a_step_that_differs_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, plan, original = single(), StepPlan("cpu_tiny", 32), _Taker.gradients
    assert all(outcome.passed for outcome in step_works(plan, alone, alone, seed=0)[1])
    factors = iter((1.0, 1.0, 1.001))  # one process, dp, cp

    def wrong(self: _Taker) -> tuple[float, Tensor]:
        loss, norm = original(self)
        return loss * next(factors), norm

    monkeypatch.setattr(_Taker, "gradients", wrong)
    assert [outcome.passed for outcome in step_works(plan, alone, alone, seed=0)[1]] == [True, True, False, True]


def test_bytes_are_those_of_the_formula(receipt: CommReceipt) -> None:
    H, N, P, R, A = QUICK_SHAPE.H, QUICK_SHAPE.N, QUICK_SHAPE.P, QUICK_SHAPE.R, QUICK_SHAPE.N // QUICK_SHAPE.divisor
    state = 4 * H * (A + 2 + N * P + N * R + P)
    for row in receipt.traffic:
        tokens = row.seq_len // 2
        by_head = tokens * H * (2 * P + 3 + P) // 2  # v, z, A dt, dt, trap there, y back; half stays here
        shared = tokens * (2 * R * N + A)  # q, k and the angles
        assert row.hand_over_bytes == 2 * state
        assert row.all_to_all_bytes == 2 * 4 * (by_head + shared)


def test_no_figure_when_a_way_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = Outcome("hand-over output vs oracle", 0.5, 1e-5)
    monkeypatch.setattr(comm, "run_job", lambda plan: Measured([outcome], {}, []))
    assert main(["comm", "--quick"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "correctness gate is red" in captured.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--processes", "1"], "--processes 1: allowed are 2 to 8"),
        (["--processes", "3"], "allowed are 2, 4, 8"),
        (["--seq-len", "8191"], "--seq-len 8191: allowed are multiples of the 2 processes"),
        (["--n", "0"], "--n 0: allowed are 1 to"),
    ],
)
def test_refusals(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_entry(main, ["comm", *options]) == 2
    assert message in capsys.readouterr().err
