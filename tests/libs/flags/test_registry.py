"""What a gate may be, and the rules of a set of gates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from libs.flags.registry import (
    Conflict,
    Dependency,
    GateSpec,
    Kind,
    Precondition,
    Stage,
    build_catalog,
    catalog_hash,
)

Make = Callable[..., GateSpec]
RECEIPT = ("infra/receipts/x/receipt.json",)
ON_BY_DEFAULT: dict[str, Any] = {"stage": Stage.DEFAULT_ON, "default": "on", "evidence": RECEIPT}


@pytest.mark.parametrize(
    ("text", "value"),
    [("on", True), ("1", True), ("true", True), ("off", False), ("0", False), ("false", False)],
)
def test_bool_vocabulary(spec: Make, text: str, value: bool) -> None:
    assert spec("g").parse(text) is value


BAD = [
    "yes",
    "no",
    "ON",
    "True",
    "FALSE",
    "",
    " ",
    " on",
    "on ",
    "2",
    "enabled",
    "y",
    "onn",
    "none",
    "None",
    "ön",
]


@pytest.mark.parametrize("text", BAD)
@pytest.mark.parametrize("kind", list(Kind))
def test_closed_vocabulary(spec: Make, kind: Kind, text: str) -> None:
    values = ("off", "on") if kind is Kind.BOOL else ("off", "fwd", "all")
    with pytest.raises(ValueError, match="allowed: off"):
        spec("g", kind=kind, values=values).parse(text)


def test_on_is_a_value_only_where_it_is_listed(spec: Make) -> None:
    enum = spec("g", kind=Kind.ENUM, values=("off", "fwd"))
    for text in ("on", "1", "true"):
        with pytest.raises(ValueError, match="allowed"):
            enum.parse(text)
    assert enum.parse("0") == "off"
    assert spec("h", kind=Kind.ENUM, values=("off", "auto", "on")).parse("1") == "on"


def test_vocabulary_is_what_parse_accepts(spec: Make) -> None:
    for gate in (spec("g"), spec("h", kind=Kind.ENUM, values=("off", "fwd"))):
        for text in gate.vocabulary():
            assert gate.word(gate.parse(text)) in gate.values


def test_stages_include_those_before(spec: Make) -> None:
    gate = spec("g", kind=Kind.STAGES, values=("off", "a", "b", "c"))
    assert [gate.includes("b", wanted) for wanted in ("a", "b", "c", "off")] == [True, True, False, False]
    assert [gate.includes("off", wanted) for wanted in ("a", "off")] == [False, True]
    with pytest.raises(KeyError, match="no value 'd'"):
        gate.includes("b", "d")


def test_an_enum_includes_only_itself(spec: Make) -> None:
    gate = spec("g", kind=Kind.ENUM, values=("off", "fwd", "all"))
    assert not gate.includes("all", "fwd")
    assert gate.includes("all", "all")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"values": ("on", "off")}, "begin with 'off'"),
        ({"values": ()}, "begin with 'off'"),
        ({"values": ("off", "on", "on")}, "do not repeat"),
        ({"values": ("off", "fwd")}, "a bool has"),
        ({"default": "maybe"}, "not among"),
        ({"default": "on"}, "does not fit stage"),
        ({"stage": Stage.DEFAULT_ON, "evidence": RECEIPT}, "does not fit stage"),
        ({"stage": Stage.MEASURED}, "needs evidence"),
        ({"stage": Stage.DEFAULT_ON, "default": "on"}, "needs evidence"),
        ({"stage": Stage.MEASURED, "evidence": ("my word",)}, "path under infra/receipts"),
        ({"stage": Stage.RETIRED, "expiry": None}, "decision record"),
        ({"decision": "infra/decisions/1.md"}, "decision record"),
        ({"stage": Stage.RETIRED, "expiry": None, "decision": "d"}, "no value but off"),
        ({"expiry": None}, "expires"),
        ({"stage": Stage.LOCKED, "default": "on", "evidence": RECEIPT}, "expires"),
        ({"value_stages": {"on": Stage.SCAFFOLD}}, "not the highest"),
        ({"value_stages": {"nope": Stage.SCAFFOLD}}, "no such value"),
        ({"depends_on": (Dependency("nope", "h", ("on",)),)}, "no such value"),
        ({"preconditions": (Precondition("n", "r", "m", lambda v, f: None, ("nope",)),)}, "no such value"),
        ({"name": "Not_Lower"}, "pattern"),
        ({"surprise": 1}, "Extra inputs"),
        ({"owner": ""}, "at least 3"),
    ],
)
def test_a_bad_spec_is_refused(spec: Make, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        spec(**({"name": "g"} | fields))


def test_value_stages_lag_behind(spec: Make) -> None:
    stages = {"b": Stage.SCAFFOLD}
    gate = spec("g", kind=Kind.STAGES, values=("off", "a", "b"), value_stages=stages)
    assert gate.runnable() == ("a",)
    assert gate.stage_of("b") is Stage.SCAFFOLD


def test_unknown_dependency_and_conflict(spec: Make) -> None:
    with pytest.raises(ValueError, match="not in the catalogue"):
        build_catalog([spec("a", depends_on=(Dependency("on", "b", ("on",)),))])
    with pytest.raises(ValueError, match="not in the catalogue"):
        build_catalog([spec("b"), spec("a", depends_on=(Dependency("on", "b", ("most",)),))])
    with pytest.raises(ValueError, match="not another gate"):
        build_catalog([spec("a", conflicts=(Conflict("b", "why"),))])
    with pytest.raises(ValueError, match="not another gate"):
        build_catalog([spec("a", conflicts=(Conflict("a", "why"),))])


@pytest.mark.parametrize("length", [1, 2, 3])
def test_cycles_are_named(spec: Make, length: int) -> None:
    names = ["a", "b", "c"][:length]
    following = [*names[1:], names[0]]
    gates = [spec(n, depends_on=(Dependency("on", m, ("on",)),)) for n, m in zip(names, following, strict=True)]
    with pytest.raises(ValueError, match=" -> ".join([*names, "a"])):
        build_catalog(gates)


def test_default_on_may_not_depend_on_default_off(spec: Make) -> None:
    needs_b = (Dependency("on", "b", ("on",)),)
    with pytest.raises(ValueError, match="on by default and may not depend on b"):
        build_catalog([spec("b"), spec("a", depends_on=needs_b, **ON_BY_DEFAULT)])
    assert list(build_catalog([spec("a", depends_on=needs_b, **ON_BY_DEFAULT), spec("b", **ON_BY_DEFAULT)])) == [
        "b",
        "a",
    ]


def test_contradictions(spec: Make) -> None:
    b_conflict = (Conflict("b", "why"),)
    with pytest.raises(ValueError, match="both depends on and conflicts"):
        build_catalog([spec("b"), spec("a", depends_on=(Dependency("on", "b", ("on",)),), conflicts=b_conflict)])
    with pytest.raises(ValueError, match="both on by default"):
        build_catalog([spec("b", **ON_BY_DEFAULT), spec("a", conflicts=b_conflict, **ON_BY_DEFAULT)])
    with pytest.raises(ValueError, match="two gates are named a"):
        build_catalog([spec("a"), spec("a")])


def test_dependencies_come_first(spec: Make) -> None:
    built = build_catalog([spec("a", depends_on=(Dependency("on", "z", ("on",)),)), spec("m"), spec("z")])
    assert list(built) == ["z", "a", "m"]


def test_a_catalogue_is_read_only(spec: Make) -> None:
    with pytest.raises(TypeError):
        build_catalog([spec("a")])["b"] = spec("b")  # type: ignore[index]


@pytest.mark.parametrize(
    "fields",
    [
        {"summary": "Another summary, long enough."},
        {"owner": "others"},
        {"kind": Kind.ENUM, "values": ("off", "on", "most")},
        {"stage": Stage.SCAFFOLD},
        {"depends_on": (Dependency("on", "b", ("on",)),)},
        {"conflicts": (Conflict("b", "why"),)},
        {"preconditions": (Precondition("n", "r", "m", lambda v, f: None),)},
    ],
)
def test_every_field_is_hashed(spec: Make, fields: dict[str, Any]) -> None:
    assert spec("a", **fields).spec_hash != spec("a").spec_hash
    plain, other = build_catalog([spec("a"), spec("b")]), build_catalog([spec("b"), spec("a", **fields)])
    assert catalog_hash(plain) != catalog_hash(other)
