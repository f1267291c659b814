"""From variables to a frozen set, or to one refusal that names everything."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.flags.catalog import CATALOG
from libs.flags.errors import GateRefused, UserError
from libs.flags.facts import Facts
from libs.flags.registry import Conflict, Dependency, GateSpec, Outcome, Precondition, Stage, build_catalog
from libs.flags.resolve import resolve

Catalog = Mapping[str, GateSpec]
Make = Callable[..., GateSpec]


def _refused(environ: Mapping[str, str], catalog: Catalog = CATALOG, facts: Facts | None = None) -> GateRefused:
    with pytest.raises(GateRefused) as caught:
        resolve(environ, facts or Facts(), catalog)
    return caught.value


def test_nothing_requested() -> None:
    gates = resolve({}, Facts())
    assert {r.outcome for r in gates.resolutions} == {Outcome.OFF}
    assert {r.source for r in gates.resolutions} == {"default"}
    assert {r.reason for r in gates.resolutions} == {"never requested"}
    assert list(gates.values()) == list(CATALOG)


@pytest.mark.parametrize("text", ["off", "0", "false"])
def test_asking_for_off_is_allowed_everywhere(text: str) -> None:
    gates = resolve({spec.variable: text for spec in CATALOG.values()}, Facts())
    assert not any(gates.is_enabled(gate) for gate in CATALOG)
    assert {r.source for r in gates.resolutions} == {"environment"}
    assert gates.hash == resolve({}, Facts()).hash


@pytest.mark.parametrize("gate", [name for name, spec in CATALOG.items() if spec.stage is not Stage.RETIRED])
@pytest.mark.parametrize("text", ["yes", "no", "ON", "True", "", " off", "2", "enabled", "off,on", "none"])
def test_bad_vocabulary(gate: str, text: str) -> None:
    error = _refused({CATALOG[gate].variable: text})
    (refusal,) = error.refusals
    assert (refusal.gate, refusal.value) == (gate, text)
    assert repr(text) in str(error)
    for word in CATALOG[gate].vocabulary():
        assert word in str(error)


@given(st.text(max_size=12))
def test_no_text_is_taken_for_a_value(text: str) -> None:
    """Whatever is outside the vocabulary refuses; nothing but off comes out where no backend is known."""
    spec = CATALOG["psiv_cache"]
    if text in ("off", "0", "false"):
        assert resolve({spec.variable: text}, Facts()).value("psiv_cache") == "off"
    else:
        _refused({spec.variable: text})


@pytest.mark.parametrize(
    ("variable", "near"),
    [
        ("FATHOM_PSVI_CACHE", "FATHOM_PSIV_CACHE"),
        ("fathom_tma", "FATHOM_TMA"),
        ("Fathom_Split_Scan", "FATHOM_SPLIT_SCAN"),
        ("FATHOM_PREFIXCACHE", "FATHOM_PREFIX_CACHE"),
        ("FATHOM_TMA_", "FATHOM_TMA"),
    ],
)
def test_unknown_variable_names_the_nearest(variable: str, near: str) -> None:
    (refusal,) = _refused({variable: "off"}).refusals
    assert refusal.gate is None
    assert near in refusal.failures[0]
    assert near in refusal.remedies[0]


def test_unknown_variable_without_a_near_name_lists_all() -> None:
    text = str(_refused({"FATHOM_ZZZZZZZZZZZZZZZZ": "1"}))
    assert all(spec.variable in text for spec in CATALOG.values())


def test_unknown_variable_that_names_a_secret_is_not_shown() -> None:
    assert "hunter2" not in str(_refused({"FATHOM_API_KEY": "hunter2"}))


def test_config_overrides_are_not_gates() -> None:
    assert resolve({"FATHOM_TRAIN__OPTIM__LR": "anything"}, Facts()).hash == resolve({}, Facts()).hash
    for not_quite in ("FATHOM_TRAIN", "FATHOM_TRAIN_X", "fathom_train__x", "FATHOM_EVAL__X"):
        _refused({not_quite: "1"})


def test_other_variables_are_ignored() -> None:
    resolve({"PATH": "x", "tma": "fwd", "TMA": "fwd", "psiv_cache": "yes", "XFATHOM_TMA": "fwd"}, Facts())


def test_all_refusals_come_together() -> None:
    environ = {
        "FATHOM_PSIV_CACHE": "yes",
        "FATHOM_PSVI_CACHE": "off",
        "FATHOM_TMA": "fwd",
        "FATHOM_CUTE_DSL": "on",
        "FATHOM_MTP_SPECULATION": "1",
        "FATHOM_SPLIT_SCAN": "off",
    }
    error = _refused(environ)
    assert sorted(refusal.variable for refusal in error.refusals) == sorted(set(environ) - {"FATHOM_SPLIT_SCAN"})


def test_psiv_refusal_names_the_stages_of_the_backend() -> None:
    facts = Facts(mimo_backend="chunked")
    text = str(_refused({"FATHOM_PSIV_CACHE": "bwd_fwd_reuse"}, facts=facts))
    assert "backend chunked has no stage bwd_fwd_reuse; the stages it has: none" in text
    facts = Facts(mimo_backend="sm90", psiv_stages=("python_precompute", "gmem_pool"))
    text = str(_refused({"FATHOM_PSIV_CACHE": "bwd_fwd_reuse"}, facts=facts))
    assert "the stages it has: python_precompute, gmem_pool" in text


def test_active(working_catalog: Catalog) -> None:
    environ = {"FATHOM_ALPHA": "true", "FATHOM_BETA": "fwd", "FATHOM_GAMMA": "second"}
    gates = resolve(environ, Facts(), working_catalog)
    assert gates.values() == {"alpha": True, "beta": "fwd", "gamma": "second"}
    assert all(gates.is_enabled(gate) for gate in working_catalog)
    assert gates["alpha"].outcome is Outcome.ACTIVE
    assert gates["alpha"].source == "environment"
    assert (gates.includes("gamma", "first"), gates.includes("gamma", "third")) == (True, False)
    row = gates.summary()[0]
    assert row["gate"] == "alpha"
    assert row["value"] is True
    assert row["outcome"] == "active"
    with pytest.raises(UserError, match="did you mean 'alpha'"):
        gates.value("alpa")


def test_hash_follows_values_and_catalogue(working_catalog: Catalog) -> None:
    plain = resolve({}, Facts(), working_catalog)
    assert resolve({"FATHOM_ALPHA": "1"}, Facts(), working_catalog).hash != plain.hash
    assert resolve({"FATHOM_ALPHA": "0"}, Facts(device="cuda"), working_catalog).hash == plain.hash
    changed = working_catalog["alpha"].model_copy(update={"summary": "Another meaning of the same name."})
    other = build_catalog([changed, working_catalog["beta"], working_catalog["gamma"]])
    assert resolve({}, Facts(), other).values() == plain.values()
    assert resolve({}, Facts(), other).hash != plain.hash


def test_a_set_is_frozen(working_catalog: Catalog) -> None:
    gates = resolve({}, Facts(), working_catalog)
    with pytest.raises(AttributeError, match="frozen"):
        gates.hash = "x"
    gates.values()["alpha"] = True
    gates.summary()[0]["value"] = True
    assert gates.value("alpha") is False


def test_scaffold_by_value(spec: Make) -> None:
    fields = {"kind": "stages", "values": ("off", "a", "b"), "value_stages": {"b": Stage.SCAFFOLD}}
    catalog = build_catalog([spec("g", **fields)])
    assert resolve({"FATHOM_G": "a"}, Facts(), catalog).value("g") == "a"
    assert "b is not implemented yet (implemented: a)" in str(_refused({"FATHOM_G": "b"}, catalog))


def test_preconditions_by_value(spec: Make) -> None:
    broken = Precondition("p", "r", "mend it", lambda _v, _f: "broken", values=("all",))
    catalog = build_catalog([spec("g", kind="enum", values=("off", "fwd", "all"), preconditions=(broken,))])
    assert resolve({"FATHOM_G": "fwd"}, Facts(), catalog).is_enabled("g")
    (refusal,) = _refused({"FATHOM_G": "all"}, catalog).refusals
    assert (refusal.failures, refusal.remedies) == (("broken",), ("mend it",))


def test_dependencies(spec: Make) -> None:
    catalog = build_catalog([spec("a", depends_on=(Dependency("on", "z", ("on",)),)), spec("z")])
    assert resolve({"FATHOM_A": "on", "FATHOM_Z": "on"}, Facts(), catalog).is_enabled("a")
    assert "needs gate z to be on, it is off" in str(_refused({"FATHOM_A": "on"}, catalog))
    # A dependency that has the value but is refused itself does not hold.
    broken = Precondition("p", "r", "mend it", lambda _v, _f: "broken")
    weak = build_catalog([catalog["a"], spec("z", preconditions=(broken,))])
    assert "it is refused" in str(_refused({"FATHOM_A": "on", "FATHOM_Z": "on"}, weak))
    # A dependency whose own text is refused counts as refused, not as the default.
    error = _refused({"FATHOM_A": "on", "FATHOM_Z": "yes"}, catalog)
    assert {r.gate for r in error.refusals} == {"a", "z"}
    assert "it is refused" in str(error)


@pytest.mark.parametrize("declared_by", ["a", "b"])
def test_conflicts_hold_both_ways(spec: Make, declared_by: str) -> None:
    other = {"a": "b", "b": "a"}[declared_by]
    declares = {"conflicts": (Conflict(other, "one buffer"),)}
    catalog = build_catalog([spec(name, **(declares if name == declared_by else {})) for name in ("a", "b")])
    error = _refused({"FATHOM_A": "on", "FATHOM_B": "on"}, catalog)
    assert {r.gate for r in error.refusals} == {"a", "b"}
    assert "one buffer" in str(error)
    assert resolve({"FATHOM_A": "on"}, Facts(), catalog).is_enabled("a")


def test_default_on(spec: Make) -> None:
    fields = {"stage": Stage.DEFAULT_ON, "default": "on", "evidence": ("infra/receipts/r.json",)}
    needs_gpu = Precondition("gpu", "a gpu", "buy", lambda _v, f: None if f.device == "cuda" else "no gpu")
    catalog = build_catalog([spec("a", preconditions=(needs_gpu,), **fields)])
    gates = resolve({}, Facts(device="cuda"), catalog)
    assert gates["a"].source == "default"
    assert gates.is_enabled("a")
    assert "no gpu" in str(_refused({}, catalog))
    assert not resolve({"FATHOM_A": "off"}, Facts(), catalog).is_enabled("a")


def test_locked_cannot_be_switched_off(spec: Make) -> None:
    fields = {"stage": Stage.LOCKED, "default": "on", "evidence": ("infra/receipts/r.json",), "expiry": None}
    catalog = build_catalog([spec("a", **fields)])
    assert resolve({}, Facts(), catalog).is_enabled("a")
    assert resolve({"FATHOM_A": "1"}, Facts(), catalog).is_enabled("a")
    assert "locked" in str(_refused({"FATHOM_A": "off"}, catalog))
