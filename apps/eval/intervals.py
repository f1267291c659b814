"""Intervals: the document bootstrap of a ratio of sums, and the paired interval of a ratio of times.

For every error bar that apps.eval prints. Not for significance tests, and not a general statistics library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom (any table of the t distribution).
_T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_NORMAL_975 = 1.960
_ROWS_AT_ONCE = 64  # resamples held at once: bounds the memory at 64 x documents weights


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


def bootstrap_ratio(
    numerators_D: NDArray[np.float64],
    denominators_D: NDArray[np.float64],
    *,
    seed: int,
    resamples: int = 1000,
) -> Interval | None:
    """95 % percentile bootstrap of `sum(numerators) / sum(denominators)`, resampling documents.

    The document is the unit: tokens of one document are far from independent, so resampling tokens would give
    an interval that is much too narrow. The caller passes documents in a fixed order, so that the same seed
    gives the same interval.

    Returns:
        None with fewer than two documents: one document says nothing about the spread between documents.
    """
    n_documents = len(numerators_D)
    if n_documents < 2:
        return None
    rng = np.random.default_rng(seed)
    ratios: list[NDArray[np.float64]] = []
    for start in range(0, resamples, _ROWS_AT_ONCE):
        rows = min(_ROWS_AT_ONCE, resamples - start)
        weights = rng.multinomial(n_documents, np.full(n_documents, 1 / n_documents), size=rows)
        ratios.append((weights @ numerators_D) / (weights @ denominators_D))
    low, high = np.percentile(np.concatenate(ratios), [2.5, 97.5])
    return Interval(float(low), float(high))


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, Interval | None]:
    """Geometric mean of the ratios of paired samples, with its 95 % t-interval on the logarithm.

    Pairs come from the same round of an interleaved run, so a slow phase of the machine cancels in the ratio.
    Samples without a partner (a contender with fewer rounds) are left out. The interval is None for one pair.
    """
    logs = [math.log(a / b) for a, b in zip(numerators, denominators, strict=False)]
    assert logs, "paired_ratio needs at least one pair"
    mean = sum(logs) / len(logs)
    if len(logs) < 2:
        return math.exp(mean), None
    variance = sum((value - mean) ** 2 for value in logs) / (len(logs) - 1)
    half = _t_975(len(logs) - 1) * math.sqrt(variance / len(logs))
    return math.exp(mean), Interval(math.exp(mean - half), math.exp(mean + half))


def _t_975(degrees: int) -> float:
    return _T_975[degrees - 1] if degrees <= len(_T_975) else _NORMAL_975
