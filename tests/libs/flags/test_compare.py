"""Ranks that must agree, and a run that resumes with other gates."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from libs.flags.compare import GateChange, agreement, changes, compare_for_resume
from libs.flags.errors import GateRefused, UserError
from libs.flags.facts import Facts
from libs.flags.registry import GateSpec
from libs.flags.resolve import resolve

OFF: dict[str, bool | str] = {"tma": "off", "split_scan": "off", "mtp_speculation": False}


def test_equal_sets_agree() -> None:
    agreement(["h"] * 4, [OFF] * 4)
    agreement(["h"], [OFF])


@pytest.mark.parametrize("odd", [0, 1, 3])
def test_the_odd_rank_and_its_gates_are_named(odd: int) -> None:
    values: list[Mapping[str, bool | str]] = [dict(OFF) for _ in range(4)]
    values[odd] = OFF | {"tma": "fwd", "mtp_speculation": True}
    hashes = ["other" if rank == odd else "h" for rank in range(4)]
    with pytest.raises(GateRefused) as caught:
        agreement(hashes, values)
    assert [refusal.gate for refusal in caught.value.refusals] == ["mtp_speculation", "tma"]
    leader = 1 if odd == 0 else 0
    assert f"rank {odd} has fwd, rank {leader} has off" in str(caught.value)
    assert f"rank {odd} has on, rank {leader} has off" in str(caught.value)
    assert "FATHOM_TMA" in str(caught.value)


def test_several_odd_ranks() -> None:
    values = [OFF, OFF | {"tma": "fwd"}, OFF, OFF | {"tma": "all"}, OFF]
    with pytest.raises(GateRefused) as caught:
        agreement(["h", "x", "h", "y", "h"], values)
    assert "rank 1 has fwd" in str(caught.value)
    assert "rank 3 has all" in str(caught.value)


def test_two_ranks_that_differ() -> None:
    with pytest.raises(GateRefused, match="rank 1 has fwd, rank 0 has off"):
        agreement(["a", "b"], [OFF, OFF | {"tma": "fwd"}])


def test_another_catalogue_is_a_disagreement() -> None:
    with pytest.raises(GateRefused, match="rank 2 has the values of rank 0 but another catalogue"):
        agreement(["h", "h", "x"], [OFF] * 3)


def test_equal_hashes_with_other_values_are_a_disagreement() -> None:
    with pytest.raises(GateRefused, match="rank 1 has fwd"):
        agreement(["h", "h"], [OFF, OFF | {"tma": "fwd"}])


def test_resume_without_changes(working_catalog: Mapping[str, GateSpec]) -> None:
    gates = resolve({"FATHOM_ALPHA": "1"}, Facts(), working_catalog)
    assert compare_for_resume(gates.values(), gates, set()) == ()
    assert compare_for_resume(gates.values(), gates, {"alpha"}) == ()


def test_resume_with_a_change(working_catalog: Mapping[str, GateSpec]) -> None:
    old = resolve({"FATHOM_BETA": "fwd"}, Facts(), working_catalog).values()
    new = resolve({"FATHOM_ALPHA": "1"}, Facts(), working_catalog)
    with pytest.raises(GateRefused) as caught:
        compare_for_resume(old, new, set())
    assert [r.gate for r in caught.value.refusals] == ["alpha", "beta"]
    assert "--accept-gate-change alpha" in str(caught.value)
    assert "written with fwd, this run has off" in str(caught.value)
    with pytest.raises(GateRefused) as caught:
        compare_for_resume(old, new, {"alpha"})
    assert [r.gate for r in caught.value.refusals] == ["beta"]
    accepted = compare_for_resume(old, new, {"alpha", "beta"})
    assert accepted == (GateChange("alpha", False, True), GateChange("beta", "fwd", "off"))
    assert str(accepted[1]) == "beta: fwd -> off"


def test_accepting_a_gate_that_does_not_exist() -> None:
    with pytest.raises(UserError, match="did you mean 'tma'"):
        compare_for_resume(OFF, OFF, {"tmaa"})


def test_a_gate_that_came_or_went() -> None:
    """Off and not yet there are the same behaviour; in force and not there are not."""
    assert changes({}, OFF) == ()
    assert changes(OFF, {}) == ()
    assert changes({}, {"new": "fwd"}) == (GateChange("new", None, "fwd"),)
    with pytest.raises(GateRefused, match="no such gate"):
        compare_for_resume({"gone": True}, {}, set())
    assert compare_for_resume({"gone": True}, {}, {"gone"})
