"""What a gate is: its typed values, its stage, what it needs, and the rules that a set of gates must keep.

Not the gates themselves (see `catalog`) and not their values in a process (see `resolve`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from libs.flags.canonical import hash_json
from libs.flags.environment import PREFIX
from libs.flags.facts import Facts

GateValue = bool | str
OFF = "off"
ON = "on"
_OFF_WORDS = frozenset({"off", "0", "false"})
_ON_WORDS = frozenset({"on", "1", "true"})


class Stage(StrEnum):
    """How far a gate has come. See libs/flags/README.md."""

    SCAFFOLD = "scaffold"
    EXPERIMENTAL = "experimental"
    MEASURED = "measured"
    DEFAULT_ON = "default_on"
    LOCKED = "locked"
    RETIRED = "retired"


RISE = (Stage.SCAFFOLD, Stage.EXPERIMENTAL, Stage.MEASURED, Stage.DEFAULT_ON, Stage.LOCKED)
NEEDS_EVIDENCE = frozenset({Stage.MEASURED, Stage.DEFAULT_ON, Stage.LOCKED})
_ON_BY_DEFAULT = frozenset({Stage.DEFAULT_ON, Stage.LOCKED})


class Outcome(StrEnum):
    """What became of a gate: never requested, requested and not honoured (the run stops), in force."""

    OFF = "off"
    REFUSED = "refused"
    ACTIVE = "active"


class Kind(StrEnum):
    """BOOL: off, on. ENUM: one of a list. STAGES: an ordered list; each value includes those before it."""

    BOOL = "bool"
    ENUM = "enum"
    STAGES = "stages"


Check = Callable[[GateValue, Facts], str | None]


class Precondition(NamedTuple):
    """One thing a gate needs. check: None when it holds, else what is the case instead.

    values: the values of the gate that need it; empty means every value but off.
    """

    name: str
    requires: str
    remedy: str
    check: Check
    values: tuple[str, ...] = ()


class Dependency(NamedTuple):
    """`value` of the gate that declares it needs `gate` to have one of `values`."""

    value: str
    gate: str
    values: tuple[str, ...]


class Conflict(NamedTuple):
    """The declaring gate and `gate` cannot both be in force."""

    gate: str
    reason: str


class GateSpec(BaseModel):
    """One gate. values: all of them, `off` first. evidence: receipts under infra/receipts.

    expiry: the version by which the gate has risen a stage or is gone. value_stages: the stages of single
    values that lag behind `stage`, which is the highest of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    name: str = Field(pattern=r"^[a-z][a-z0-9]*(_[a-z0-9]+)*$")
    kind: Kind
    values: tuple[str, ...]
    default: str = OFF
    stage: Stage
    since: str = Field(pattern=r"^\d+\.\d+\.\d+$")
    owner: str = Field(min_length=3)
    summary: str = Field(min_length=20)
    expiry: str | None = Field(default=None, pattern=r"^\d+\.\d+\.\d+$")
    preconditions: tuple[Precondition, ...] = ()
    depends_on: tuple[Dependency, ...] = ()
    conflicts: tuple[Conflict, ...] = ()
    evidence: tuple[str, ...] = ()
    decision: str | None = None
    value_stages: Mapping[str, Stage] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _values_fit_kind(self) -> GateSpec:
        if not self.values or self.values[0] != OFF or len(set(self.values)) != len(self.values):
            raise ValueError(f"{self.name}: values begin with 'off' and do not repeat, got {self.values}")
        if self.kind is Kind.BOOL and self.values != (OFF, ON):
            raise ValueError(f"{self.name}: a bool has the values off, on, got {self.values}")
        if self.default not in self.values:
            raise ValueError(f"{self.name}: default {self.default!r} is not among {self.values}")
        named = {v for p in self.preconditions for v in p.values} | {d.value for d in self.depends_on}
        unknown = sorted((named | set(self.value_stages)) - set(self.values[1:]))
        if unknown:
            raise ValueError(f"{self.name}: no such value to ask for: {unknown}")
        return self

    @model_validator(mode="after")
    def _stage_fits_fields(self) -> GateSpec:
        if (self.default != OFF) != (self.stage in _ON_BY_DEFAULT):
            raise ValueError(f"{self.name}: default {self.default!r} does not fit stage {self.stage}")
        if self.stage in NEEDS_EVIDENCE and not self.evidence:
            raise ValueError(f"{self.name}: stage {self.stage} needs evidence, a receipt in infra/receipts/")
        if any(not path.startswith("infra/receipts/") for path in self.evidence):
            raise ValueError(f"{self.name}: evidence is a path under infra/receipts/, got {self.evidence}")
        if (self.stage is Stage.RETIRED) != (self.decision is not None):
            raise ValueError(f"{self.name}: exactly the retired gates name a decision record")
        if self.stage is Stage.RETIRED and self.values != (OFF,):
            raise ValueError(f"{self.name}: a retired gate has no value but off, got {self.values}")
        if (self.stage in {Stage.RETIRED, Stage.LOCKED}) == (self.expiry is not None):
            raise ValueError(f"{self.name}: a gate expires unless it is retired or locked")
        if self.value_stages:
            stages = [self.stage_of(value) for value in self.values[1:]]
            if any(stage not in RISE for stage in stages) or max(stages, key=RISE.index) is not self.stage:
                raise ValueError(f"{self.name}: stage {self.stage} is not the highest of its values' stages")
        return self

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()

    @property
    def spec_hash(self) -> str:
        return hash_json(self.describe())

    def encode(self, word: str) -> GateValue:
        """A word of `values` as the typed value: a bool for BOOL, the word itself otherwise."""
        assert word in self.values, (self.name, word)
        return word == ON if self.kind is Kind.BOOL else word

    def word(self, value: GateValue) -> str:
        """The inverse of `encode`."""
        word = (ON if value else OFF) if isinstance(value, bool) else value
        assert word in self.values, (self.name, value)
        return word

    def parse(self, text: str) -> GateValue:
        """The typed value of a variable's text.

        Raises:
            ValueError: outside the closed vocabulary; the message shows all of it.
        """
        word = OFF if text in _OFF_WORDS else ON if text in _ON_WORDS else text
        if word not in self.values:
            raise ValueError(f"{text!r} is not a value of {self.variable}; allowed: {', '.join(self.vocabulary())}")
        return self.encode(word)

    def vocabulary(self) -> tuple[str, ...]:
        """Every text that `parse` accepts."""
        synonyms = [*sorted(_OFF_WORDS - {OFF}), *(sorted(_ON_WORDS - {ON}) if ON in self.values else [])]
        return (*self.values, *synonyms)

    def includes(self, value: GateValue, wanted: str) -> bool:
        """Whether `value` brings `wanted` with it: equal, or, for STAGES, at or above it in the order."""
        word = self.word(value)
        if wanted not in self.values:
            raise KeyError(f"{self.name} has no value {wanted!r}; it has {', '.join(self.values)}")
        if self.kind is Kind.STAGES and wanted != OFF:
            return self.values.index(word) >= self.values.index(wanted)
        return word == wanted

    def stage_of(self, word: str) -> Stage:
        return self.value_stages.get(word, self.stage)

    def runnable(self) -> tuple[str, ...]:
        """The values other than off whose implementation exists."""
        return tuple(word for word in self.values[1:] if self.stage_of(word) is not Stage.SCAFFOLD)

    def describe(self) -> dict[str, Any]:
        """The gate as JSON, which is also what its hash covers."""
        plain = self.model_dump(mode="json", exclude={"preconditions", "depends_on", "conflicts", "value_stages"})
        return plain | {
            "variable": self.variable,
            "value_stages": {word: str(self.stage_of(word)) for word in self.values[1:]},
            "preconditions": [
                {"name": p.name, "requires": p.requires, "remedy": p.remedy, "values": list(p.values)}
                for p in self.preconditions
            ],
            "depends_on": [{"value": d.value, "gate": d.gate, "values": list(d.values)} for d in self.depends_on],
            "conflicts": [{"gate": c.gate, "reason": c.reason} for c in self.conflicts],
        }


