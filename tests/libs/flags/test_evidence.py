"""The decision rule, and which receipts are evidence for a gate: everything that could be wrong with one is seen."""

from __future__ import annotations

import math
import random
import statistics
from pathlib import Path
from typing import Any

import pytest

from libs.flags.errors import UserError
from libs.flags.evidence import MIN_PAIRS, decide, read_evidence
from libs.flags.paired import Interval, paired_difference, paired_ratio
from tests.libs.flags.receipts import receipt, samples, write


@pytest.mark.parametrize(
    ("ratio", "interval", "scope", "value"),
    [
        (0.97, (0.96, 0.98), "step", "kept"),
        (0.97, (0.94, 1.0), "step", "noise"),
        (1.0, (0.99, 1.01), "step", "noise"),
        (1.03, (1.0, 1.06), "step", "noise"),
        (1.03, (1.01, 1.05), "step", "rejected"),
        (0.90, (0.89, 0.91), "forward", "noise"),
        (0.90, (0.89, 0.91), "forward_backward", "noise"),
        (1.10, (1.09, 1.11), "forward", "rejected"),
        (0.50, None, "step", "noise"),
        (math.inf, (math.nan, math.nan), "step", "noise"),
        (math.nan, (0.1, 0.2), "step", "noise"),
        (0.5, (math.nan, 0.9), "step", "noise"),
        (0.5, (-math.inf, 0.9), "step", "noise"),
    ],
)
def test_the_rule(ratio: float, interval: tuple[float, float] | None, scope: Any, value: str) -> None:
    verdict = decide(ratio, None if interval is None else Interval(*interval), scope, MIN_PAIRS)
    assert verdict.value == value
    assert f"{ratio:.4f}" in verdict.reason
    if not math.isfinite(sum((ratio, *(interval or ())))):
        assert "not finite" in verdict.reason
    elif scope != "step" and value == "noise":
        assert "only the whole step decides" in verdict.reason


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_few_pairs_decide_nothing(ratio: float) -> None:
    """Not even two that are the same to the last digit."""
    for pairs in range(2, MIN_PAIRS):
        verdict = decide(ratio, Interval(ratio, ratio), "step", pairs)
        assert (verdict.value, f"from {pairs} pairs" in verdict.reason) == ("noise", True)
    assert decide(ratio, Interval(ratio, ratio), "step", MIN_PAIRS).value != "noise"


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """The slow way: repeat the experiment, with noise that both arms share and noise of their own."""
    draw, covered, tries = random.Random(0), 0, 400
    for _ in range(tries):
        phase = [1 + draw.random() for _ in range(8)]
        a = [p * math.exp(draw.gauss(0, 0.02)) for p in phase]
        b = [0.97 * p * math.exp(draw.gauss(0, 0.02)) for p in phase]
        interval = paired_ratio(b, a)[1]
        assert interval is not None
        covered += interval.low <= 0.97 <= interval.high
    assert 0.92 <= covered / tries <= 0.98


def test_the_difference_is_the_t_interval_of_the_pairs() -> None:
    a, b = [1.0, 2.0, 4.0], [1.5, 2.0, 3.0]
    mean, interval = paired_difference(b, a)
    assert mean == pytest.approx(-1 / 6)
    half = 4.303 * statistics.stdev([0.5, 0.0, -1.0]) / math.sqrt(3)
    assert interval == (pytest.approx(mean - half), pytest.approx(mean + half))
    assert paired_difference([1.0], [2.0]) == (-1.0, None)


def test_a_good_receipt(tmp_path: Path) -> None:
    found = read_evidence(write(receipt(), tmp_path), "psiv_cache", "gmem_pool")
    assert (found.gate, found.value, found.pairs, found.machine) == ("psiv_cache", "gmem_pool", 19, "Box")
    assert found.interval.low < 0.97 < found.interval.high < 1
    assert "psiv_cache=gmem_pool on Box" in str(found)


def _with_samples(ratio: float, pairs: int = 19) -> list[dict[str, Any]]:
    return _arms(*samples(ratio, pairs))


