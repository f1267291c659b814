"""Ahead of time: a small step is compiled by libtpu for v6e-4, its chips exchange what FSDP predicts, and what does not
fit or does not exist is refused."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest

from apps.train.__main__ import main
from libs.flags.errors import run_entry
from libs.flags.provenance import git_state
from libs.parallel.xla import pins
from tests.support.own_process import fathom

SMALL = ("train", "--recipe", "cpu_demo", "--model.preset", "cpu_tiny", "--data.window", "64")
FOUR = (
    "--model.pattern", "M-*", "--data.windows_per_batch", "4", "--train.precision", "bf16",
    "--train.activation_checkpointing", "block",
    "--aot", "v6e-4", "--xla.fsdp", "4", "--aot-quick",
)  # fmt: skip
# Leave the loops to the partitioner: no row is marked in them, and no weight has a copy for each chip.
UNMARKED = "import libs.kernels.chunk_loop as loops; loops.ROW_AXES = ()"


def compiled(folder: Path, code: str = "") -> tuple[dict[str, Any], str]:
    """The record of a small step for four chips, and what was printed."""
    status, out, err = fathom(folder, *SMALL, *FOUR, code=code)
    assert status == 0, err[-3000:]
    (path,) = (folder / "runs" / "aot").glob("*.json")
    return json.loads(path.read_text()), out


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    return compiled(tmp_path_factory.mktemp("aot"))


def test_a_step_is_compiled_for_four_chips(step: tuple[dict[str, Any], str]) -> None:
    record, said = step
    assert "MODELLED time of a step" in said
    assert "BOUND from below" in said
    found = record["compiled"]
    # What is updated in place shares its memory: parameters, moments and step counts of one chip.
    held = record["argument_bytes_per_chip"]
    assert found["shared"] >= 0.9 * (held["parameters"] + held["optimizer"])
    # Two fp32 moments for each fp32 parameter, and a step count.
    assert held["optimizer"] == pytest.approx(2 * held["parameters"], rel=0.02)
    assert record["peak_bytes_per_chip"] < record["usable_bytes_per_chip"]
    assert found["modelled"]["cycles"] > 0
    assert found["modelled"]["unknown"] == []
    # Fewer than a chip's share of the model's own operations would mean that products were overlooked; several times as
    # many are recomputed, masked away, or padded.
    share = record["model_flops_per_step"] / 4
    assert share < found["counted"]["flops"] < 20 * share
    assert record["modelled_seconds"] > record["bound_seconds"] > 0
    assert "never measured" in record["modelled_seconds_are"]
    # What made it, as in a receipt.
    assert record["command"][:2] == ["fathom", "train"]
    assert (record["git_commit"], record["versions"]["libtpu"]) == (git_state().commit, pins.PINS["libtpu"])


def test_chips_exchange_what_fsdp_predicts(step: tuple[dict[str, Any], str]) -> None:
    """No collective in a loop over chunks; weights gathered for forward, for forward again and for the gradient of the
    input; gradients added up once, each chip keeping its part of those that are worth cutting."""
    found = step[0]["compiled"]["counted"]
    assert sum(found["in_loops"].values()) == 0
    weights = 4 * step[0]["parameters"]
    assert found["exchanged"]["all-gather"] <= 3 * weights
    assert found["exchanged"]["reduce-scatter"] > 0
    assert found["exchanged"]["reduce-scatter"] + found["exchanged"]["all-reduce"] <= weights
    assert "all-to-all" not in found["collectives"]


@pytest.mark.slow
def test_a_loop_left_to_the_partitioner_exchanges_in_every_iteration(tmp_path: Path) -> None:
    found = compiled(tmp_path, UNMARKED)[0]["compiled"]["counted"]
    assert sum(found["in_loops"].values()) >= 10


def test_a_step_that_does_not_fit_is_told_and_recorded(tmp_path: Path) -> None:
    """An MLP of sixteen million channels: 3 * 64 * 2^24 weights and as many numbers three times more."""
    words = ("--model.pattern", "-", "--model.mlp.width", 2**24, "--aot", "v6e-1", "--aot-quick")
    status, out, err = fathom(tmp_path, *SMALL, *words)
    assert status == 2, err[-3000:]
    assert "v6e-1: DOES NOT FIT: " in err
    assert "it fits" not in out
    (path,) = (tmp_path / "runs" / "aot").glob("*.json")
    record = json.loads(path.read_text())
    assert "RESOURCE_EXHAUSTED" in record["does_not_fit"]
    assert "modelled_seconds" not in record


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--aot", "v9x-4"), "unknown TPU topology 'v9x-4'"),
        (("--aot", "v6e-8", "--xla.fsdp", "4"), "has 8 chips, but xla.data * xla.fsdp * xla.tensor = 1 * 4 * 1 = 4"),
    ],
)
def test_a_slice_that_cannot_be_is_refused(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_entry(main, [*SMALL[1:], *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("package", "found", "said"),
    [
        ("libtpu", None, "libtpu==0.0.21 is not installed"),
        ("torch", "2.13.0", "torch==2.9.0 is needed, 2.13.0 is installed"),
    ],
)
def test_packages_that_are_missing_or_wrong_are_named_with_the_way_out(
    package: str, found: str | None, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name != package:
            return real(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(pins.importlib.metadata, "version", version)
    assert run_entry(main, [*SMALL[1:], "--aot", "v6e-1"]) == 2
    err = capsys.readouterr().err
    assert f"--aot v6e-1: {said}" in err
    assert "`make setup-tpu`" in err
    assert set(pins.AHEAD_OF_TIME) <= set(pins.PINS)
