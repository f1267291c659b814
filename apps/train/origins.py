"""Where each setting came from: preset < recipe < --config file < environment < command line.

Not for what a setting means (config.py). Every value is checked on its own, against the type of its field, so
that the error names the key, the value, the place it came from and what was expected.
"""

from __future__ import annotations

import json
import tomllib
import types
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError

from apps.train.config import TrainConfig
from libs.flags.canonical import printable
from libs.flags.environment import CONFIG_PREFIX
from libs.flags.errors import UserError, nearest
from libs.model.presets import PRESETS, preset

PRESET_KEY = "model.preset"


class Setting(NamedTuple):
    """One value as given. `text` tells a string from a shell, still to be parsed, from a typed TOML value."""

    value: object
    origin: str
    text: bool = False


class Resolved(NamedTuple):
    """A whole config and, for each dotted key, the place its value came from."""

    config: TrainConfig
    origins: dict[str, str]


Layer = Mapping[str, Setting]


def leaves(model: type[BaseModel] = TrainConfig, prefix: str = "") -> dict[str, Any]:
    """Every dotted key that can be set, with the annotation of its field (constraints included)."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        inner = _model_inside(field.annotation)
        if inner is not None:
            found.update(leaves(inner, f"{prefix}{name}."))
        else:
            found[f"{prefix}{name}"] = field
    return found


def _model_inside(annotation: Any) -> type[BaseModel] | None:
    options = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    models = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
    return models[0] if models else None


def recipe_names() -> list[str]:
    """Recipes that ship with the package."""
    folder = resources.files("apps.train") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def recipe_layer(name: str) -> Layer:
    """A recipe by name, or by the path of a .toml file."""
    if name.endswith(".toml"):
        return file_layer(Path(name), origin=f"recipe {name}")
    if name not in recipe_names():
        raise UserError(f"unknown recipe {name!r}{_did_you_mean(name, recipe_names())}")
    text = (resources.files("apps.train") / "recipes" / f"{name}.toml").read_text(encoding="utf-8")
    return _toml_layer(text, origin=f"recipe {name}")


def file_layer(path: Path, *, origin: str | None = None) -> Layer:
    """A TOML file of the user's."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} cannot be read: {error}") from error
    return _toml_layer(text, origin=origin or f"file {path}")


