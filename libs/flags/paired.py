"""The interval of a ratio of paired times: what every decision about an optimisation rests on.

Not a statistics library; the bootstrap over documents is in `apps.eval.intervals`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

from libs.flags.errors import UserError

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom (any table of the t distribution). Receipts
# state intervals made with these figures: with more digits they would no longer follow from their samples.
_T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_NORMAL_975 = NormalDist().inv_cdf(0.975)


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, Interval | None]:
    """Geometric mean of the ratios of paired samples, with its 95 % t-interval on the logarithm.

    Pairs come from the same round of an interleaved run, so a slow phase of the machine cancels in the ratio.
    Samples without a partner (a contender with fewer rounds) are left out. The interval is None for one pair.

    Raises:
        UserError: times that are not positive, or so far apart that the ratio or its interval is not finite.
    """
    try:
        mean, half = _mean([math.log(a / b) for a, b in zip(numerators, denominators, strict=False)])
        ratio = math.exp(mean)
        interval = None if half is None else Interval(math.exp(mean - half), math.exp(mean + half))
        if not all(map(math.isfinite, (ratio, *(interval or ())))):
            raise OverflowError("beyond the largest number")
    except (ArithmeticError, ValueError) as error:
        times = (*numerators, *denominators)
        raise UserError(f"no ratio of times from {min(times):g} to {max(times):g} s can be had: {error}") from error
    return ratio, interval


def paired_difference(left: Sequence[float], right: Sequence[float]) -> tuple[float, Interval | None]:
    """Mean of left - right over paired samples, with its 95 % t-interval; as `paired_ratio` in all else."""
    mean, half = _mean([a - b for a, b in zip(left, right, strict=False)])
    return mean, None if half is None else Interval(mean - half, mean + half)


def _mean(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and half of its 95 % t-interval."""
    assert values, "an interval of pairs needs at least one pair"
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, _t_975(len(values) - 1) * math.sqrt(variance / len(values))


def _t_975(degrees: int) -> float:
    """From the table, and beyond it by the expansion in 1 / degrees (Abramowitz and Stegun 26.7.5), right to 1e-6."""
    if degrees <= len(_T_975):
        return _T_975[degrees - 1]
    x = _NORMAL_975
    terms: tuple[float, ...] = (
        x,
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
    )
    return math.fsum(term / degrees**power for power, term in enumerate(terms))
