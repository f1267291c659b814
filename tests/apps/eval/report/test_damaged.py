"""Damaged receipts, odd numbers and results of elsewhere: said on the page, and never the end of another page."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apps.eval.bench.receipt import Ratio, write_receipt
from apps.eval.report.__main__ import main
from apps.eval.report.build import render, tiles
from apps.eval.report.crossover_page import read_crossover
from apps.eval.report.load import load_run
from apps.eval.report.receipts_page import load_receipts
from apps.eval.results import LossByPosition, read_result
from libs.flags.errors import UserError, run_entry
from libs.flags.runlog import log_path
from tests.apps.eval.report.test_crossover_page import RATIOS, make
from tests.apps.eval.report.test_pages import make_receipt
from tests.apps.eval.report.test_report import evaluated, make_result, scores_of
from tests.apps.eval.small_run import make_run


def change(run_dir: Path, event: str, edit: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the events of that name in the run's log."""
    records = [json.loads(line) for line in log_path(run_dir).read_text().splitlines()]
    for record in records:
        if record["event"] == event:
            edit(record)
    log_path(run_dir).write_text("".join(json.dumps(record) + "\n" for record in records))


def site(folder: Path, out: Path, *options: str) -> dict[str, str]:
    assert run_entry(main, ["all", str(folder), "--out", str(out), *options]) == 0
    return {path.name: path.read_text(encoding="utf-8") for path in out.iterdir()}


@pytest.mark.parametrize("content", ["[]", "5", "null", '"x"', "{", "[" * 100_000, "\xff"])
def test_a_receipt_that_is_none_hides_no_other(content: str, tmp_path: Path) -> None:
    write_receipt(make_receipt("step_tma", 0.95), tmp_path / "receipts")
    (tmp_path / "receipts" / "bad").mkdir()
    (tmp_path / "receipts" / "bad" / "receipt.json").write_text(content, encoding="latin-1")
    found, problems = load_receipts(tmp_path / "receipts")
    assert len(found) == 1
    assert len(problems) == 1
    assert "bad/receipt.json is no receipt: the file: " in problems[0]
    (tmp_path / "runs").mkdir()
    pages = site(tmp_path / "runs", tmp_path / "out", "--receipts", str(tmp_path / "receipts"))
    assert "step_tma" in pages["receipts.html"]
    assert "bad/receipt.json is no receipt" in pages["receipts.html"]


def test_samples_whose_mean_cannot_be_worked_out(tmp_path: Path) -> None:
    path = write_receipt(make_receipt("step_tma", 0.95), tmp_path)
    content = json.loads(path.read_text())
    content["contenders"][0]["samples_s"] = [1.7e308] * 9
    path.write_text(json.dumps(content))
    assert "OverflowError" in load_receipts(tmp_path).problems[0]


def _renamed(receipt: dict[str, Any]) -> None:
    receipt["ratios"][0]["name"] = "hybrid over twin"


def _better(receipt: dict[str, Any]) -> None:
    receipt["ratios"][0]["value"] *= 0.5


def _alone(receipt: dict[str, Any]) -> None:
    receipt["points"] = [point for point in receipt["points"] if point["model"] == "hybrid"]


def _one_each(receipt: dict[str, Any]) -> None:
    receipt["points"] = [receipt["points"][0], receipt["points"][0]]
    receipt["crossings"] = []


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (_renamed, "its points ask for hybrid_over_twin_S4096"),
        (_better, "its samples give value"),
        (_alone, "twin_step_S4096, .* missing"),
        (_one_each, "twin_step_S4096 missing"),
    ],
)
def test_a_crossover_that_does_not_fit_together(
    edit: Callable[[dict[str, Any]], None], said: str, tmp_path: Path
) -> None:
    path = write_receipt(make(RATIOS), tmp_path / "receipts")
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=said):
        read_crossover(path)
    (tmp_path / "runs").mkdir()
    pages = site(tmp_path / "runs", tmp_path / "out", "--receipts", str(tmp_path / "receipts"))
    assert "receipt.json is no receipt" in pages["index.html"] + pages["receipts.html"]
    assert not any(name.startswith("crossover") for name in pages)


def test_the_ratios_of_a_receipt_are_those_of_its_samples() -> None:
    """So that the test above refuses for the change, and not for the way a ratio goes through JSON."""
    receipt = make(RATIOS)
    again = type(receipt).model_validate_json(receipt.model_dump_json())
    assert [type(ratio) for ratio in again.ratios] == [Ratio] * len(RATIOS)
    assert again.ratios == receipt.ratios


