"""Engines over tiny real models, with gates of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from libs.flags import installed
from libs.flags.facts import Facts
from libs.flags.installed import GateState, install
from libs.flags.resolve import resolve
from libs.model import HybridLM
from libs.model.inference import Engine, EngineConfig

PATTERN = "M-*M-*/*-"


def ids(n: int, seed: int) -> list[int]:
    """Random tokens of the tiny vocabulary."""
    return [int(t) for t in torch.randint(0, 64, (n,), generator=torch.Generator().manual_seed(seed))]


def set_gates(monkeypatch: pytest.MonkeyPatch, **gates: str) -> None:
    """Put these values in force, whatever was; the facts allow both gates of inference."""
    monkeypatch.setattr(installed, "_PROCESS", GateState())
    facts = Facts(state_slots=True, mtp_depth=1, draft_length=3, kv_block_size=16)
    install(resolve({f"FATHOM_{name.upper()}": value for name, value in gates.items()}, facts))


BuildEngine = Callable[..., Engine]


@pytest.fixture
def engine(build: Callable[..., HybridLM], monkeypatch: pytest.MonkeyPatch) -> BuildEngine:
    """engine(mode, speculate=..., model=..., **config) -> an Engine; the same tiny model every time unless given."""
    models: dict[str, HybridLM] = {}

    def make(
        mode: str = "off",
        *,
        speculate: bool = False,
        model: HybridLM | None = None,
        pattern: str = PATTERN,
        **options: Any,
    ) -> Engine:
        set_gates(monkeypatch, prefix_cache=mode, mtp_speculation="on" if speculate else "off")
        if model is None:
            model = models.setdefault(pattern, build(pattern))
        values = {"max_tokens": 512, "block_size": 16, "max_batch": 4, **options}
        return Engine(model, EngineConfig(**values))

    return make
