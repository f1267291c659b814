"""The cpu_demo recipe as it is on the XLA CPU device: the torch lane's curve on the corpus that `make train` builds."""

from __future__ import annotations

from pathlib import Path

import pytest

from libs.flags.runlog import read_events
from tests.support.own_process import ROOT, fathom

CORPUS = ROOT / "data" / "installed_cpp"
STEPS = 20
# fp32 sums in another order. Measured: 1e-6 nats through twenty updates, 2.8e-3 through forty, of losses from 8 to 6.
TOLERANCE = 1e-5


def curve(folder: Path, device: str) -> list[float]:
    words = ("--recipe", "cpu_demo", "--data.dir", CORPUS, "--train.stop_after", STEPS, "--train.threads", 1)
    words = (*words, "--train.device", device, "--run-dir", folder / device, "--log.tensorboard", "false")
    status, _, err = fathom(ROOT, "train", *words, timeout=3000)
    assert status == 75, err[-3000:]
    return [float(event["loss"]) for event in read_events(folder / device) if event["event"] == "train.step"]


@pytest.mark.slow
@pytest.mark.timeout(6000)
@pytest.mark.skipif(not CORPUS.is_dir(), reason="no corpus here: `make train` builds it")
def test_the_demo_recipe_trains_as_on_the_torch_lane(tmp_path: Path) -> None:
    got, want = curve(tmp_path, "xla"), curve(tmp_path, "cpu")
    assert len(got) == len(want) == STEPS
    assert max(abs(a - b) for a, b in zip(got, want, strict=True)) <= TOLERANCE
