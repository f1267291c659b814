"""The outcome of a resolution: every gate with its value, frozen and hashed.

Not for resolving (see `resolve`) and not for what a process has in force (see `installed`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from libs.flags.canonical import hash_json
from libs.flags.errors import UserError
from libs.flags.registry import GateSpec, GateValue, Outcome, Stage, catalog_hash


class Resolution(NamedTuple):
    """One gate. source: "default" or "environment". reason: why it has this outcome."""

    gate: str
    variable: str
    value: GateValue
    default: GateValue
    stage: Stage
    outcome: Outcome
    reason: str
    source: str
    spec_hash: str


class GateSet:
    """All gates of a process, in the order of the catalogue. Two sets are equal when their hashes are.

    hash: SHA-256 over every value and over the catalogue's own hash.
    """

    __slots__ = ("_catalog", "_resolutions", "hash")

    def __init__(self, resolutions: tuple[Resolution, ...], catalog: Mapping[str, GateSpec]) -> None:
        assert [r.gate for r in resolutions] == list(catalog)
        assert all(r.outcome is not Outcome.REFUSED for r in resolutions), "a refused set is a GateRefused"
        values = {r.gate: r.value for r in resolutions}
        object.__setattr__(self, "_resolutions", resolutions)
        object.__setattr__(self, "_catalog", catalog)
        object.__setattr__(self, "hash", hash_json({"values": values, "catalog": catalog_hash(catalog)}))

    hash: str
    _resolutions: tuple[Resolution, ...]
    _catalog: Mapping[str, GateSpec]

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a gate set is frozen: cannot set {name}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GateSet) and other.hash == self.hash

    def __hash__(self) -> int:
        return hash(self.hash)

    @property
    def resolutions(self) -> tuple[Resolution, ...]:
        return self._resolutions

    def __getitem__(self, gate: str) -> Resolution:
        for resolution in self._resolutions:
            if resolution.gate == gate:
                return resolution
        raise UserError.unknown("gate", gate, self._catalog)

    def spec(self, gate: str) -> GateSpec:
        return self._catalog[self[gate].gate]

    def value(self, gate: str) -> GateValue:
        """The typed value: a bool, or a word of the gate's list. Raises UserError for an unknown gate."""
        return self[gate].value

    def is_enabled(self, gate: str) -> bool:
        return self[gate].outcome is Outcome.ACTIVE

    def includes(self, gate: str, wanted: str) -> bool:
        """Whether the value brings `wanted` with it (for psiv_cache: `wanted` or a later stage)."""
        return self.spec(gate).includes(self[gate].value, wanted)

    def values(self) -> dict[str, GateValue]:
        """Gate -> value: what a checkpoint, a result and a receipt hold beside the hash."""
        return {r.gate: r.value for r in self._resolutions}

    def summary(self) -> list[dict[str, Any]]:
        """One JSON row per gate: gate, variable, value, default, stage, outcome, reason, source."""
        rows = [r._asdict() for r in self._resolutions]
        for row in rows:
            del row["spec_hash"]
            row["stage"], row["outcome"] = str(row["stage"]), str(row["outcome"])
        return rows
