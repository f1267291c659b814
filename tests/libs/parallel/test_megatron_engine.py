"""Megatron's engine and ours move the same weights alike, on gloo through the facade."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from libs.parallel.mesh import Layout
from tests.support.ranks import run_ranks

if torch.cuda.is_available():
    pytest.skip("the facade is for machines without CUDA", allow_module_level=True)

from tests.support.megatron_training import check

CASES = ("dp2", "dp2 overlapped", "tp2")


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(check, Layout(dp=2))


@pytest.mark.parametrize("case", CASES)
def test_three_steps(ranks: list[dict[str, Any]], case: str) -> None:
    for found in (rank[case] for rank in ranks):
        for pair in (*found["loss"], *found["norm"]):
            assert pair[0] == pytest.approx(pair[1], rel=2e-5)
        assert max(found["off"].values()) < 5e-6, found["off"]
        assert min(found["moved"].values()) > 1e-3, found["moved"]
        assert found["dtypes"] == ["torch.float32"]


def test_each_replica_updates_its_half(ranks: list[dict[str, Any]]) -> None:
    shares = [rank["dp2"]["held"] for rank in ranks]
    assert sum(shares) == ranks[0]["dp2"]["all"]
    assert max(shares) < 0.7 * sum(shares)
    assert ranks[0]["tp2"]["held"] == ranks[0]["tp2"]["all"]
