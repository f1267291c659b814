"""Whole runs of `fathom train` with FP8 weights, on a DOUBLE of transformer-engine and gloo; and the refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from libs.flags.logcheck import check_log
from libs.flags.runlog import read_events
from libs.model.checkpoint import resolve_checkpoint
from libs.model.shard_files import read_layout
from tests.integration.test_layouts import history
from tests.support.fp8_process import results

if torch.cuda.is_available():
    pytest.skip("the double is for machines without CUDA", allow_module_level=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fp8")


@pytest.fixture(scope="module")
def jobs(recipe: Path, folder: Path) -> dict[str, Any]:
    ended: dict[str, Any] = results("fp8_job", recipe, folder)
    return ended


def tensors(run: Path) -> dict[str, torch.Tensor]:
    path = resolve_checkpoint(run)
    layout = read_layout(path)
    names = (*layout.weights, *layout.optimizer)
    return {key: tensor for name in names for key, tensor in load_file(path / name).items()}


def test_a_run_trains_and_says_so(jobs: dict[str, Any], folder: Path) -> None:
    assert jobs["whole"]["statuses"] == [0, 0], jobs["whole"]["said"]
    run = folder / "whole"
    (chosen,) = [e for e in read_events(run) if e["event"] == "backend.chosen" and e["op"] == "parallel.engine"]
    assert "FP8 parameters, recipe blockwise" in chosen["reason"]
    losses = [event["loss"] for event in history(run).values()]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    assert check_log(run).violations == ()


def test_it_resumes_bit_for_bit(jobs: dict[str, Any], folder: Path) -> None:
    """Saved in the background, on two ranks."""
    assert [jobs[name]["statuses"] for name in ("first half", "second half")] == [[75, 75], [0, 0]], jobs
    one, other = history(folder / "whole"), history(folder / "halves")
    assert [(e["loss"], e["grad_norm"]) for e in one.values()] == [(e["loss"], e["grad_norm"]) for e in other.values()]
    found, again = tensors(folder / "whole"), tensors(folder / "halves")
    assert found.keys() == again.keys()
    assert [key for key in found if not torch.equal(found[key], again[key])] == []


def test_a_checkpoint_is_of_the_usual_form(jobs: dict[str, Any], folder: Path) -> None:
    """fp32 under the usual names: it goes on at another tp, and then in bf16 by the torch engine."""
    assert jobs["whole"]["statuses"] == [0, 0]
    weights = load_file(resolve_checkpoint(folder / "whole") / "model.safetensors")
    assert {str(tensor.dtype) for tensor in weights.values()} == {"torch.float32"}
    assert "blocks.0.layer.in_proj.weight" in weights
    assert any(bool((t != t.bfloat16().float()).any()) for t in weights.values()), "main values, not rounded ones"
    steps = [jobs[name]["statuses"] for name in ("to tp 2", "at tp 2", "in bf16")]
    assert steps == [[75, 75], [75, 75], [0, 0]], jobs
    one, other = history(folder / "whole"), history(folder / "moved")
    assert list(one) == list(other)
    for step in one:
        assert one[step]["loss"] == pytest.approx(other[step]["loss"], rel=0.02), step


def test_weights_that_do_not_change_stop_the_run_after_its_first_step(jobs: dict[str, Any]) -> None:
    assert jobs["without update"]["statuses"] == [78, 78], jobs["without update"]["said"]
    assert all("no FP8 parameter has changed in step 1" in said for said in jobs["without update"]["said"])


def test_what_one_rank_lacks_stops_all(jobs: dict[str, Any]) -> None:
    assert jobs["on one rank"]["statuses"] == [78, 78], jobs["on one rank"]["said"]
    assert any("cudnn shared object not found" in said for said in jobs["on one rank"]["said"])


def test_a_gradient_that_is_not_finite_is_reported_as_ever(jobs: dict[str, Any], folder: Path) -> None:
    """The report reads FP8 weights too."""
    assert jobs["a nan"]["statuses"] == [70, 70], jobs["a nan"]["said"]
    assert all("gradient on rank 1 is nan" in said for said in jobs["a nan"]["said"])
    (bundle,) = (path for path in (folder / "nan" / "anomalies").iterdir() if not path.name.endswith("rank-1"))
    assert json.loads((bundle / "report.json").read_text())["nonfinite_parameters"] == []