def build_catalog(specs: Iterable[GateSpec]) -> Mapping[str, GateSpec]:
    """A read-only catalogue, in an order in which every gate follows the gates it depends on.

    Raises:
        ValueError: a repeated name, an unknown gate or value in a dependency or conflict, a cycle (with its
            path), a default that needs what is off by default, a conflict of defaults or with a dependency.
    """
    by_name: dict[str, GateSpec] = {}
    for spec in specs:
        if spec.name in by_name:
            raise ValueError(f"two gates are named {spec.name}")
        by_name[spec.name] = spec
    for spec in by_name.values():
        _check_references(spec, by_name)
    ordered: dict[str, GateSpec] = {}
    for name in by_name:
        _visit(name, by_name, ordered, path=())
    return MappingProxyType(ordered)


def catalog_hash(catalog: Mapping[str, GateSpec]) -> str:
    return hash_json({name: spec.spec_hash for name, spec in catalog.items()})


def _check_references(spec: GateSpec, by_name: Mapping[str, GateSpec]) -> None:
    for needed in spec.depends_on:
        other = by_name.get(needed.gate)
        if other is None or not set(needed.values) <= set(other.values):
            raise ValueError(f"{spec.name} depends on {needed.gate}={'|'.join(needed.values)}: not in the catalogue")
        if spec.default == needed.value and other.default not in needed.values:
            raise ValueError(
                f"{spec.name} is on by default and may not depend on {other.name}, which is off by default"
            )
    for conflict in spec.conflicts:
        other = by_name.get(conflict.gate)
        if other is None or other is spec:
            raise ValueError(f"{spec.name} conflicts with {conflict.gate}, which is not another gate of the catalogue")
        if any(needed.gate == other.name for needed in spec.depends_on):
            raise ValueError(f"{spec.name} both depends on and conflicts with {other.name}")
        if spec.default != OFF and other.default != OFF:
            raise ValueError(f"{spec.name} and {other.name} conflict and are both on by default")


def _visit(name: str, by_name: Mapping[str, GateSpec], ordered: dict[str, GateSpec], path: tuple[str, ...]) -> None:
    if name in ordered:
        return
    if name in path:
        raise ValueError(f"gates depend on each other in a circle: {' -> '.join((*path[path.index(name) :], name))}")
    for needed in by_name[name].depends_on:
        _visit(needed.gate, by_name, ordered, (*path, name))
    ordered[name] = by_name[name]
