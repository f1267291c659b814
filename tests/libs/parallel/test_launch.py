"""Joining a job and agreeing before step 1, on two gloo processes; and what a single process does not need."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from libs.flags.environment import Launch
from libs.flags.errors import UserError
from libs.parallel.launch import agree, connect
from libs.parallel.mesh import Layout, single
from tests.support import launching
from tests.support.ranks import run_ranks


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(launching.check, Layout(dp=2))


def test_equal_items_are_agreed_on_again_and_again(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["initialised"] and rank["equal"] == rank["again"] == "" for rank in ranks)


def test_a_difference_stops_every_rank_and_names_rank_and_item(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "rank 1 differs in gates: 'hash1', but rank 0 has 'hash0'" in rank["gate"]
        assert "differs in code" not in rank["gate"]
        assert "rank 1 differs in code: missing, but rank 0 has '1'" in rank["missing"]
        assert "remedy: start every rank from the same code" in rank["gate"]


def test_a_rank_that_does_not_come_is_named_in_time(ranks: list[dict[str, Any]]) -> None:
    assert "rank 1 did not answer within 1 s" in ranks[0]["late"]
    assert "rank 0" not in ranks[0]["late"]
    assert ranks[0]["seconds"] < 2.4


def test_one_process_opens_nothing_and_agrees_with_itself() -> None:
    with connect(Layout(), backend="gloo", this=Launch(0, 0, 1, 0)) as groups:
        assert not dist.is_initialized()
        agree(groups, {"gates": "abc"})
    agree(single(), {"gates": "abc"})


def test_one_process_opens_a_group_where_a_library_asks_for_one() -> None:
    with connect(Layout(), backend="gloo", this=Launch(0, 0, 1, 0), even_alone=True) as groups:
        assert dist.get_world_size() == 1
        assert (groups.world.size, groups.dp_cp.process_group, groups.store) == (1, None, None)
        agree(groups, {"gates": "a"})
    assert not dist.is_initialized()


def test_a_layout_is_refused_before_anyone_is_waited_for() -> None:
    with (
        pytest.raises(UserError, match="= 2 processes, but there are 4"),
        connect(Layout(tp=2), backend="gloo", this=Launch(0, 0, 4, 0)),
    ):
        pass


def test_peers_that_never_come_are_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "9")
    with (
        pytest.raises(UserError, match=r"rank 1 of 2 could not join the job within 1 s.*start with torchrun"),
        connect(Layout(tp=2), backend="gloo", timeout=timedelta(seconds=1), this=Launch(1, 1, 2, 0)),
    ):
        pass
