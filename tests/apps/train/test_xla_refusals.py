"""The XLA lane where it cannot be: refused before anything is written, with the way out. The lane is tests/tpu."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from apps.train.arguments import parse_arguments
from apps.train.origins import recipe_layer, recipe_names, resolve_config
from libs.parallel.xla.topology import MeshShape, topology

Train = Callable[..., int]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch_xla") is not None, reason="this is the lane's own place"
)


@pytest.mark.parametrize("device", ["tpu", "xla"])
def test_a_device_without_its_packages(
    train: Train, recipe: Path, device: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert train("--recipe", recipe, "--train.device", device, "--run-dir", tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert f"train.device = {device!r}" in said
    assert "torch_xla==2.9.0 is not installed" in said
    assert f"torch==2.9.0 is needed, {importlib.metadata.version('torch')} is installed" in said
    assert "make setup-tpu" in said
    assert not (tmp_path / "run").exists()


def test_ahead_of_time_names_what_is_missing(train: Train, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--recipe", recipe, "--aot", "v6e-1") == 2
    said = capsys.readouterr().err
    assert "libtpu==0.0.21 is not installed" in said
    assert train("--recipe", recipe, "--aot", "v7-4") == 2
    assert "v6e-4, v6e-8" in capsys.readouterr().err
    assert train("--recipe", recipe, "--aot", "v6e-4") == 2
    assert "make the product 4" in capsys.readouterr().err


def test_the_recipes_of_the_lane_fit_their_slice() -> None:
    names = [name for name in recipe_names() if name.startswith("v6e_")]
    assert len(names) == 6
    for name in names:
        config = resolve_config([recipe_layer(name)]).config
        mesh = MeshShape(config.xla.data, config.xla.fsdp, config.xla.tensor)
        assert mesh.chips == topology("v6e-4").chips
        assert config.data.windows_per_batch % (mesh.data * mesh.fsdp) == 0
        assert config.train.device == "tpu"


def test_strict_compile_is_a_setting() -> None:
    assert parse_arguments(["--strict-compile"]).settings == ("--xla.strict_compile", "true")
    assert parse_arguments([]).settings == ()
