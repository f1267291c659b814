"""For every test: the right checkout, few threads, and no luck with uninitialised memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import libs

ROOT = Path(__file__).resolve().parents[1]

if Path(libs.__file__).resolve().parents[1] != ROOT:
    raise pytest.UsageError(f"these tests are in {ROOT}, but `libs` comes from {libs.__file__}")


@pytest.fixture(autouse=True)
def _poisoned_empty() -> Iterator[None]:
    """torch.empty and its kin return NaN, so an output that is only half written cannot pass."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = fill
