"""The quantiles behind every interval: against printed tables, for every number of pairs, and what they decide."""

from __future__ import annotations

import itertools
import math

import pytest

from libs.flags.evidence import decide
from libs.flags.paired import _t_975, paired_ratio

# From tables of the t distribution (two-sided 95 %).
TABLE = {1: 12.706, 2: 4.303, 7: 2.365, 18: 2.101, 30: 2.042, 31: 2.0395, 35: 2.0301, 40: 2.0211, 50: 2.0086,
         60: 2.0003, 80: 1.9901, 100: 1.9840, 120: 1.9799, 1000: 1.9623, 10**9: 1.95996}  # fmt: skip


@pytest.mark.parametrize(("degrees", "quantile"), TABLE.items())
def test_quantiles_are_those_of_the_tables(degrees: int, quantile: float) -> None:
    assert _t_975(degrees) == pytest.approx(quantile, abs=1e-4)


def test_quantiles_fall_without_a_step() -> None:
    values = [_t_975(degrees) for degrees in range(1, 400)]
    assert all(a > b for a, b in itertools.pairwise(values))
    assert max(a - b for a, b in itertools.pairwise(values[25:])) < 0.005


def _with_t(t: float, pairs: int) -> tuple[list[float], list[float]]:
    """B and A, half of the logarithms of B / A above their mean and half below, whose mean lies t errors below 0."""
    spread = 0.01
    error = spread * math.sqrt(pairs / (pairs - 1)) / math.sqrt(pairs)
    logs = [-t * error + spread * (-1) ** i for i in range(pairs)]
    return [math.exp(one) for one in logs], [1.0] * pairs


@pytest.mark.parametrize(("t", "value"), [(2.0, "noise"), (2.03, "noise"), (2.05, "kept")])
def test_more_than_thirty_pairs_are_not_taken_for_infinitely_many(t: float, value: str) -> None:
    """t(31) is 2.040: 32 pairs at t = 2.0 have p = 0.054."""
    ratio, interval = paired_ratio(*_with_t(t, 32))
    assert decide(ratio, interval, "step", 32).value == value
