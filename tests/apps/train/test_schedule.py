"""Learning rate: pure, continuous where it should be, and at the stated values at the corners."""

from __future__ import annotations

import math

import pytest

from apps.train.config import ScheduleSection
from apps.train.schedule import learning_rate


def rates(kind: str, *, steps: int = 20, warmup: int = 4, decay: int = 5, floor: float = 0.1) -> list[float]:
    schedule = ScheduleSection.model_validate(
        {"kind": kind, "warmup_steps": warmup, "decay_steps": decay, "final_lr_ratio": floor}
    )
    return [learning_rate(step, peak=2.0, steps=steps, schedule=schedule) for step in range(steps)]


def test_wsd_is_three_straight_lines() -> None:
    found = rates("wsd")
    assert found[:4] == [0.5, 1.0, 1.5, 2.0]
    assert found[4:15] == [2.0] * 11
    expected = [2.0 * (1 - 0.9 * k / 5) for k in range(1, 6)]
    assert found[15:] == pytest.approx(expected, rel=1e-12)
    assert found[-1] == pytest.approx(0.2)


def test_cosine_is_the_formula() -> None:
    found = rates("cosine")
    assert found[:4] == [0.5, 1.0, 1.5, 2.0]
    expected = [2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 16))) for k in range(1, 17)]
    assert found[4:] == pytest.approx(expected, rel=1e-12)
    assert found[-1] == pytest.approx(0.2)


@pytest.mark.parametrize("kind", ["wsd", "cosine"])
def test_without_warmup_the_first_step_already_learns(kind: str) -> None:
    assert rates(kind, warmup=0)[0] > 1.9


def test_wsd_without_decay_stays_at_the_peak() -> None:
    assert rates("wsd", decay=0)[4:] == [2.0] * 16


def test_a_step_outside_the_run_is_our_mistake() -> None:
    with pytest.raises(AssertionError):
        learning_rate(20, peak=1.0, steps=20, schedule=ScheduleSection())
