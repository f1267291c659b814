"""`fathom bench comm`: one quick run on two processes, its receipt, the red gate, and the refusals."""

from __future__ import annotations

import pytest

from apps.eval.bench import comm
from apps.eval.bench.__main__ import main
from apps.eval.bench.comm import CommReceipt
from apps.eval.bench.comm_command import QUICK_SEQ_LENS, QUICK_SHAPE
from apps.eval.bench.comm_job import METHODS, Measured
from apps.eval.bench.correctness import Outcome
from libs.flags.errors import run_entry


@pytest.fixture(scope="module")
def receipt(tmp_path_factory: pytest.TempPathFactory) -> CommReceipt:
    parent = tmp_path_factory.mktemp("receipts")
    options = ["--quick", "--n", "1", "--threads", "1", "--receipt-dir", str(parent), "--machine", "test"]
    assert main(["comm", *options]) == 0
    (path,) = parent.glob("*_comm_test/receipt.json")
    return CommReceipt.model_validate_json(path.read_text())


def test_every_way_is_checked_and_timed_at_every_length(receipt: CommReceipt) -> None:
    assert len(receipt.correctness) == 4
    assert all(check.passed for check in receipt.correctness)
    assert {s.name for s in receipt.contenders} == {f"{m}_S{s}" for m in METHODS for s in QUICK_SEQ_LENS}
    assert [aim.met for aim in receipt.aims] == [True, True]


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
