"""Where one curve of times passes under another as the sequence grows, and how sure that is.

Not for measuring (crossover_job.py). The same for any quantity: time with samples, memory or FLOPs without.
"""
# S tokens

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, Self, TypeAlias

import numpy as np
from pydantic import BaseModel, ConfigDict

DRAWS = 4000
METHOD = (
    "log(hybrid / twin) of paired samples, a straight line in log2 S between neighbouring lengths; the crossing is "
    "where the hybrid begins to stay below; interval: the mean of each length redrawn from its Student t, "
    f"{DRAWS} draws, the middle 95 %"
)
Status: TypeAlias = Literal["crossed", "below_all_along", "not_crossed"]
_SHARE = 0.025  # of the draws on either side of a 95 % interval
_ROUNDING = 1e-12  # logarithms of one ratio may differ by this much: no spread of samples


class LogRatio(NamedTuple):
    """log(hybrid / twin) at one length: mean over n pairs, and its standard error; None where nothing varied or one
    pair says nothing of how much it would."""

    seq_len: int
    mean: float
    error: float | None
    pairs: int

    @classmethod
    def of(cls, seq_len: int, hybrid: Sequence[float], twin: Sequence[float]) -> LogRatio:
        """Of paired samples. Those without a partner are left out."""
        logs = [math.log(a / b) for a, b in zip(hybrid, twin, strict=False)]
        assert logs, "a ratio needs a pair"
        mean = math.fsum(logs) / len(logs)
        if max(logs) - min(logs) <= _ROUNDING:
            return cls(seq_len, mean, None, len(logs))
        variance = math.fsum((one - mean) ** 2 for one in logs) / (len(logs) - 1)
        return cls(seq_len, mean, math.sqrt(variance / len(logs)), len(logs))


class Crossing(BaseModel):
    """Where the hybrid begins to stay below its twin, among the lengths that were measured.

    status: crossed; below_all_along: at every length; not_crossed: not at the longest. tokens: None unless crossed.
    low, high: 95 % interval; None says that it is open: below the shortest length, or above the longest. has_interval:
    false where samples say nothing of their spread. sign_changes: more than one says that the curves meet repeatedly.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    quantity: str
    status: Status
    tokens: float | None
    has_interval: bool
    low: float | None
    high: float | None
    shortest: int
    longest: int
    sign_changes: int

    @classmethod
    def of(cls, quantity: str, points: Sequence[LogRatio], *, seed: int) -> Self:
        """Of at least two lengths, in rising order."""
        assert len(points) > 1, "a crossing lies between two lengths"
        assert all(a.seq_len < b.seq_len for a, b in itertools.pairwise(points)), "lengths rise"
        lengths, means = [point.seq_len for point in points], [point.mean for point in points]
        at = crossing_point(lengths, means)
        status: Status = "below_all_along" if at == 0 else "not_crossed" if at == math.inf else "crossed"
        bounds = _interval(points, seed)
        return cls(
            quantity=quantity,
            status=status,
            tokens=at if status == "crossed" else None,
            has_interval=bounds is not None,
            low=None if bounds is None or bounds[0] == 0 else min(bounds[0], float(lengths[-1])),
            high=None if bounds is None or bounds[1] == math.inf else max(bounds[1], float(lengths[0])),
            shortest=lengths[0],
            longest=lengths[-1],
            sign_changes=sum((a < 0) != (b < 0) for a, b in itertools.pairwise(means)),
        )

    def sentence(self) -> str:
        """In words, for people."""
        span = f"{self.shortest:,} to {self.longest:,} tokens"
        what = self.quantity
        words = {
            "crossed": f"the hybrid needs less {what} from {self.tokens or 0:,.0f} tokens on",
            "below_all_along": f"the hybrid needs less {what} at every length, {span}",
            "not_crossed": f"not crossed: the hybrid needs no less {what} at {self.longest:,} tokens ({span})",
        }[self.status]
        if not self.has_interval:
            return words
        low = f"below {self.shortest:,}" if self.low is None else f"{self.low:,.0f}"
        high = f"above {self.longest:,}" if self.high is None else f"{self.high:,.0f}"
        return f"{words} (95 %: {low} to {high})"


def crossing_point(lengths: Sequence[int], logs: Sequence[float]) -> float:
    """Tokens from which on log(hybrid / twin) stays below zero: 0 when it always is, infinity when it is not at the
    longest length."""
    if logs[-1] >= 0:
        return math.inf
    above = [index for index, value in enumerate(logs) if value >= 0]
    if not above:
        return 0.0
    left = above[-1]
    share = logs[left] / (logs[left] - logs[left + 1])
    x0, x1 = math.log2(lengths[left]), math.log2(lengths[left + 1])
    return float(2 ** (x0 + share * (x1 - x0)))


def _interval(points: Sequence[LogRatio], seed: int) -> tuple[float, float] | None:
    """The middle 95 % of redrawn crossings, 0 and infinity among them; None where some length has no error."""
    if any(point.error is None for point in points):
        return None
    found = sorted(_redrawn(points, seed))
    edge = int(_SHARE * DRAWS)
    return found[edge], found[DRAWS - 1 - edge]


def _redrawn(points: Sequence[LogRatio], seed: int) -> Iterator[float]:
    source = np.random.default_rng(seed)
    drawn = [point.mean + (point.error or 0.0) * source.standard_t(point.pairs - 1, size=DRAWS) for point in points]
    lengths = [point.seq_len for point in points]
    for row in np.stack(drawn, axis=1):
        yield crossing_point(lengths, [float(value) for value in row])
