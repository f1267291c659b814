"""Where two curves of times cross: synthetic data with a known answer, and intervals that hold it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from apps.eval.bench.crossing import Crossing, LogRatio, crossing_point

LENGTHS = (4096, 6144, 8192, 12288, 16384)


def _points(truth: Callable[[int], float], noise: float, pairs: int, seed: int) -> list[LogRatio]:
    """Paired samples whose log ratio is `truth`, each pair slowed down by the same busy phase."""
    draw = random.Random(seed)
    points = []
    for seq_len in LENGTHS:
        hybrid, twin = [], []
        for _ in range(pairs):
            busy = draw.uniform(1.0, 3.0)
            hybrid.append(busy * math.exp(truth(seq_len) + draw.gauss(0, noise)))
            twin.append(busy)
        points.append(LogRatio.of(seq_len, hybrid, twin))
    return points


def _line(at: float) -> Callable[[int], float]:
    """Zero at `at` tokens, falling in log2 S as the interpolation assumes."""
    return lambda seq_len: 0.4 * (math.log2(at) - math.log2(seq_len))


def test_a_known_crossing_is_found_exactly() -> None:
    for at in (4100.0, 7000.0, 10_000.0, 16_000.0):
        found = Crossing.of("time", _points(_line(at), 0.0, 3, 0), seed=0)
        assert (found.status, found.sign_changes) == ("crossed", 1)
        assert found.tokens == pytest.approx(at, rel=1e-9)


def test_the_interval_covers_as_often_as_it_says() -> None:
    """95 % of intervals hold the truth; with another scale (no division by sqrt(n), normal for t) they would not."""
    at, held, widths = 9000.0, 0, []
    for seed in range(200):
        found = Crossing.of("time", _points(_line(at), 0.05, 5, seed), seed=0)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= at <= found.high
        widths.append(math.log2(found.high / found.low))
    assert 180 <= held <= 199
    # Two lengths around the crossing, each with a standard error of 0.05 / sqrt(5), a slope of 0.4: about +- 0.12.
    assert 0.1 < sorted(widths)[100] < 0.5


def test_not_crossed_and_below_all_along_are_answers() -> None:
    above = Crossing.of("time", _points(_line(40_000), 0.01, 5, 0), seed=0)
    assert (above.status, above.tokens, above.low, above.high) == ("not_crossed", None, 16384, None)
    assert above.sentence().startswith("not crossed: the hybrid needs no less time at 16,384 tokens")
    below = Crossing.of("time", _points(_line(1000), 0.01, 5, 0), seed=0)
    assert (below.status, below.tokens, below.low, below.high) == ("below_all_along", None, None, 4096)
    assert "at every length, 4,096 to 16,384 tokens" in below.sentence()


def test_an_end_that_is_not_known_is_open() -> None:
    near_the_end = Crossing.of("time", _points(_line(15_500), 0.08, 5, 0), seed=0)
    assert near_the_end.has_interval
    assert near_the_end.high is None
    assert "above 16,384" in near_the_end.sentence()
    assert near_the_end.low is not None


def test_the_crossing_is_where_the_hybrid_stays_below() -> None:
    lengths = [1024, 2048, 4096, 8192]
    assert crossing_point(lengths, [-0.1, 0.1, 0.1, -0.1]) == pytest.approx(math.sqrt(4096 * 8192))
    assert crossing_point(lengths, [-0.1, 0.1, -0.1, 0.1]) == math.inf
    assert crossing_point(lengths, [-0.1, -0.1, -0.1, -0.1]) == 0
    meets_twice = Crossing.of("time", [LogRatio(s, v, None, 1) for s, v in zip(lengths, [-1, 1, 1, -1], strict=True)],
                              seed=0)  # fmt: skip
    assert meets_twice.sign_changes == 2


def test_one_pair_has_no_interval() -> None:
    found = Crossing.of("time", _points(_line(7000), 0.05, 1, 0), seed=0)
    assert (found.status, found.has_interval, found.low, found.high) == ("crossed", False, None, None)
    assert "95 %" not in found.sentence()


def test_pairs_carry_the_machine_s_slow_phases_away() -> None:
    """Unpaired, the noise of the machine (a factor of three) would drown the ratio; paired it is not there."""
    found = Crossing.of("time", _points(_line(7000), 0.002, 5, 1), seed=0)
    assert found.low is not None
    assert found.high is not None
    assert found.high / found.low < 1.1


def test_samples_without_any_spread_have_no_interval() -> None:
    """A clock that cannot tell them apart says nothing of how sure the crossing is; nor do ratios of one rounding."""
    for seed, scale in ((0, 1.0), (1, 0.1)):
        same = [LogRatio.of(s, [scale * 1.1**k] * 3, [scale] * 3) for s, k in ((4096, 1), (8192, -1))]
        assert [(point.error, point.pairs) for point in same] == [(None, 3), (None, 3)]
        found = Crossing.of("time", same, seed=seed)
        assert (found.status, found.has_interval) == ("crossed", False)
        assert "95 %" not in found.sentence()
    assert LogRatio.of(4096, [0.3 * x for x in (1.0, 1.3, 1.7)], [1.0, 1.3, 1.7]).error is None
