"""From an environment and facts to a frozen `GateSet`, or to one `GateRefused` that holds every refusal.

Not a reader of the environment (see `environment`): the variables come in as a mapping; this is pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, create_model
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from libs.flags.catalog import CATALOG
from libs.flags.environment import CONFIG_PREFIX, PREFIX, REDACTED, names_a_secret
from libs.flags.errors import GateRefused, Refusal, nearest
from libs.flags.facts import Facts
from libs.flags.gateset import GateSet, Resolution
from libs.flags.registry import GateSpec, GateValue, Outcome, Stage

Catalog = Mapping[str, GateSpec]


class _Variables(PydanticBaseSettingsSource):
    """A settings source over a given mapping."""

    def __init__(self, settings: type[BaseSettings], variables: Mapping[str, str]) -> None:
        super().__init__(settings)
        self._variables = variables

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        name = field.alias or field_name
        return self._variables.get(name), name, False

    def __call__(self) -> dict[str, Any]:
        return dict(self._variables)


def gate_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Those that the gates answer for: FATHOM_ in any case, less the overrides of the training config."""
    return {
        name: value
        for name, value in environ.items()
        if name.upper().startswith(PREFIX) and not name.startswith(CONFIG_PREFIX)
    }


def resolve(environ: Mapping[str, str], facts: Facts, catalog: Catalog = CATALOG) -> GateSet:
    """Resolve every gate.

    Raises:
        GateRefused: any unknown FATHOM_ variable, value outside the vocabulary, or requested gate that cannot
            be honoured; all of them together.
    """
    variables = gate_variables(environ)
    values, refusals = _typed(variables, catalog)
    refused = {refusal.gate for refusal in refusals if refusal.gate is not None}
    resolutions: list[Resolution] = []
    for name, spec in catalog.items():
        if name in refused:
            continue
        failures, remedies = _failures(spec, values, facts, catalog, refused)
        if failures:
            text = variables.get(spec.variable, spec.default)
            refusals.append(Refusal(name, spec.variable, text, tuple(failures), tuple(remedies)))
            refused.add(name)
            continue
        resolutions.append(_resolution(spec, values[name], requested=spec.variable in variables))
    if refusals:
        raise GateRefused(refusals)
    return GateSet(tuple(resolutions), catalog)


def _typed(variables: Mapping[str, str], catalog: Catalog) -> tuple[dict[str, GateValue], list[Refusal]]:
    """The typed value of each gate (the default if its text is refused); refusals of texts and names."""
    values: dict[str, GateValue] = {name: spec.encode(spec.default) for name, spec in catalog.items()}
    refusals: list[Refusal] = []
    by_variable = {spec.variable: spec for spec in catalog.values()}
    retired = [v for v in variables if v in by_variable and by_variable[v].stage is Stage.RETIRED]
    for variable in retired:
        # A retired gate answers for itself: its decision record says more than its vocabulary.
        if variables[variable] not in by_variable[variable].vocabulary():
            refusals.append(_retired(by_variable[variable], variables[variable]))
    asked = {name: text for name, text in variables.items() if name in by_variable and name not in retired}
    try:
        settings = _settings(asked, catalog)
    except ValidationError as error:
        refusals += [_refused_text(str(e["loc"][0]), asked, by_variable) for e in error.errors()]
        refused = {refusal.variable for refusal in refusals}
        settings = _settings({n: t for n, t in asked.items() if n not in refused}, catalog)
    # Not left to the model: it cannot say which one it refused where a name is not UTF-8.
    refusals += [_refused_text(name, variables, by_variable) for name in variables if name not in by_variable]
    values |= {name: getattr(settings, name) for name in catalog}
    return values, refusals


def _settings(variables: Mapping[str, str], catalog: Catalog) -> BaseSettings:
    class Gates(BaseSettings):
        model_config = SettingsConfigDict(extra="forbid", frozen=True, case_sensitive=True)

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (_Variables(settings_cls, variables),)

    fields: dict[str, Any] = {
        name: (
            Annotated[GateValue, BeforeValidator(spec.parse)],
            Field(default=spec.default, alias=spec.variable),
        )
        for name, spec in catalog.items()
    }
    return create_model("Gates", __base__=Gates, **fields)()


