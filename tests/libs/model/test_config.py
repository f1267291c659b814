"""Configs refuse what cannot be built, and the refusal shows numbers and legal alternatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from libs.flags.errors import UserError
from libs.model import MixerConfig, ModelConfig, preset
from libs.model.pattern import LayerKind, parse_pattern

Make = Callable[..., ModelConfig]


def test_pattern_parses_trunk_and_depths() -> None:
    pattern = parse_pattern("M-*E/*-/M")
    assert pattern.trunk == (LayerKind.MAMBA, LayerKind.MLP, LayerKind.ATTENTION, LayerKind.MOE)
    assert pattern.mtp == ((LayerKind.ATTENTION, LayerKind.MLP), (LayerKind.MAMBA,))
    assert str(pattern) == "M-*E/*-/M"
    assert parse_pattern("M").mtp == ()


@pytest.mark.parametrize(
    ("text", "position", "problem"),
    [
        ("M-x-", 2, "unknown layer 'x'"),
        ("M m", 1, "unknown layer ' '"),
        ("", 0, "empty"),
        ("/M", 0, "nothing before"),
        ("M//M", 2, "nothing before"),
        ("M-/", 3, "nothing after"),
        ("M/M/M/M", 5, "more than 2 MTP"),
    ],
)
def test_pattern_error_points_at_the_place(text: str, position: int, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_pattern(text)
    lines = str(caught.value).splitlines()
    assert problem in lines[0]
    assert f"position {position}" in lines[0]
    assert lines[1] == f"  {text}"
    assert lines[2] == "  " + " " * position + "^"
    assert "'M' mamba" in lines[3]


def test_moe_parses_but_is_refused_with_its_place(config_with: Make) -> None:
    with pytest.raises(UserError, match=r"(?s)not built yet at position 2.*M-E-\n {4}\^"):
        config_with("M-E-")


def test_geometry_error_shows_all_numbers_and_what_would_be_legal(config_with: Make) -> None:
    with pytest.raises(UserError) as caught:
        config_with(mixer__nheads=8)
    message = str(caught.value)
    for shown in ("hidden_size=32", "expand=2", "headdim=16", "nheads=8", "nheads*headdim = 128", "= 64"):
        assert shown in message
    alternatives = message.split("to be legal: ")[1]
    assert alternatives == "nheads=4, headdim=8, expand=4, hidden_size=64"
    for alternative in (
        {"mixer__nheads": 4},
        {"mixer__headdim": 8},
        {"mixer__expand": 4},
        {"hidden_size": 64},
    ):
        config_with(**{"mixer__nheads": 8, **alternative})


def test_geometry_offers_only_whole_numbers(config_with: Make) -> None:
    with pytest.raises(UserError, match=r"to be legal: nheads=4, hidden_size=40$"):
        config_with(mixer__nheads=5, hidden_size=32, mixer__headdim=16, mixer__expand=2, pattern="M")
    with pytest.raises(UserError, match=r"= 19\.2 .*no single change is enough"):
        config_with(mixer__nheads=7, mixer__headdim=5, hidden_size=32, mixer__expand=3, pattern="M")


def test_geometry_is_checked_by_the_constructor_too() -> None:
    data = preset("cpu_tiny").model_dump()
    with pytest.raises(ValidationError, match="geometry"):
        ModelConfig(**{**data, "hidden_size": 48})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixer__ngroups": 3}, "nheads=4 is not a multiple of ngroups=3"),
        ({"mixer__d_state": 18}, "d_state=18 is not a multiple of 4"),
        ({"mixer__mimo_rank": 3}, r"mimo_rank.*\(got 3\)"),
        ({"mixer__rotary_dim_divisor": 3}, r"rotary_dim_divisor.*\(got 3\)"),
        ({"mixer__chunk_size": 512}, r"512\*2 = 1024 rows.*chunk_size <= 128"),
        ({"mixer__dt_min": 0.5}, r"dt_min=0\.5"),
        ({"mixer__a_activation": "relu"}, r"a_activation.*'softplus' or 'heavy_tail' \(got 'relu'\)"),
        ({"attention__kv_heads": 3}, "nheads=4 is not a multiple of kv_heads=3"),
        ({"attention__head_dim": 7}, "head_dim=7 must be even"),
        ({"mlp__width": 0}, r"mlp\.width.*\(got 0\)"),
        ({"mixer__head_dim": 16}, r"mixer\.head_dim: Extra inputs"),
        ({"vocab_size": "many"}, r"vocab_size: .*\(got 'many'\)"),
        ({"mlp": None}, r"uses '-' but `mlp` is not given"),
        ({"norm_eps": float("nan")}, "norm_eps"),
    ],
)
def test_refusals_show_the_value(config_with: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_with(**changes)


def test_config_is_frozen_and_round_trips() -> None:
    config = preset("cpu_demo")
    with pytest.raises(ValidationError):
        config.hidden_size = 7  # type: ignore[misc]
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config


def test_identity_leaves_out_only_what_does_not_change_the_weights_meaning(config_with: Make) -> None:
    base = config_with()
    same = config_with(mixer__chunk_size=4, init_std=0.1, mtp_weight=0.0, name="other")
    assert same.identity() == base.identity()
    for changes in (
        {"mixer__a_activation": "heavy_tail"},
        {"mixer__a_floor": 0.01},
        {"attention__rope_theta": 5.0},
    ):
        assert config_with(**changes).identity() != base.identity()


def test_packed_widths_are_those_of_the_mathematics() -> None:
    mixer = MixerConfig(nheads=16, headdim=64, d_state=64, ngroups=2, mimo_rank=4)
    assert mixer.packed_widths == (1024, 1024, 512, 512, 16, 16, 16)
    assert mixer.angles == 16
