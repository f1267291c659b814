"""Every mutant of a restored state is killed by the comparison of bits, in every case; the README shows the counts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import libs.model.inference
from libs.flags import installed
from libs.model import HybridLM
from tests.libs.model.inference.mutations import CASES, PARTS, WAYS, a_model, mutate


@pytest.fixture(scope="module")
def model() -> HybridLM:
    return a_model()


@pytest.fixture(autouse=True)
def _gates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the cases install is taken back."""
    monkeypatch.setattr(installed, "_PROCESS", installed._PROCESS)


def test_without_a_mutation_nothing_differs(model: HybridLM) -> None:
    assert mutate(model, "ssm", "") == (0, 0.0)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("way", WAYS)
def test_every_mutant_is_killed(model: HybridLM, part: str, way: str) -> None:
    seen = mutate(model, part, way)
    assert seen.kills == len(CASES)


def test_the_readme_shows_every_mutant() -> None:
    readme = (Path(libs.model.inference.__file__).parent / "README.md").read_text(encoding="utf-8")
    for part in PARTS:
        row = next(line for line in readme.splitlines() if line.startswith(f"| {part} |"))
        assert re.findall(r"(\d+) of (\d+)", row) == [(str(len(CASES)), str(len(CASES)))] * len(WAYS)
