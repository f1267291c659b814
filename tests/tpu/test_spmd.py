"""Two and four virtual devices train as one does: what is cut over a mesh changes nothing but rounding.

torch_xla reads the number of devices once, so every mesh is a process of its own.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from libs.flags.runlog import read_events
from tests.support.own_process import ROOT, fathom
from tests.support.tiny_run import RECIPE

CURVE = 2e-5
STEPS = 3


def run(corpus: Path, folder: Path, *words: str) -> list[float]:
    """Losses and gradient norms of a few steps."""
    folder.mkdir(parents=True)
    text = RECIPE.format(data=corpus).replace('preset = "cpu_tiny"', 'preset = "cpu_tiny"\npattern = "M-*"')
    (folder / "tiny.toml").write_text(text)
    settings = ["--train.steps", str(STEPS), "--schedule.warmup_steps", "1", "--schedule.decay_steps", "1"]
    settings += ["--data.windows_per_batch", "4", "--train.eval_every", "100", *words]
    status, _, err = fathom(ROOT, "train", "--recipe", folder / "tiny.toml", *settings, "--run-dir", folder / "run")
    assert status == 0, err[-3000:]
    steps = [event for event in read_events(folder / "run") if event["event"] == "train.step"]
    assert len(steps) == STEPS
    return [float(step[name]) for step in steps for name in ("loss", "grad_norm")]


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return run(corpus, tmp_path_factory.mktemp("one") / "cpu", "--train.device", "cpu")


@pytest.mark.parametrize(
    "mesh",
    [
        ("--xla.fsdp", "2"),
        pytest.param(("--xla.data", "2", "--xla.tensor", "2"), marks=pytest.mark.slow),
        pytest.param(("--xla.fsdp", "4", "--train.activation_checkpointing", "block"), marks=pytest.mark.slow),
    ],
    ids=lambda words: "_".join(word.removeprefix("--xla.").removeprefix("--train.") for word in words),
)
def test_a_mesh_trains_as_one_device_does(
    corpus: Path, tmp_path: Path, alone: list[float], mesh: tuple[str, ...]
) -> None:
    got = run(corpus, tmp_path / "mesh", "--train.device", "xla", "--strict-compile", *mesh)
    assert got == pytest.approx(alone, rel=CURVE * 10)
