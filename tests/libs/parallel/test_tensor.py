"""Tensor parallelism in real gloo processes: tp 2 and 4, with and without sequence parallelism, equal one process."""

from __future__ import annotations

from typing import Any

import pytest

from libs.parallel.mesh import Layout
from tests.support.ranks import run_ranks
from tests.support.tensor_parallel import all_layouts

LAYOUTS = ("tp2", "tp2 sp", "tp4", "tp4 sp")


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(all_layouts, Layout(dp=2, tp=2))


def worst(ranks: list[dict[str, Any]], layout: str, check: str) -> dict[str, float]:
    """The largest error over all ranks, by name."""
    found = [rank[layout][check] for rank in ranks]
    return {name: max(errors[name] for errors in found) for name in found[0]}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("check", "tolerance"),
    [
        ("outputs", 1e-6),
        ("gradients", 1e-6),
        ("checkpointed", 1e-6),
        ("steps", 1e-6),
        ("fp64", 1e-13),
        ("steps fp64", 1e-13),
    ],
)
def test_equals_one_process(ranks: list[dict[str, Any]], layout: str, check: str, tolerance: float) -> None:
    assert {name: e for name, e in worst(ranks, layout, check).items() if not e < tolerance} == {}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", ["angle_proj", "B_norm", "join_proj", "blocks.0.norm"])
def test_a_replicated_gradient_that_is_not_summed_shows(ranks: list[dict[str, Any]], layout: str, suffix: str) -> None:
    """Those parameters, and no other, get a wrong gradient on every rank without their sum."""
    if f"without {suffix}" not in ranks[0][layout]:
        assert not layout.endswith("sp"), "without sequence parallelism every rank sees all tokens: nothing to sum"
        return
    wrong = {name for name, e in worst(ranks, layout, f"without {suffix}").items() if not e < 1e-6}
    assert wrong
    assert all(name.removesuffix(".weight").endswith(suffix) for name in wrong)
    assert all(rank[layout][f"without {suffix}"][name] > 0.01 for rank in ranks for name in wrong)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_initial_values_are_those_of_one_process(ranks: list[dict[str, Any]], layout: str) -> None:
    assert all(rank[layout]["init"] is True for rank in ranks)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_decode_and_autocast(ranks: list[dict[str, Any]], layout: str) -> None:
    for rank in ranks:
        assert rank[layout]["norm"] < 1e-6
        assert rank[layout]["decode"] < 1e-6
        assert 0 < rank[layout]["bf16"]["loss"] < 0.01
        assert rank[layout]["bf16"]["dtypes"] == ["torch.float32"]


@pytest.mark.parametrize("layout", ["tp2 loss", "tp4 loss"])
def test_vocab_parallel_loss(ranks: list[dict[str, Any]], layout: str) -> None:
    for rank in ranks:
        errors = rank[layout]
        assert max(errors[name] for name in ("nll", "hidden", "weight")) < 1e-6
        assert errors["ignored"] == 0
        assert errors["hidden before the sum"] > 0.01, "the gradient of hidden is a share, which the caller sums"
        assert errors["out of bounds"] == 1, "a label that no rank holds is refused"


def test_tensor_sequence_and_context_parallelism_together(ranks: list[dict[str, Any]]) -> None:
    assert max(max(rank["cp2 tp2"].values()) for rank in ranks) < 1e-5


def test_without_reductions_nothing_is_right(ranks: list[dict[str, Any]]) -> None:
    assert min(min(rank["no reduction"].values()) for rank in ranks) > 0.001


def test_groups_of_two_layouts(ranks: list[dict[str, Any]]) -> None:
    """Rank order: tp fastest, then cp, then dp."""
    everyone = (0, 1, 2, 3)
    for rank, found in enumerate(r["groups"] for r in ranks):
        pair, across = (rank & ~1, rank | 1), (rank & ~2, rank | 2)
        assert found["dp2 tp2"] == {"tp": pair, "cp": (rank,), "dp": across, "dp_cp": across, "world": everyone}
        assert found["cp2 tp2"] == {"tp": pair, "cp": across, "dp": (rank,), "dp_cp": across, "world": everyone}


def test_plain_collectives(ranks: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(r["groups"] for r in ranks):
        low, high = rank & ~1, rank | 1
        assert found["sum"] == [(rank & ~2) + (rank | 2)]
        assert found["max"] == [high]
        assert found["gather"] == [[[low, 10 * low]], [[high, 10 * high]]]
        assert found["gather of a scalar"] == [0, 1, 2, 3]
        assert found["reduce_scatter"] == ([low + high, 2] if rank == low else [10 * (low + high), 4])
