"""The bootstrap and the paired interval against slow, obvious computations."""

from __future__ import annotations

import math

import numpy as np
import pytest

from apps.eval.intervals import bootstrap_ratio
from libs.flags.paired import paired_ratio


def test_bootstrap_agrees_with_a_loop_over_resamples() -> None:
    rng = np.random.default_rng(1)
    bits, size = rng.gamma(4, 200, 30), rng.integers(50, 900, 30).astype(float)
    interval = bootstrap_ratio(bits, size, seed=3, resamples=4000)
    assert interval is not None
    slow = []
    for _ in range(4000):
        pick = rng.integers(0, 30, 30)
        slow.append(bits[pick].sum() / size[pick].sum())
    low, high = np.percentile(slow, [2.5, 97.5])
    width = high - low
    assert abs(interval.low - low) < 0.1 * width
    assert abs(interval.high - high) < 0.1 * width
    assert interval.low < bits.sum() / size.sum() < interval.high


def test_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        size = rng.integers(100, 1000, 60).astype(float)
        bits = size * rng.normal(2.0, 0.5, 60)
        interval = bootstrap_ratio(bits, size, seed=trial, resamples=300)
        assert interval is not None
        hits += interval.low <= 2.0 <= interval.high
    assert 176 <= hits <= 199  # 95 % of 200, with the slack of 200 trials


def test_bootstrap_is_the_same_for_the_same_seed_and_silent_about_one_document() -> None:
    bits, size = np.array([10.0, 30.0, 20.0]), np.array([5.0, 9.0, 11.0])
    assert bootstrap_ratio(bits, size, seed=7) == bootstrap_ratio(bits, size, seed=7)
    assert bootstrap_ratio(bits, size, seed=7) != bootstrap_ratio(bits, size, seed=8)
    assert bootstrap_ratio(bits[:1], size[:1], seed=7) is None


def test_paired_ratio_is_the_t_interval_on_the_logarithm() -> None:
    a, b = [2.0, 2.2, 1.9, 2.1], [1.0, 1.0, 1.0, 1.0]
    logs = [math.log(x) for x in a]
    mean = sum(logs) / 4
    half = 3.182 * np.std(logs, ddof=1) / 2
    value, interval = paired_ratio(a, b)
    assert interval is not None
    assert value == pytest.approx(math.exp(mean))
    assert interval.low == pytest.approx(math.exp(mean - half))
    assert interval.high == pytest.approx(math.exp(mean + half))


def test_pairing_cancels_a_slow_phase_of_the_machine() -> None:
    phase = [1.0, 3.0, 1.0, 5.0]
    value, interval = paired_ratio([2 * p for p in phase], phase)
    assert interval is not None
    assert value == pytest.approx(2.0)
    assert interval.high - interval.low < 1e-9


def test_a_contender_with_fewer_rounds_is_paired_with_the_first_ones() -> None:
    assert paired_ratio([2.0, 2.0], [1.0, 1.0, 50.0])[0] == pytest.approx(2.0)
    assert paired_ratio([2.0], [1.0]) == (pytest.approx(2.0), None)
