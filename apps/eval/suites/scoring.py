"""How answers are judged: equality, edit similarity, identifiers, ranks; and the tables of their means.

Every function is pure and works on one answer; `tabulate` makes the means. Not for asking (questions.py).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from pydantic import JsonValue

from apps.eval.results import AxisValue, Estimate, Score

IDENTIFIER = re.compile(rb"[A-Za-z_]\w*")
# Words of the language are no names (ISO/IEC 14882:2020, 5.11, and the two that are special in context).
KEYWORDS = frozenset(
    b"alignas alignof and and_eq asm auto bitand bitor bool break case catch char char8_t char16_t char32_t class "
    b"compl concept const consteval constexpr constinit const_cast continue co_await co_return co_yield decltype "
    b"default delete do double dynamic_cast else enum explicit export extern false float for friend goto if inline "
    b"int long mutable namespace new noexcept not not_eq nullptr operator or or_eq private protected public "
    b"register reinterpret_cast requires return short signed sizeof static static_assert static_cast struct switch "
    b"template this thread_local throw true try typedef typeid typename union unsigned using virtual void volatile "
    b"wchar_t while xor xor_eq override final".split()
)


def exact_match(answer: bytes, reference: bytes) -> float:
    """1 when both are the same text, blanks at both ends aside."""
    return float(answer.strip() == reference.strip())


def edit_similarity(answer: bytes, reference: bytes) -> float:
    """1 - Levenshtein distance / longer length, over bytes, blanks at both ends aside; two empty texts are equal."""
    a, b = answer.strip(), reference.strip()
    if not a and not b:
        return 1.0
    return 1.0 - _levenshtein(a, b) / max(len(a), len(b))


def _levenshtein(a: bytes, b: bytes) -> int:
    """Insertions, deletions and substitutions between two texts. One numpy row per byte of `a`."""
    if not a or not b:
        return max(len(a), len(b))
    other = np.frombuffer(b, dtype=np.uint8)
    steps = np.arange(len(b) + 1)
    row = steps.copy()
    for i, byte in enumerate(a, start=1):
        best = np.empty_like(row)
        best[0] = i
        best[1:] = np.minimum(row[1:] + 1, row[:-1] + (other != byte))
        # An insertion adds one per place to the right: a running minimum of (value - place).
        row = np.minimum.accumulate(best - steps) + steps
    return int(row[-1])


def identifiers(text: bytes) -> list[bytes]:
    """Names in order, keywords left out. Text inside literals and comments counts like any other."""
    return [name for name in IDENTIFIER.findall(text) if name not in KEYWORDS]


def identifier_match(answer: bytes, reference: bytes) -> float:
    """1 when both have the same names in the same order."""
    return float(identifiers(answer) == identifiers(reference))


def identifier_f1(answer: bytes, reference: bytes) -> float:
    """Harmonic mean of precision and recall over names, each counted as often as it occurs; two without names: 1."""
    ours, theirs = Counter(identifiers(answer)), Counter(identifiers(reference))
    if not ours and not theirs:
        return 1.0
    shared = (ours & theirs).total()
    return 2 * shared / (ours.total() + theirs.total())


def rank_of_first(sums: Sequence[float]) -> float:
    """Rank of choice 0 by log-likelihood, 1 is best; ties share the mean of their ranks."""
    better = sum(value > sums[0] for value in sums[1:])
    equal = sum(value == sums[0] for value in sums[1:])
    return 1 + better + equal / 2


def chance_of_first(sums: Sequence[float]) -> float:
    """1 when choice 0 is the most likely; 1/m in a tie of m at the top: a model without opinion is at chance."""
    top = max(sums)
    return float(sums[0] == top) / sum(value == top for value in sums)


class Row(NamedTuple):
    """One judged item. unit: the context it comes from, which is what intervals resample."""

    item: str
    unit: str
    axes: Mapping[str, AxisValue]
    values: Mapping[str, float]
    record: Mapping[str, JsonValue]

    def line(self, *, control: bool) -> dict[str, JsonValue]:
        """What the item file says of it."""
        return {
            "item": self.item, "unit": self.unit, "control": control, "axes": dict(self.axes),
            "values": dict(self.values), **self.record,
        }  # fmt: skip


def tabulate(rows: Sequence[Row], by: Sequence[str], chances: Mapping[str, float | None], *, seed: int) -> list[Score]:
    """Means of every metric in `chances` over rows that share the axes `by`; rows without one of them do not count.

    Cells come in the order of their axes. A row without a metric does not count for that metric.
    """
    groups: dict[tuple[AxisValue, ...], list[Row]] = {}
    for row in rows:
        if all(axis in row.axes for axis in by):
            groups.setdefault(tuple(row.axes[axis] for axis in by), []).append(row)
    found: list[Score] = []
    for key in sorted(groups, key=lambda values: [(isinstance(v, str), v) for v in values]):
        for metric, chance in chances.items():
            mine = [row for row in groups[key] if metric in row.values]
            if not mine:
                continue
            units = sorted({row.unit for row in mine})
            place = {unit: i for i, unit in enumerate(units)}
            sums, counts = np.zeros(len(units)), np.zeros(len(units))
            for row in sorted(mine, key=lambda r: r.item):  # a fixed order: sums of floats depend on it
                sums[place[row.unit]] += row.values[metric]
                counts[place[row.unit]] += 1
            found.append(
                Score(
                    axes=dict(zip(by, key, strict=True)), metric=metric, n=len(mine), units=len(units),
                    estimate=Estimate.of_ratio(sums, counts, seed=seed), chance=chance,
                )
            )  # fmt: skip
    return found


def flat_metrics(totals: Sequence[Score], control: Sequence[Score]) -> dict[str, float]:
    """For the run log: "metric" or "metric.axis=value", controls with "control." before."""
    named: dict[str, float] = {}
    for prefix, scores in (("", totals), ("control.", control)):
        for score in scores:
            axes = "".join(f".{axis}={value}" for axis, value in score.axes.items())
            named[f"{prefix}{score.metric}{axes}"] = score.estimate.value
    return named
