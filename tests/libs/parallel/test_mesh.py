"""Layouts that fit and those that are refused, a process on its own, and seeds by role."""

from __future__ import annotations

import copy
from datetime import timedelta
from typing import Any

import pytest
import torch

from libs.flags.errors import UserError
from libs.parallel.mesh import Group, Groups, Layout, Parallel, check_layout, legal_layouts, open_groups, single
from libs.parallel.seeds import role_seeds
from libs.parallel.tensor import copy_to, enter, gather_columns, leave, reduce_from, sum_gradient


def test_a_layout_that_fits_is_accepted() -> None:
    for layout in (Layout(1, 1, 1), Layout(2, 1, 4), Layout(1, 8, 1)):
        check_layout(layout, layout.world_size)


@pytest.mark.parametrize(
    ("layout", "world_size", "shown"),
    [
        (Layout(2, 1, 2), 3, r"dp\*cp\*tp = 2\*1\*2 = 4 processes, but there are 3; legal for 3: dp=3 cp=1 tp=1"),
        (Layout(1, 1, 1), 2, r"there are 2; legal for 2: dp=2 cp=1 tp=1; dp=1 cp=2 tp=1; dp=1 cp=1 tp=2$"),
        (Layout(-1, 1, -1), 1, r"must each be at least 1; legal for 1: dp=1 cp=1 tp=1$"),
        (Layout(0, 1, 2), 2, "must each be at least 1"),
        (Layout(3, 1, 1), 64, "; and 16 more$"),
    ],
)
def test_a_layout_that_does_not_fit_names_the_legal_ones(layout: Layout, world_size: int, shown: str) -> None:
    with pytest.raises(UserError, match=shown):
        check_layout(layout, world_size)


def test_every_legal_layout_is_listed_once() -> None:
    found = list(legal_layouts(8))
    assert len(set(found)) == len(found) == 10
    assert all(layout.world_size == 8 for layout in found)


def test_one_process_needs_no_process_group() -> None:
    for groups in (single(), open_groups(Layout(), "gloo", timedelta(seconds=1))):
        assert {g.size for g in (groups.tp, groups.cp, groups.dp, groups.dp_cp, groups.world)} == {1}
    with pytest.raises(UserError, match="but there are 1"):
        open_groups(Layout(tp=2), "gloo", timedelta(seconds=1))


def test_in_a_group_of_one_nothing_happens() -> None:
    x, alone = torch.randn(1, 5, 3), Group()
    assert alone.all_reduce_(x) is x
    assert torch.equal(alone.all_gather(x), x[None])
    assert torch.equal(alone.reduce_scatter(x), x[0])
    alone.barrier()
    assert copy_to(x, alone) is reduce_from(x, alone) is gather_columns(x, alone) is x
    assert sum_gradient(x, alone) is sum_gradient(x, None) is x
    for parallel in (None, Parallel(single()), Parallel(single(), sequence_parallel=True)):
        assert enter(x, parallel, 5) is leave(x, parallel) is x


def test_copying_a_model_does_not_copy_its_connections() -> None:
    parallel = Parallel(of_ranks())
    assert copy.deepcopy(parallel).tp is parallel.tp


def of_ranks(dp: int = 0, cp: int = 0, tp: int = 0) -> Groups:
    """Groups of four that are only asked who this is."""
    connection: Any = object()
    a, b, c = (Group(connection, rank, 4, (0, 1, 2, 3)) for rank in (dp, cp, tp))
    return Groups(Layout(4, 4, 4), c, b, a, a, a)


def test_seeds_are_equal_where_values_are_shared_and_different_elsewhere() -> None:
    ranks = [(dp, cp, tp) for dp in range(2) for cp in range(2) for tp in range(2)]
    seeds = {rank: role_seeds(7, of_ranks(*rank)) for rank in ranks}
    assert len({s.everywhere for s in seeds.values()}) == 1
    assert len({s.replicated for s in seeds.values()}) == 4
    assert all(seeds[dp, cp, 0].replicated == seeds[dp, cp, 1].replicated for dp, cp, _ in ranks)
    assert len({s.sharded for s in seeds.values()}) == 8
    assert role_seeds(8, of_ranks()) != role_seeds(7, of_ranks())
    assert all(0 <= seed < 2**63 for s in seeds.values() for seed in s)