def _toml_layer(text: str, *, origin: str) -> Layer:
    try:
        values = _flatten(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{origin} is not valid TOML: {error}") from error
    except RecursionError as error:
        raise UserError(f"{origin} is nested too deeply to be settings, which are [section] and key = value") from error
    return {key: Setting(value, origin) for key, value in values.items()}


def environment_layer(variables: Mapping[str, str]) -> Layer:
    """FATHOM_TRAIN__OPTIM__LR=1e-3 sets optim.lr; every other variable is not for us."""
    chosen = {name: text for name, text in variables.items() if name.startswith(CONFIG_PREFIX)}
    return {
        name.removeprefix(CONFIG_PREFIX).lower().replace("__", "."): Setting(text, f"environment {name}", text=True)
        for name, text in chosen.items()
    }


def command_line_layer(words: Sequence[str]) -> Layer:
    """`--optim.lr 1e-3` and `--optim.lr=1e-3`; anything else is refused."""
    layer: dict[str, Setting] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise UserError(f"unexpected argument {word!r}; a setting is given as --section.key VALUE")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not rest:
                raise UserError(f"--{key} needs a value: --{key} VALUE or --{key}=VALUE")
            text = rest.pop(0)
        if key in layer:
            raise UserError(f"--{key} is given twice: {layer[key].value!r} and {text!r}")
        layer[key] = Setting(text, f"command line --{key}", text=True)
    return layer


def saved_layer(values: Mapping[str, Any], origins: Mapping[str, str]) -> Layer:
    """The settings of an earlier run, each with the origin it had then."""
    return {key: Setting(value, origins.get(key, "saved run")) for key, value in _flatten(values).items()}


def resolve_config(layers: Iterable[Layer]) -> Resolved:
    """Lay later layers over earlier ones, below them the preset, below that the defaults.

    Raises:
        UserError: unknown key, wrong type, or values that do not fit each other.
    """
    known = leaves()
    given: dict[str, Setting] = {}
    for layer in layers:
        for key, setting in layer.items():
            if key not in known and not _is_empty_part(key, setting, known):
                raise UserError(f"unknown setting {key!r} ({setting.origin}){_did_you_mean(key, known)}")
            given[key] = setting
    named = given.get(PRESET_KEY)
    preset_name = str(named.value) if named is not None else str(known[PRESET_KEY].default)
    merged = {**_preset_layer(preset_name), **given}
    parsed = {key: _parse(key, known.get(key), setting) for key, setting in merged.items()}
    config = _validate(_unflatten(parsed))
    final = flat_values(config)
    return Resolved(config, {key: merged[key].origin if key in merged else "default" for key in final})


def describe(resolved: Resolved) -> str:
    """One line per setting: key, value as a shell takes it, origin."""
    values = flat_values(resolved.config)
    shown = {key: "none" if value is None else str(value) for key, value in values.items()}
    widths = max(map(len, shown)), max(map(len, shown.values()))
    return "\n".join(f"{key:<{widths[0]}}  {shown[key]:<{widths[1]}}  {resolved.origins[key]}" for key in shown)


def _preset_layer(name: str) -> Layer:
    if name not in PRESETS:
        raise UserError(f"unknown model.preset {name!r}{_did_you_mean(name, PRESETS)}")
    values = {"model": preset(name).model_dump(mode="json")}
    return {key: Setting(value, f"preset {name}") for key, value in _flatten(values).items()}


def _is_empty_part(key: str, setting: Setting, known: Mapping[str, Any]) -> bool:
    """A whole part of the model that is absent ("model.mlp" = None), as a saved config has it."""
    return setting.value is None and not setting.text and any(name.startswith(f"{key}.") for name in known)


def _parse(key: str, field: Any, setting: Setting) -> object:
    """Check one value against its field. Shell text is converted; a TOML value must have the type already."""
    if field is None:
        return None
    kinds = get_args(field.annotation)
    if setting.value == "none" and type(None) in kinds:
        return None
    adapter: TypeAdapter[Any] = TypeAdapter(field.rebuild_annotation())
    try:
        # Text that is not UTF-8 (a path), from the file of a run that is resumed, is none of pydantic's JSON.
        if setting.text or (isinstance(setting.value, str) and printable(setting.value) != setting.value):
            return adapter.validate_python(_from_text(setting.value, field.annotation))
        return adapter.validate_json(json.dumps(setting.value, default=str), strict=True)
    except ValidationError as error:
        raise UserError(
            f"{key} = {setting.value!r} ({setting.origin}) is not valid: expected {_expected(field)}; "
            f"{error.errors()[0]['msg']}"
        ) from error


def _from_text(text: object, annotation: Any) -> object:
    """A word of a shell as the closed list of values has it: "2" is the number where 2 is allowed."""
    words = {str(value): value for value in get_args(annotation)} if get_origin(annotation) is Literal else {}
    return words.get(str(text), text)


def _expected(field: Any) -> str:
    """The type of a field as a person writes it, with its bounds."""
    options = get_args(field.annotation) if get_origin(field.annotation) in (Union, types.UnionType) else ()
    names = " or ".join(_type_name(option) for option in (options or (field.annotation,)))
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = [f"{sign} {getattr(b, n)}" for b in field.metadata for n, sign in signs.items() if hasattr(b, n)]
    return " ".join([names, ", ".join(bounds)]).strip()


def _type_name(option: Any) -> str:
    if option is type(None):
        return "none"
    if get_origin(option) is Literal:
        return "one of " + ", ".join(repr(value) for value in get_args(option))
    return str(getattr(option, "__name__", option)) if get_origin(option) is None else str(option)


def _validate(tree: Mapping[str, Any]) -> TrainConfig:
    try:
        return TrainConfig.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "config"
        raise UserError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from error


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    names = list(known)
    close = nearest(name, names) or nearest(name.rsplit(".", 1)[-1], [n.rsplit(".", 1)[-1] for n in names])
    if close is not None and close not in names:
        close = next(n for n in names if n.rsplit(".", 1)[-1] == close)
    if close is not None:
        return f"; did you mean {close!r}?"
    return f"; known: {', '.join(sorted(names))}"


def flat_values(config: TrainConfig) -> dict[str, Any]:
    """Dotted key -> JSON value, for every setting."""
    return _flatten(config.to_json())


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key in sorted(flat):  # a part ("model.mlp") comes before its fields ("model.mlp.expand")
        *path, last = key.split(".")
        node = tree
        for name in path:
            if not isinstance(node.get(name), dict):
                node[name] = {}
            node = node[name]
        node[last] = flat[key]
    return tree
