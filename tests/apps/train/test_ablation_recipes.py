"""The ablation over the pattern changes the pattern: parameters, tokens and every other setting are the same."""

from __future__ import annotations

import itertools

import pytest

from apps.train.config import TrainConfig
from apps.train.origins import recipe_layer, recipe_names, resolve_config
from libs.model import parameter_count
from libs.model.pattern import LayerKind

FAMILY = [name for name in recipe_names() if name.startswith("ablation_pattern_")]


def config(name: str) -> TrainConfig:
    return resolve_config([recipe_layer(name)]).config


def tokens(found: TrainConfig) -> int:
    return found.train.steps * found.train.grad_accumulation * found.data.windows_per_batch * found.data.window


def share(found: TrainConfig) -> float:
    """Attention layers among those that mix tokens."""
    trunk = found.model.layers.trunk
    attention = trunk.count(LayerKind.ATTENTION)
    return attention / (attention + trunk.count(LayerKind.MAMBA))


def test_the_family_is_none_one_in_eight_one_in_four_and_all() -> None:
    assert sorted(share(config(name)) for name in FAMILY) == [0, 1 / 8, 1 / 4, 1]


@pytest.mark.parametrize(("one", "other"), itertools.combinations(FAMILY, 2))
def test_parameters_and_tokens_are_equal(one: str, other: str) -> None:
    first, second = config(one), config(other)
    sizes = [parameter_count(found.model.architecture()).total for found in (first, second)]
    assert abs(sizes[0] - sizes[1]) < 0.005 * min(sizes)
    assert tokens(first) == tokens(second) > 1_000_000


def test_nothing_else_differs() -> None:
    allowed = {"model.preset", "model.name", "model.pattern", "model.mlp.width", "model.mixer", "model.attention"}
    flat = [resolve_config([recipe_layer(name)]) for name in FAMILY]
    values = [_flatten(found.config.to_json()) for found in flat]
    keys = set().union(*values)
    differing = {key for key in keys if len({repr(found.get(key)) for found in values}) > 1}
    assert {key for key in differing if not key.startswith(("model.mixer", "model.attention"))} <= allowed
    # Parts of the model that a pattern does not use are absent; where they are there, they are the same.
    for part in ("mixer", "attention"):
        there = [getattr(found.config.model, part) for found in flat if getattr(found.config.model, part) is not None]
        assert len(there) == 3
        assert all(found == there[0] for found in there)


def _flatten(tree: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
