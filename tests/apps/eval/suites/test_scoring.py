"""Judging by hand examples and slow paths."""

from __future__ import annotations

import random
from functools import cache

import pytest

from apps.eval.suites.scoring import (
    Row,
    chance_of_first,
    edit_similarity,
    exact_match,
    flat_metrics,
    identifier_f1,
    identifier_match,
    identifiers,
    rank_of_first,
    tabulate,
)


def slow_distance(a: bytes, b: bytes) -> int:
    @cache
    def distance(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return i + j
        same = distance(i - 1, j - 1) + (a[i - 1] != b[j - 1])
        return min(same, distance(i - 1, j) + 1, distance(i, j - 1) + 1)

    return distance(len(a), len(b))


def test_edit_similarity_by_hand() -> None:
    assert edit_similarity(b"kitten", b"sitting") == pytest.approx(1 - 3 / 7)
    assert edit_similarity(b" int x; ", b"int x;") == 1.0
    assert edit_similarity(b"", b"") == 1.0
    assert edit_similarity(b"", b"abc") == 0.0
    assert edit_similarity(b"abc", b"xyz") == 0.0
    assert edit_similarity(b"ab", b"ba") == 0.0  # a swap is two substitutions


def test_edit_similarity_equals_the_recursion() -> None:
    draw = random.Random(0)
    for _ in range(200):
        a, b = (bytes(draw.choices(b"abc", k=draw.randrange(9))) for _ in range(2))
        expected = 1.0 if not a and not b else 1 - slow_distance(a, b) / max(len(a), len(b))
        assert edit_similarity(a, b) == pytest.approx(expected), (a, b)


def test_exact_match_forgives_blanks_at_the_ends_alone() -> None:
    assert exact_match(b"  f(x);\n", b"f(x);") == 1
    assert exact_match(b"f( x);", b"f(x);") == 0


def test_identifiers_leave_keywords_out() -> None:
    assert identifiers(b"for (int i = 0; i < n_max; ++i) return foo::Bar(i);") == b"i i n_max i foo Bar i".split()


def test_identifier_f1_by_hand() -> None:
    # ours f x y, theirs f x x: two shared (f, one x), so precision 2/3 and recall 2/3
    assert identifier_f1(b"f(x, y)", b"f(x, x)") == pytest.approx(2 / 3)
    assert identifier_f1(b"g()", b"f(x)") == 0
    assert identifier_f1(b"return;", b"break;") == 1
    assert identifier_f1(b"", b"f()") == 0
    assert identifier_match(b"f(x) + 1", b"f( x )") == 1
    assert identifier_match(b"x(f)", b"f(x)") == 0


def test_ranks_and_ties() -> None:
    assert rank_of_first([-1.0, -2.0, -3.0]) == 1
    assert rank_of_first([-3.0, -2.0, -1.0]) == 3
    assert rank_of_first([-1.0, -1.0, -1.0, -1.0]) == 2.5
    assert chance_of_first([-1.0, -1.0, -1.0, -1.0]) == 0.25
    assert chance_of_first([-1.0, -2.0]) == 1
    assert chance_of_first([-2.0, -1.0, -2.0]) == 0


def rows() -> list[Row]:
    data = [("a", "u", 1, 1.0), ("b", "u", 1, 0.0), ("c", "v", 1, 1.0), ("d", "v", 2, 0.0), ("e", "w", 2, 1.0)]
    return [Row(item, unit, {"length": length}, {"hit": value}, {}) for item, unit, length, value in data]


def test_tables_are_means_over_items_and_resample_units() -> None:
    (one, two) = tabulate(rows(), ("length",), {"hit": 0.5}, seed=0)
    assert (one.n, one.units, one.estimate.value) == (3, 2, pytest.approx(2 / 3))
    assert (two.n, two.units, two.estimate.value) == (2, 2, 0.5)
    assert one.axes == {"length": 1}
    assert one.chance == 0.5
    assert one.estimate.low is not None
    assert one.estimate.low <= one.estimate.value
    (overall,) = tabulate(rows(), (), {"hit": None}, seed=0)
    assert overall.n == 5
    assert flat_metrics([overall, one], [two]) == {
        "hit": 0.6, "hit.length=1": pytest.approx(2 / 3), "control.hit.length=2": 0.5,
    }  # fmt: skip


def test_a_table_does_not_depend_on_the_order_of_rows() -> None:
    shuffled = rows()
    random.Random(1).shuffle(shuffled)
    for by in ((), ("length",)):
        assert tabulate(shuffled, by, {"hit": None}, seed=3) == tabulate(rows(), by, {"hit": None}, seed=3)


def test_one_unit_has_no_interval_and_a_missing_axis_no_cell() -> None:
    (score,) = tabulate(rows()[:2], ("length",), {"hit": None}, seed=0)
    assert score.estimate.low is None
    assert tabulate(rows(), ("depth",), {"hit": None}, seed=0) == []
    assert tabulate(rows(), (), {"other": None}, seed=0) == []
