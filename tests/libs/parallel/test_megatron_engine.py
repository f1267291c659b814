"""Megatron's engine and ours move the same weights alike, on gloo through the facade; its state fits every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from libs.parallel.mesh import Layout
from tests.support.ranks import run_ranks

if torch.cuda.is_available():
    pytest.skip("the facade is for machines without CUDA", allow_module_level=True)

from tests.support.megatron_training import check, check_alone, check_four

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def two() -> Results:
    return run_ranks(check, Layout(dp=2))


@pytest.fixture(scope="module")
def one() -> Results:
    return run_ranks(check_alone, Layout())


@pytest.fixture(scope="module")
def four() -> Results:
    return run_ranks(check_four, Layout(dp=4))


def assert_alike(ranks: Results, case: str) -> None:
    for found in (rank[case] for rank in ranks):
        for pair in (*found["loss"], *found["norm"]):
            assert pair[0] == pytest.approx(pair[1], rel=1e-6)
        assert found["weights apart"] < 1e-6
        assert found["state apart"] < 1e-6
        assert min(found["moved"].values()) > 1e-3, found["moved"]
        assert found["dtypes"] == ["torch.float32"]
        early, late = found["uses"]
        assert early == 0
        assert late > 100


@pytest.mark.parametrize("case", ["dp2", "dp2 overlapped", "tp2", "cp2"])
def test_steps_of_two_ranks(two: Results, case: str) -> None:
    assert_alike(two, case)
    assert two[0][case]["buckets"] == (1 if case == "dp2" else pytest.approx(8, abs=5))


@pytest.mark.parametrize("case", ["alone", "alone, one exchange"])
def test_steps_of_one_process(one: Results, case: str) -> None:
    assert_alike(one, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dp4", "dp2 tp2"])
def test_steps_of_four_ranks(four: Results, case: str) -> None:
    assert_alike(four, case)


def test_each_replica_updates_its_half(two: Results) -> None:
    for case in ("dp2", "dp2 overlapped", "cp2"):
        shares = [rank[case]["held"] for rank in two]
        assert sum(shares) == two[0][case]["all"]
        assert max(shares) < 0.7 * sum(shares)
    assert two[0]["tp2"]["held"] == two[0]["tp2"]["all"]


def test_a_use_that_does_not_wait_is_seen(two: Results) -> None:
    """The check that no parameter is read while it is gathered can fail."""
    assert min(rank["early uses"] for rank in two) > 0


def assert_same_bits(ranks: Results) -> None:
    for found in (state for rank in ranks for state in rank["state"]):
        assert found == {"before": 0, "other bits": [], "keys": True, "same after": True}


def test_state_keeps_its_bits(one: Results, two: Results) -> None:
    assert_same_bits(one)
    assert_same_bits(two)


@pytest.mark.slow
def test_state_keeps_its_bits_on_four_ranks(four: Results) -> None:
    assert_same_bits(four)


def test_a_step_left_out_leaves_no_trace(two: Results) -> None:
    for rank, found in enumerate(row["left out"] for row in two):
        ((what, whose, bad),) = found["seen"]
        assert (what, whose) == ("gradient", 1)
        assert rank == 0 or "blocks.0.norm.weight" in bad
        assert found["same"]
