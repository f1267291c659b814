"""Initial values by role, precision and weight-decay rules."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from libs.model import HybridLM, ModelConfig, cast_model, fp32_parameter_names, no_decay, preset

Make = Callable[..., ModelConfig]


@pytest.fixture(scope="module")
def model() -> HybridLM:
    config = preset("cpu_demo").model_dump() | {"pattern": "M-*-M-/*-"}
    return HybridLM(ModelConfig.parse(config))


def test_every_value_is_finite_even_from_poisoned_memory(monkeypatch: pytest.MonkeyPatch, config_with: Make) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(math.nan))
    assert math.isnan(torch.empty(1).item())
    model = HybridLM(config_with(mixer__outproj_norm=True, tie_embeddings=False))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_standard_deviations_follow_the_role(model: HybridLM) -> None:
    output_std = 0.02 / math.sqrt(6)
    for name, parameter in model.named_parameters():
        if parameter.numel() < 10_000:
            continue
        std = output_std if name.endswith(("out_proj.weight", "layer.out.weight", "down.weight")) else 0.02
        assert parameter.std().item() == pytest.approx(std, rel=0.03), name
        assert abs(parameter.mean().item()) < 4 * std / math.sqrt(parameter.numel()), name


def test_mixer_starts_as_the_mathematics_says(model: HybridLM) -> None:
    mixer = model.blocks[0].layer
    rank = mixer.config.mimo_rank
    for name, value in {
        "B_bias": 1,
        "C_bias": 1,
        "D": 1,
        "mimo_z": 1,
        "mimo_x": 1 / rank,
        "mimo_o": 1 / rank,
    }.items():
        assert (getattr(mixer, name) == value).all(), name
    assert (mixer.B_norm.weight == 1).all()


def test_dt_starts_log_uniform_between_its_limits() -> None:
    data = preset("cpu_tiny").model_dump()
    data["mixer"] |= {"nheads": 4096, "headdim": 1}
    config = ModelConfig.parse({**data, "pattern": "M", "hidden_size": 2048})
    with torch.device("meta"):
        model = HybridLM(config)
    mixer = model.to_empty(device="cpu").blocks[0].layer
    model.reset_parameters(3)
    dt = F.softplus(mixer.dt_bias)
    assert dt.min() > 1e-3 * 0.999
    assert dt.max() < 0.1 * 1.001
    position = (dt.log() - math.log(1e-3)) / math.log(100)
    assert position.mean().item() == pytest.approx(0.5, abs=0.02)
    assert position.std().item() == pytest.approx(1 / math.sqrt(12), abs=0.01)


def test_dt_floor_holds(config_with: Make) -> None:
    mixer = HybridLM(config_with(mixer__dt_init_floor=0.05)).blocks[0].layer
    assert F.softplus(mixer.dt_bias).min() > 0.05 * 0.999


def test_a_parameters_values_depend_on_seed_and_name_only(config_with: Make) -> None:
    short, long = HybridLM(config_with("M-")), HybridLM(config_with("M-"))
    assert all(torch.equal(a, b) for a, b in zip(short.parameters(), long.parameters(), strict=True))
    long = HybridLM(config_with("M-*-"))
    assert torch.equal(short.blocks[0].layer.in_proj.weight, long.blocks[0].layer.in_proj.weight)
    long.reset_parameters(1)
    assert not torch.equal(short.blocks[0].layer.in_proj.weight, long.blocks[0].layer.in_proj.weight)
    first, third = HybridLM(config_with("MM")).blocks
    assert not torch.equal(first.layer.in_proj.weight, third.layer.in_proj.weight)


def test_initial_loss_is_that_of_a_uniform_guess(model: HybridLM) -> None:
    tokens = torch.randint(0, 4096, (1, 64))
    with torch.no_grad():
        out = model.loss(tokens, tokens.roll(-1, 1))
    assert (out.main_nll_sum / out.n_tokens).item() == pytest.approx(math.log(4096), rel=0.03)


def test_which_parameters_stay_fp32(config_with: Make) -> None:
    model = HybridLM(config_with("M-*-/M"))
    names = {"dt_bias", "D", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o"}
    expected = {f"{path}.layer.{name}" for path in ("blocks.0", "mtp.0.blocks.0") for name in names}
    assert fp32_parameter_names(model) == expected
    cast_model(model, torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in expected else torch.bfloat16), name
    cast_model(model, torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_which_parameters_take_no_weight_decay(config_with: Make) -> None:
    model = HybridLM(config_with("M-*-", mixer__outproj_norm=True, tie_embeddings=False))
    spared = {name for name, parameter in model.named_parameters() if no_decay(name, parameter)}
    mixer = {"B_norm.weight", "C_norm.weight", "dt_bias", "D", "B_bias", "C_bias", "out_norm"}
    norms = {f"blocks.{i}.norm.weight" for i in range(4)} | {"final_norm.weight"}
    assert spared == {f"blocks.0.layer.{name}" for name in mixer} | norms
