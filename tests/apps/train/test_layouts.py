"""Checkpoints across layouts: what one saves every other loads, bit for bit; trouble of one rank stops all, alike."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from apps.train import save
from apps.train.optim import build_optimizer
from libs.model import HybridLM
from libs.model.checkpoint import resolve_checkpoint
from libs.model.shard_files import read_layout
from libs.model.text.tokenizer import Tokenizer
from libs.model.weights import load_model
from libs.parallel.mesh import Layout, single
from tests.support import saved_layouts
from tests.support.ranks import run_ranks
from tests.support.saved_layouts import CONFIG, SETTINGS, SOURCES

RANKS = range(4)
Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def results() -> Iterator[Results]:
    found = run_ranks(saved_layouts.all_checks, Layout(dp=2, tp=2))
    yield found
    shutil.rmtree(found[0]["folder"])


def test_every_layout_loads_what_every_other_saved(results: Results) -> None:
    names = [name for name, _, _ in SOURCES]
    want = {f"{source} -> {target}": 0 for source in names for target in names}
    assert [result["across"] for result in results] == [want] * 4


def test_training_goes_on_in_another_layout(results: Results) -> None:
    for result in results:
        exact = result["continued"].pop("unbroken, same layout")
        assert exact == 0
        assert len(result["continued"]) == 4
        assert max(result["continued"].values()) < 2e-6


@pytest.mark.parametrize("name", [name for name, _, _ in SOURCES])
def test_one_process_loads_all_of_them(results: Results, name: str) -> None:
    run = Path(results[0]["folder"]) / name.replace(" ", "_")
    model, optimizer = saved_layouts.whole_run(2)
    weights, moments = saved_layouts.whole_tensors(model, optimizer)
    path = save.choose_checkpoint(run, None)
    again = HybridLM(CONFIG)
    second = build_optimizer(again, SETTINGS)
    save.restore_model(path, again)
    save.restore_optimizer(path, again, second)
    assert saved_layouts.differing(again, second, weights, moments, single()) == 0
    merged = load_model(resolve_checkpoint(run), expect=CONFIG)
    assert all(torch.equal(p, weights[n]) for n, p in merged.named_parameters())


def test_files_say_which_layout_wrote_them(results: Results) -> None:
    folder = Path(results[0]["folder"])
    for name, layout, sharded in SOURCES:
        path = resolve_checkpoint(folder / name.replace(" ", "_"))
        found = read_layout(path)
        assert Layout(found.dp, found.cp, found.tp) == layout
        whole = layout.tp == 1
        assert found.weights == (("model.safetensors",) if whole else found.weights)
        assert len(found.weights) == layout.tp
        assert len(found.optimizer) == (4 if sharded else layout.tp)
        assert {*found.weights, *found.optimizer} == {p.name for p in path.glob("*.safetensors")}


def test_whole_files_have_the_bits_of_one_process(results: Results, tmp_path: Path) -> None:
    """Whoever saves: without tensor parallelism these are the files that one process writes."""
    model, optimizer = saved_layouts.whole_run(2)
    saved = save.save_checkpoint(
        tmp_path,
        model=model,
        optimizer=optimizer,
        tokenizer=Tokenizer.bytes_tokenizer(),
        state=saved_layouts.state_of(2),
    )
    names = {path.name for path in saved.path.iterdir()}
    assert names == {
        *("model.safetensors", "model.json", "optimizer.safetensors", "tokenizer.json", "trainer.json"),
        *("MANIFEST.json", "COMMITTED"),
    }
    for source in ("dp4", "dp2 cp2"):
        other = resolve_checkpoint(Path(results[0]["folder"]) / source.replace(" ", "_"))
        for name in ("model.safetensors", "model.json", "optimizer.safetensors"):
            assert (other / name).read_bytes() == (saved.path / name).read_bytes(), name


def test_a_damaged_file_is_told_to_all_ranks(results: Results) -> None:
    for how, reason in (("flipped", "has sha256"), ("missing", r"(missing)")):
        told = [result["integrity"][how] for result in results]
        assert len(set(told)) == 1
        assert told[0].startswith("UserError: verifying")
        assert all(f"optimizer-tp00{rank}of002.safetensors" in told[0] for rank in range(2))
        assert reason in told[0]
    # One rank hashes a file, and these two files fall to two ranks; that a file is gone all of them see.
    assert results[0]["integrity"]["flipped"].count("- rank ") == 2
    assert results[0]["integrity"]["missing"].count("- rank ") == 4
    told = [result["integrity"]["no checkpoint"] for result in results]
    assert len(set(told)) == 1
    assert "rank 0: " in told[0]


def test_a_full_disk_on_one_rank_stops_all_and_leaves_nothing(results: Results) -> None:
    for when in ("now", "background"):
        told = [result["full disk"][when] for result in results]
        assert len(set(told)) == 1
        assert told[0].startswith("UserError")
        assert "rank 1: the disk is full" in told[0]
        assert "- rank 0" not in told[0]
    for result in results:
        (heard,) = result["full disk"]["heard"]
        assert heard.startswith("abort step-00000002: ")
        assert "rank 1: the disk is full" in heard
        assert result["full disk"]["left"] == ["step-00000001"]


def test_an_error_of_ours_keeps_its_kind_where_it_happened(results: Results) -> None:
    told = [result["full disk"]["ours"] for result in results]
    assert told[0] == "RuntimeError: ours"
    assert all(text.startswith("UserError") and "rank 0: RuntimeError: ours" in text for text in told[1:])


def test_a_background_save_has_the_values_of_its_step(results: Results) -> None:
    assert [result["background"]["differ"] for result in results] == [0] * 4


def test_every_way_out_of_a_background_save(results: Results) -> None:
    for result in results:
        found = result["background"]
        assert found["while one is slow"] == (True, [])
        assert found["second save"] == (True, [1, 2])
        assert found["left normally"] == (False, [1, 2, 3])
        assert found["exception"] == "RuntimeError: the step failed"
        steps = [f"step-{step:08d}" for step in (1, 2, 3)]
        assert found["after the exception"] == ([1, 2, 3], steps)
        assert found["heard"] == [
            *(f"commit {step}" for step in steps),
            "abort step-00000004: RuntimeError during the save: the step failed",
        ]


def test_slow_work_of_one_rank_is_waited_for(results: Results) -> None:
    """Two and a half seconds in groups whose collectives may take one."""
    for rank, result in enumerate(results):
        found = result["patience"]
        assert (found["good"], found["values"], found["first"]) == (rank % 2, [0, 1], rank - rank % 2)
        assert found["bad"].startswith("UserError: waiting failed")
        assert f"rank {rank - rank % 2 + 1}: too late" in found["bad"]


def test_rank_0_keeps_house_for_all(results: Results) -> None:
    for result in results:
        found = result["housekeeping"]
        assert found["removed"] == [".step-00000009.partial"]
        assert (found["aside"], found["pruned"], found["steps"]) == ([3], [1], [2])
        assert "--from-step 1" in found["from step"]