def test_a_validation_without_bits_per_byte_is_left_out_and_said(run_dir: Path) -> None:
    change(run_dir, "eval.result", lambda e: e["metrics"].update(n=1) or (e["step"] == 20 and e["metrics"].pop("bpb")))
    view = load_run(run_dir)
    assert [event["step"] for event in view.validations] == [0, 40]
    assert view.problems == ["1 validations without bits per byte are left out, the first at step 20"]
    assert view.problems[0] in render(view)


def test_a_first_validation_of_zero_has_no_share(run_dir: Path) -> None:
    change(run_dir, "eval.result", lambda e: e["metrics"].update(bpb=0.0 if e["step"] == 0 else 4.0))
    (tile,) = [tile for tile in tiles(load_run(run_dir)) if tile.label == "validation bits per byte"]
    assert (tile.value, tile.note) == ("4.000", "from 0.000 at step 0")


_PHASES = ("time_s", "data_s", "forward_backward_s", "optimizer_s", "other_s")


@pytest.mark.parametrize(
    ("values", "notes"),
    [
        (dict.fromkeys(_PHASES, 0.0), ["shares of 0"]),
        ({"time_s": 0.0}, ["shares of 0"]),
        (dict.fromkeys(_PHASES, 1.7e308), ["shares of inf"]),
        ({"loss": -1e308, "bpb": 1e308}, ["a value is beyond 1e+300"] * 2),
        ({"lr": 5e-324}, []),
    ],
)
def test_odd_numbers_of_steps_are_drawn_or_said(run_dir: Path, values: dict[str, float], notes: list[str]) -> None:
    change(run_dir, "train.step", lambda e: e.update(values))
    html = render(load_run(run_dir))
    for note in notes:
        assert html.count(f"Not drawn: {note}.") == notes.count(note)
    assert html.count("Not drawn: ") == len(notes)
    assert "nan" not in html.split('<section id="training">')[1].split('<section id="gates">')[0]


def test_a_result_without_buckets(run_dir: Path) -> None:
    evaluated(run_dir)
    path = run_dir / "eval" / "loss_by_position.json"
    content = json.loads(path.read_text())
    content["details"]["buckets"] = []
    content["details"]["compression"]["compressors"] = []
    path.write_text(json.dumps(content))
    html = render(load_run(run_dir))
    assert "Not drawn: there is no point." in html
    assert "Bits per byte by position" in html


def test_one_odd_run_ends_no_other_page(tmp_path: Path, data_dir: Path) -> None:
    """Odder than any figure expects: a length that is a word, a size that is no float. Sound runs are compared."""
    runs = tmp_path / "runs"
    for name in ("a", "b", "huge", "odd"):
        (runs / name).mkdir(parents=True)
        make_run(runs / name, data_dir, steps=20)
    change(runs / "huge", "train.step", lambda e: e.update(max_memory_bytes=10**400))
    evaluated(runs / "odd")
    details = scores_of("needle")
    cells = [score.model_copy(update={"axes": score.axes | {"length": "long"}}) for score in details.cells]
    make_result(runs / "odd", "needle", details.model_copy(update={"cells": cells}))
    pages = site(runs, tmp_path / "out")
    assert set(pages) == {"index.html", "compare.html", "flags.html", "run-a.html", "run-b.html"}
    for name, error in (("odd", "ValueError("), ("huge", "OverflowError(")):
        assert f"run-{name}.html is left out, as it cannot be drawn: {error}" in pages["index.html"]
        assert f'href="run-{name}.html' not in pages["index.html"]


@pytest.mark.parametrize("foreign", ["another run", "another suite"])
def test_a_result_of_elsewhere_is_left_out_and_said(
    run_dir: Path, tmp_path: Path, data_dir: Path, foreign: str
) -> None:
    evaluated(run_dir)
    own = read_result(run_dir / "eval" / "loss_by_position.json")
    assert [result.suite for result in load_run(run_dir).results] == ["loss_by_position"]
    other = tmp_path / "other"
    other.mkdir()
    make_run(other, data_dir, steps=2)  # no checkpoint: none of its own could have been evaluated
    if foreign == "another run":
        shutil.copytree(run_dir / "eval", other / "eval")
        said = f"{other}/eval/loss_by_position.json is left out: it is of a checkpoint that this run did not record ("
        said += f"checkpoints/step-00000040 of {own.checkpoint.model}, sha256 {own.checkpoint.sha256[:16]})"
    else:
        other = run_dir
        make_result(run_dir, "needle", scores_of("needle"))
        (run_dir / "eval" / "needle.json").replace(run_dir / "eval" / "loss_by_position.json")
        said = f"{run_dir}/eval/loss_by_position.json is left out: it is a result of the suite needle"
    view = load_run(other)
    assert view.results == []
    assert view.problems == [said]
    html = render(view)
    assert "is left out: it is" in html
    assert isinstance(own.details, LossByPosition)
    assert f"{own.details.bpb.value:.4f}" not in html