def _arms(a: list[float], b: list[float]) -> list[dict[str, Any]]:
    return [{"name": "a", "samples_s": a}, {"name": "b", "samples_s": b}]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"comparison": {"scope": "forward"}}, "times forward alone"),
        ({"comparison": {"scope": "forward"}, "decision": {"value": "noise"}}, "its decision is noise, not kept"),
        ({"decision": {"value": "noise"}}, "its decision is noise, not kept"),
        ({"decision": {"value": "record"}}, "its decision is record, not kept"),
        ({"comparison": {"gate": "tma"}}, "it compares gate tma"),
        ({"comparison": {"gate": None}}, "it compares no single gate"),
        ({"comparison": {"value": "bwd_fwd_reuse"}}, "B had the value bwd_fwd_reuse"),
        ({"comparison": {"baseline": "python_precompute"}}, "A had psiv_cache=python_precompute"),
        ({"correctness": [{"name": "loss", "error": 1.0, "tolerance": 1e-3}]}, "correctness gate is red: loss"),
        ({"code": {"git_commit": "0" * 40, "git_dirty": True}}, "uncommitted changes"),
        ({"code": {"git_commit": None, "git_dirty": None}}, "no commit"),
        ({"contenders": _with_samples(1.0)}, "its own samples say noise"),
        ({"contenders": _with_samples(1.1)}, "its own samples say rejected"),
        ({"contenders": _with_samples(0.9, MIN_PAIRS - 1)}, f"{MIN_PAIRS} are the fewest"),
        ({"contenders": _with_samples(0.9)[:1]}, "no samples of a and b"),
        ({"contenders": [*_with_samples(0.9)[:1], *_with_samples(0.9, 3)[1:]]}, "not pairs"),
        ({"contenders": [{"name": n, "samples_s": [-1.0] * 9} for n in "ab"]}, "not pairs of positive times"),
        ({"contenders": _arms([1.0] * 6 + [1e-200], [2.0] * 6 + [1e200])}, "no ratio of times from 1e-200 to 1e+200"),
        ({"contenders": _arms([1e300] * 7, [1e-300] * 7)}, "no ratio of times from 1e-300 to 1e+300"),
        ({"contenders": _arms([1.0] * 7, [1e300] * 6 + [1.0])}, "no ratio of times from 1 to 1e+300"),
        ({"comparison": {"value": None}}, "does not say which value B had"),
    ],
)
def test_what_is_no_evidence(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    path = write(receipt(**changed), tmp_path)
    with pytest.raises(UserError, match="the rule: kept:") as error:
        read_evidence(path, "psiv_cache", "gmem_pool")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([1e300] * 2, [1e-300] * 2),
        ([1e-300] * 2, [1e300] * 2),
        ([1e300, 1.0], [1.0, 1.0]),
        ([1.0, 1.0], [1e300, 1.0]),
        ([1.0] * 6 + [1e200], [1.0] * 6 + [1e-200]),
        ([1.0], [0.0]),
        ([-1.0], [1.0]),
    ],
)
def test_times_without_a_finite_ratio(a: list[float], b: list[float]) -> None:
    with pytest.raises(UserError, match="no ratio of times from"):
        paired_ratio(a, b)


def test_a_receipt_that_does_not_name_its_value(tmp_path: Path) -> None:
    """Also where no value was asked for."""
    with pytest.raises(UserError, match="which value B had"):
        read_evidence(write(receipt(comparison={"value": None}), tmp_path), "psiv_cache")


def test_a_receipt_that_compares_nothing(tmp_path: Path) -> None:
    content = receipt(decision={"value": "record"})
    del content["comparison"]
    with pytest.raises(UserError, match="compares no two configurations"):
        read_evidence(write(content, tmp_path), "psiv_cache")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema_version": 2}'])
def test_what_is_no_receipt(tmp_path: Path, text: str) -> None:
    path = tmp_path / "receipt.json"
    path.write_text(text)
    with pytest.raises(UserError, match="is not a receipt"):
        read_evidence(path, "psiv_cache")
    with pytest.raises(UserError, match="cannot read the receipt"):
        read_evidence(tmp_path / "none.json", "psiv_cache")
