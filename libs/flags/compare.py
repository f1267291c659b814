"""Two sets of gates side by side: the ranks of one job, and a run against the checkpoint it resumes.

Not for exchanging them: the collectives live in libs.parallel, which hands what it gathered to `agreement`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from libs.flags.catalog import CATALOG
from libs.flags.environment import PREFIX
from libs.flags.errors import GateRefused, Refusal, UserError
from libs.flags.gateset import GateSet
from libs.flags.registry import OFF, GateValue

Values = Mapping[str, GateValue]


class GateChange(NamedTuple):
    """A gate whose value differs. None: the gate did not exist on that side."""

    gate: str
    old: GateValue | None
    new: GateValue | None

    def __str__(self) -> str:
        return f"{self.gate}: {show(self.old)} -> {show(self.new)}"


def show(value: GateValue | None) -> str:
    """A value as a person writes it in the environment."""
    if value is None:
        return "(no such gate)"
    return ("on" if value else "off") if isinstance(value, bool) else value


def changes(old: Values, new: Values) -> tuple[GateChange, ...]:
    """The gates that differ, by name. A gate missing on one side and off on the other is no change."""
    found = (GateChange(gate, old.get(gate), new.get(gate)) for gate in sorted({*old, *new}))
    return tuple(change for change in found if _force(change.old) != _force(change.new))


def compare_for_resume(old: Values, new: GateSet | Values, accepted: set[str]) -> tuple[GateChange, ...]:
    """The changes between a checkpoint's gates and this run's, all of them accepted by name.

    accepted: the gates given to --accept-gate-change. The caller records the result (`record_changes`).

    Raises:
        GateRefused: a change that was not accepted; every one of them.
        UserError: an accepted name that is no gate on either side.
    """
    values = new.values() if isinstance(new, GateSet) else new
    for gate in sorted(accepted):
        if gate not in old and gate not in values:
            raise UserError.unknown("gate after --accept-gate-change", gate, sorted({*old, *values}))
    found = changes(old, values)
    refused = [change for change in found if change.gate not in accepted]
    if refused:
        raise GateRefused(_not_accepted(change) for change in refused)
    return found


def agreement(hashes_by_rank: Sequence[str], values_by_rank: Sequence[Values]) -> None:
    """Check that all ranks resolved one set, namely the one that most ranks have (on a tie, the lowest's).

    Raises:
        GateRefused: names every rank that differs and the gates it differs in.
    """
    assert len(hashes_by_rank) == len(values_by_rank) > 0
    reference = Counter(hashes_by_rank).most_common(1)[0][0]
    leader = hashes_by_rank.index(reference)
    refusals: list[Refusal] = []
    for rank, (digest, values) in enumerate(zip(hashes_by_rank, values_by_rank, strict=True)):
        different = changes(values_by_rank[leader], values)
        for change in different:
            failure = f"rank {rank} has {show(change.new)}, rank {leader} has {show(change.old)}"
            remedy = "give every rank the same environment"
            refusals.append(Refusal(change.gate, _variable(change.gate), show(change.new), (failure,), (remedy,)))
        if digest != reference and not different:
            failure = f"rank {rank} has the values of rank {leader} but another catalogue of gates"
            remedy = "run the same version of fathom on every rank"
            refusals.append(Refusal(None, f"(rank {rank})", digest, (failure,), (remedy,)))
    if refusals:
        raise GateRefused(refusals)


def _force(value: GateValue | None) -> str:
    return OFF if value is None else show(value)


def _variable(gate: str) -> str:
    return CATALOG[gate].variable if gate in CATALOG else PREFIX + gate.upper()


def _not_accepted(change: GateChange) -> Refusal:
    return Refusal(
        change.gate,
        _variable(change.gate),
        show(change.new),
        (f"the checkpoint was written with {show(change.old)}, this run has {show(change.new)}",),
        (
            f"set {_variable(change.gate)}={show(change.old)}, or give --accept-gate-change {change.gate}, "
            "which is recorded",
        ),
    )
