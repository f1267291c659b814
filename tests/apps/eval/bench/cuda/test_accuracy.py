"""The correctness gate on the very kernels, run on the CPU in emulated bf16."""

from __future__ import annotations

import pytest
import torch

from apps.eval.bench.cuda import accuracy
from apps.eval.bench.cuda import plan as plans

CPU = torch.device("cpu")


def test_the_kernels_pass_their_own_gate() -> None:
    setting = plans.settings_on("off")[0]
    outcomes = accuracy.check_all(((plans.Case(16, 64, 4, 8), setting),), tokens=13, seed=0, device=CPU)
    assert len(outcomes) == 1 + 14 + 1
    assert [outcome for outcome in outcomes if not outcome.passed] == []
    assert all(outcome.error > 1e-5 for outcome in outcomes[:-1])  # it was bf16 that was checked


def test_far_off_counts_elements_and_nan() -> None:
    want = torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    got = torch.tensor([1.0, 1.19, 1.21, float("nan")])
    assert accuracy.far_off(got, want) == pytest.approx(0.5)
