"""Save and load: a round trip changes nothing, and weights of another model are refused with both values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from libs.flags.errors import UserError
from libs.model import HybridLM, ModelConfig
from libs.model.weights import CONFIG_FILE, WEIGHTS_FILE, load_model, read_config, save_model

Build = Callable[..., HybridLM]
Make = Callable[..., ModelConfig]


@pytest.fixture
def saved(tmp_path: Path, build: Build) -> tuple[Path, HybridLM]:
    model = build("M-*-/*-", tie_embeddings=False)
    save_model(tmp_path, model)
    return tmp_path, model


def test_round_trip_is_bit_equal(saved: tuple[Path, HybridLM]) -> None:
    directory, model = saved
    again = load_model(directory, activation_checkpointing="block", mimo_backend="reference")
    assert again.config == model.config
    assert again.activation_checkpointing == "block"
    assert again.choices["mimo"].value == "reference"
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in again.parameters())
    again.loss(torch.zeros(1, 9, dtype=torch.long), torch.zeros(1, 9, dtype=torch.long)).loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_survive(tmp_path: Path, build: Build, dtype: torch.dtype) -> None:
    model = build("M-", dtype=dtype)
    save_model(tmp_path, model)
    again = load_model(tmp_path)
    assert {n: p.dtype for n, p in again.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}


def test_tied_embeddings_are_stored_once(tmp_path: Path, build: Build) -> None:
    save_model(tmp_path, build("-"))
    model = load_model(tmp_path)
    assert model.head_weight is model.embedding.weight
    assert not any("head" in name for name in model.state_dict())


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        (
            {"mixer__a_activation": "heavy_tail"},
            ["mixer.a_activation: checkpoint 'softplus', expected 'heavy_tail'"],
        ),
        ({"mixer__a_floor": 0.5}, ["mixer.a_floor: checkpoint 0.0001, expected 0.5"]),
        (
            {"mixer__nheads": 8, "mixer__headdim": 8},
            ["mixer.headdim: checkpoint 16, expected 8", "mixer.nheads: checkpoint 4, expected 8"],
        ),
        ({"pattern": "M-M-/*-"}, ["pattern: checkpoint 'M-*-/*-', expected 'M-M-/*-'"]),
    ],
)
def test_another_model_is_refused_with_both_values(
    saved: tuple[Path, HybridLM], config_with: Make, changes: dict[str, Any], shown: list[str]
) -> None:
    expect = config_with(**{"tie_embeddings": False, **changes})
    with pytest.raises(UserError) as caught:
        load_model(saved[0], expect=expect)
    assert str(caught.value).splitlines()[1:] == [f"  {line}" for line in shown]


def test_expected_tiling_and_training_fields_replace_the_saved_ones(
    saved: tuple[Path, HybridLM], config_with: Make
) -> None:
    expect = config_with(tie_embeddings=False, mixer__chunk_size=4, mtp_weight=0.1)
    assert load_model(saved[0], expect=expect).config == expect


def edit_header(directory: Path, **changes: Any) -> None:
    path = directory / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_damaged_headers_are_refused(saved: tuple[Path, HybridLM]) -> None:
    directory, _ = saved
    edit_header(directory, a_activation="heavy_tail")
    with pytest.raises(UserError, match="a_activation is 'heavy_tail' but its config says 'softplus'"):
        read_config(directory)
    edit_header(directory, format_version=99)
    with pytest.raises(UserError, match="version 99; this program reads 'fathom-model' version 1"):
        read_config(directory)
    (directory / CONFIG_FILE).write_text("{")
    with pytest.raises(UserError, match="not readable JSON"):
        read_config(directory)
    (directory / CONFIG_FILE).unlink()
    with pytest.raises(UserError, match=r"model\.json is missing"):
        read_config(directory)


def test_damaged_weights_are_refused(saved: tuple[Path, HybridLM]) -> None:
    directory, model = saved
    weights = directory / WEIGHTS_FILE
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        load_model(directory)
    weights.unlink()
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        load_model(directory)
    weights.write_bytes(whole)
    header = json.loads((directory / CONFIG_FILE).read_text())
    edit_header(directory, config={**header["config"], "mlp": {"width": 65}})
    with pytest.raises(
        UserError,
        match=r"(?s)does not fit its own model\.json in 6 tensors:.*file \(128, 32\), config \(130, 32\)",
    ):
        load_model(directory)
    assert model.config.mlp is not None
