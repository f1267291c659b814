"""Small models for the tests of libs.model: each layer kind alone, or all together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from libs.model import HybridLM, ModelConfig, cast_model, preset

BuildModel = Callable[..., HybridLM]


def tiny_config(pattern: str = "M-*-/*-", **changes: Any) -> ModelConfig:
    """cpu_tiny with another pattern and, by dotted name with "__", other fields."""
    data = {**preset("cpu_tiny").model_dump(), "pattern": pattern}
    for key, value in changes.items():
        part, _, inner = key.partition("__")
        if inner:
            data[part] = {**data[part], inner: value}
        else:
            data[part] = value
    return ModelConfig.parse(data)


def roughen(model: HybridLM) -> HybridLM:
    """Move every parameter off its symmetric initial value, so that a missing or swapped one shows."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((0.2 * noise).to(parameter.dtype))
    return model


@pytest.fixture
def build() -> BuildModel:
    """build(pattern, dtype=..., checkpointing=..., **config changes) -> a roughened tiny model."""

    def make(
        pattern: str = "M-*-/*-",
        *,
        dtype: torch.dtype = torch.float32,
        checkpointing: Any = "none",
        **changes: Any,
    ) -> HybridLM:
        model = HybridLM(tiny_config(pattern, **changes), activation_checkpointing=checkpointing)
        cast_model(model, dtype)
        return roughen(model)

    return make


@pytest.fixture
def config_with() -> Callable[..., ModelConfig]:
    return tiny_config