def _refused_text(variable: str, variables: Mapping[str, str], by_variable: Mapping[str, GateSpec]) -> Refusal:
    """The refusal for a variable that names no gate or whose text is outside its gate's vocabulary."""
    text = REDACTED if names_a_secret(variable) else variables[variable]
    spec = by_variable.get(variable)
    if spec is not None:
        allowed = ", ".join(spec.vocabulary())
        failure = f"{text!r} is not a value of {variable}; allowed: {allowed}"
        return Refusal(spec.name, variable, text, (failure,), (f"set one of: {allowed}",))
    close = nearest(variable, by_variable)
    known = f"the nearest known name is {close}" if close else f"known: {', '.join(by_variable)}"
    failure = f"{variable} is not a variable of fathom; {known}"
    remedy = f"rename it to {close}, or unset it" if close else "unset it"
    return Refusal(None, variable, text, (failure,), (remedy,))


def _retired(spec: GateSpec, text: str) -> Refusal:
    return Refusal(
        spec.name,
        spec.variable,
        text,
        (f"retired: tried and rejected, see {spec.decision}",),
        (f"unset {spec.variable}; the decision record says why",),
    )


def _failures(
    spec: GateSpec, values: Mapping[str, GateValue], facts: Facts, catalog: Catalog, refused: set[str]
) -> tuple[list[str], list[str]]:
    """Everything that keeps `spec` from having its value, with a remedy for each kind."""
    word = spec.word(values[spec.name])
    if word == spec.values[0]:
        if spec.stage is Stage.LOCKED:
            return [f"locked: it has been {spec.default} since it graduated"], [f"unset {spec.variable}"]
        return [], []
    failures: list[str] = []
    remedies: list[str] = []
    if spec.stage_of(word) is Stage.SCAFFOLD:
        failures.append(
            f"scaffold: {word} is not implemented yet (implemented: {', '.join(spec.runnable()) or 'none'})"
        )
        remedies.append(f"unset {spec.variable}, or wait for the gate to become experimental")
    for needed in spec.preconditions:
        if not needed.values or word in needed.values:
            failure = needed.check(values[spec.name], facts)
            if failure is not None:
                failures.append(failure)
                remedies.append(needed.remedy)
    for dependency in spec.depends_on:
        other = catalog[dependency.gate]
        have = other.word(values[other.name])
        # Dependencies come first in a catalogue, so whether this one was refused is known by now.
        if dependency.value == word and (other.name in refused or have not in dependency.values):
            wanted = " or ".join(dependency.values)
            shown = "refused" if other.name in refused else have
            failures.append(f"needs gate {other.name} to be {wanted}, it is {shown}")
            remedies.append(f"set {other.variable} to {wanted}")
    for name, reason in _conflicts(spec, values, catalog):
        failures.append(f"conflicts with gate {name}: {reason}")
        remedies.append(f"unset {spec.variable} or {catalog[name].variable}")
    return failures, list(dict.fromkeys(remedies))


def _conflicts(spec: GateSpec, values: Mapping[str, GateValue], catalog: Catalog) -> list[tuple[str, str]]:
    """The gates in force that conflict with `spec`, whichever of the two declares it."""
    found = [(conflict.gate, conflict.reason) for conflict in spec.conflicts]
    found += [(o.name, c.reason) for o in catalog.values() for c in o.conflicts if c.gate == spec.name]
    return [(name, why) for name, why in found if catalog[name].word(values[name]) != catalog[name].values[0]]


def _resolution(spec: GateSpec, value: GateValue, *, requested: bool) -> Resolution:
    active = spec.word(value) != spec.values[0]
    if active:
        held = ", ".join(p.requires for p in spec.preconditions if not p.values or spec.word(value) in p.values)
        reason = f"{'requested' if requested else 'on by default'}; holds: {held or 'no preconditions'}"
    else:
        reason = "asked to be off" if requested else "never requested"
    return Resolution(
        gate=spec.name,
        variable=spec.variable,
        value=value,
        default=spec.encode(spec.default),
        stage=spec.stage,
        outcome=Outcome.ACTIVE if active else Outcome.OFF,
        reason=reason,
        source="environment" if requested else "default",
        spec_hash=spec.spec_hash,
    )
