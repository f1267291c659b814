"""The plan: numbers by formula, and an exit status that says whether it fits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from libs.model import parameter_count, preset

Train = Callable[..., int]


def test_it_fits_or_it_does_not(train: Train, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--recipe", recipe, "--dry-run"]
    assert train(*words, "--train.device_memory", "1GB") == 0
    said = capsys.readouterr().out
    for part in ("45,032", "optimizer", "activations", "FLOPs per token", "0.931 GiB (train.device_memory)"):
        assert part in said
    assert train(*words, "--train.device_memory", "100KB") == 2
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_the_large_recipe_is_planned_without_the_device(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--recipe", "h200_8x_bf16", "--dry-run"]
    assert train(*words) == 0
    said = capsys.readouterr().out
    assert f"{parameter_count(preset('h200_8x')).total:,}" in said
    assert "NVIDIA H200: 139.000 GiB" in said
    assert train(*words, "--train.device_name", "NVIDIA H100 80GB HBM3", "--data.window", "65536") == 2
    assert train(*words, "--train.device_name", "NVIDIA B200") == 2
    assert "NVIDIA B200" in capsys.readouterr().err
