"""`fathom train` on the XLA CPU device: the torch lane's curve, no late compilation, exact resume, one format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from apps.train.__main__ import main
from apps.train.data.loader import Batch, BatchLoader
from libs.flags.errors import run_entry
from libs.flags.runlog import read_events
from tests.support.own_process import ROOT, fathom
from tests.support.tiny_run import RECIPE

# The same arithmetic in another order; measured 1e-6.
CURVE = 2e-5


@pytest.fixture(scope="module")
def recipe(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    text = RECIPE.format(data=corpus).replace('preset = "cpu_tiny"', 'preset = "cpu_tiny"\npattern = "M-*"')
    path.write_text(text)
    return path


def train(recipe: Path, run_dir: Path, *words: object) -> int:
    start = ["--recipe", recipe, "--run-dir", run_dir] if "--resume" not in words else []
    return run_entry(main, [str(word) for word in (*start, *words)])


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run_dir) if event["event"] == name]


def losses(run_dir: Path) -> list[float]:
    return [float(event["loss"]) for event in events(run_dir, "train.step")]


@pytest.fixture(scope="module")
def xla_run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps on XLA with a checkpoint in the middle."""
    run_dir = tmp_path_factory.mktemp("runs") / "xla"
    assert train(recipe, run_dir, "--train.device", "xla", "--checkpoint.every", 4) == 0
    return run_dir


def test_the_loss_curve_is_that_of_the_torch_lane(recipe: Path, xla_run: Path, tmp_path: Path) -> None:
    assert train(recipe, tmp_path / "cpu") == 0
    got, want = losses(xla_run), losses(tmp_path / "cpu")
    assert len(got) == len(want) == 8
    assert max(abs(a - b) for a, b in zip(got, want, strict=True)) <= CURVE
    bpb = [[event["metrics"]["bpb"] for event in events(run, "eval.result")] for run in (xla_run, tmp_path / "cpu")]
    assert bpb[0] == pytest.approx(bpb[1], abs=CURVE)


def test_compilations_are_logged_and_none_is_late(recipe: Path, tmp_path: Path) -> None:
    """Fifty steps, with a rate that becomes exactly 0 at the end."""
    words = ("--train.steps", 50, "--schedule.final_lr_ratio", 0, "--train.eval_every", 25)
    assert train(recipe, tmp_path / "run", "--train.device", "xla", "--strict-compile", *words) == 0
    assert len(losses(tmp_path / "run")) == 50
    assert events(tmp_path / "run", "anomaly.generic") == []


def test_a_ragged_batch_is_an_anomaly_and_stops_a_strict_run(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = BatchLoader.next_batch
    drawn = []

    def ragged(self: BatchLoader) -> Batch:
        batch = whole(self)
        drawn.append(batch)
        if len(drawn) != 5:
            return batch
        half, window = len(batch.window_ids) // 2, self.dataset.window
        kept = batch.cu_seqlens[batch.cu_seqlens <= half * window]
        tokens, labels = batch.tokens[:, : half * window], batch.labels[:, : half * window]
        return batch._replace(tokens=tokens, labels=labels, cu_seqlens=kept, window_ids=batch.window_ids[:half])

    monkeypatch.setattr(BatchLoader, "next_batch", ragged)
    assert train(recipe, tmp_path / "lax", "--train.device", "xla") == 0
    (anomaly,) = events(tmp_path / "lax", "anomaly.generic")
    assert (anomaly["what"], anomaly["step"], anomaly["action"]) == ("kernel compiled after warm-up", 5, "none")
    # The ragged shape is compiled by now, so another one is drawn.
    drawn.clear()
    words = ("--train.device", "xla", "--strict-compile", "--data.windows_per_batch", 6)
    assert train(recipe, tmp_path / "strict", *words) == 2
    (stop,) = events(tmp_path / "strict", "run.stop")
    assert "compiled after warm-up" in stop["reason"]


# Dies without a word when the batch of step 7 is asked for; those of steps 8 and 9 wait on the device.
KILLED = """
import os, signal
from apps.train.prefetch import Prefetcher
whole, asked = Prefetcher.next_batch, []
def next_batch(self):
    asked.append(self)
    if len(asked) == 7:
        [waiting.result() for waiting in self._drawn]
        assert self._loader.cursor != self.cursor
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self)
Prefetcher.next_batch = next_batch
"""


def test_a_killed_run_goes_on_as_if_it_had_not_been(recipe: Path, xla_run: Path, tmp_path: Path) -> None:
    """From the checkpoint of step 4, and not with the batches that were prefetched."""
    run_dir = tmp_path / "cut"
    words = ("--recipe", recipe, "--run-dir", run_dir, "--train.device", "xla", "--checkpoint.every", 4)
    status, _, err = fathom(ROOT, "train", *words, code=KILLED)
    assert status == -9, err[-3000:]
    assert len(losses(run_dir)) == 6
    assert train(recipe, run_dir, "--resume", run_dir) == 0
    assert losses(run_dir)[-4:] == losses(xla_run)[-4:]
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (run / "checkpoints" / "step-00000008" / name for run in (run_dir, xla_run))
        assert ours.read_bytes() == theirs.read_bytes(), name


def test_a_checkpoint_moves_between_the_lanes_bit_for_bit(xla_run: Path, tmp_path: Path) -> None:
    """Written on XLA, read on the CPU, written there, read on XLA and written again: the same bytes."""
    import torch_xla
    from safetensors.torch import save_file

    from apps.train.config import OptimSection
    from apps.train.optim import build_optimizer, load_optimizer_tensors, optimizer_tensors
    from libs.model.shard_files import LocalTensors
    from libs.model.weights import load_model, save_model

    source = xla_run / "checkpoints" / "step-00000008"
    for lane, device in (("cpu", torch.device("cpu")), ("xla", torch_xla.device()), ("back", torch.device("cpu"))):
        target = tmp_path / lane
        target.mkdir()
        model = load_model(source)
        model.to(device)
        optimizer = build_optimizer(model, OptimSection())
        load_optimizer_tensors(model, optimizer, LocalTensors([source / "optimizer.safetensors"], model.config, 0, 1))
        save_model(target, model)
        held = optimizer_tensors(model, optimizer)
        assert {u.device.type for u in held.values()} == {device.type}
        save_file({name: u.cpu() for name, u in held.items()}, target / "optimizer.safetensors")
        for name in ("model.safetensors", "optimizer.safetensors"):
            assert (target / name).read_bytes() == (xla_run / "checkpoints" / "step-00000008" / name).read_bytes()
        source = target
