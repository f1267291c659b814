"""Records of steps that were compiled and never run: which are refused, which are compared, and what says why not."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console

from apps.eval.bench import crossover, crossover_command
from apps.eval.bench.__main__ import main
from apps.eval.bench.crossover import CrossoverReceipt
from apps.eval.bench.modelled import modelled_crossings, read_modelled
from apps.eval.report.crossover_page import crossover_page
from libs.flags.errors import UserError, run_entry
from tests.apps.eval.bench.test_crossover import GIB, _found, _run


def _record(recipe: str, window: int, seconds: float | None = None, **changed: Any) -> dict[str, Any]:
    tokens = 65536
    record = {
        "recipe": recipe, "slice": "v6e-4", "effort": "full", "window": window, "tokens_per_step": tokens,
        "parameters": 130_000_000, "model_flops_per_step": 1e9 * tokens,
    }  # fmt: skip
    if seconds is not None:
        record |= {"modelled_seconds": seconds, "peak_bytes_per_chip": 9 * GIB, "compiled": _estimate()}
    return record | changed


def _estimate(**changed: Any) -> dict[str, Any]:
    return {"modelled": {"cycles": 9, "uncounted": 0, "unestimated": 0, "unknown": []} | changed, "code": 1}


def _both_at(*lengths: tuple[int, float, float], **of_hybrid: Any) -> list[dict[str, Any]]:
    """Of (S, seconds of the hybrid, of the twin)."""
    return [
        record
        for seq_len, hybrid, twin in lengths
        for record in (
            _record(f"{seq_len}_hybrid", seq_len, hybrid, **of_hybrid), _record(f"{seq_len}_dense", seq_len, twin),
        )
    ]  # fmt: skip


def _files(tmp_path: Path, *records: dict[str, Any]) -> list[Path]:
    paths = []
    for number, record in enumerate(records):
        paths.append(tmp_path / f"{number}.json")
        paths[-1].write_text(json.dumps(record))
    return paths


def test_modelled_rows_are_labelled_and_cross_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = read_modelled(
        _files(
            tmp_path,
            _record("v6e_4k_hybrid", 4096, 0.3), _record("v6e_4k_dense", 4096, 0.2),
            _record("recipes/v6e_16k_hybrid.toml", 16384, 0.2), _record("v6e_16k_dense", 16384, 0.3),
            _record("v6e_64k_hybrid", 65536, 0.2), _record("v6e_64k_dense", 65536, does_not_fit="of memory\nmore"),
        )
    )  # fmt: skip
    assert {row.label for row in rows} == {"modelled"}
    (crossing,) = modelled_crossings(rows, seed=0)
    assert crossing.tokens == pytest.approx(8192)
    assert (crossing.quantity, crossing.has_interval) == ("modelled time per token on v6e-4", False)
    (unfit,) = [row for row in rows if row.note]
    assert (unfit.model, unfit.seconds, unfit.note) == ("twin", None, "does not fit: of memory")
    receipt = _run(monkeypatch, _found(), rows)
    assert receipt.crossings[-1] == crossing
    assert {point.seq_len for point in receipt.points} == {32, 64, 128}, "nothing modelled among what is measured"
    page = crossover_page(receipt)
    assert page.count("MODELLED") >= 2
    assert "Never run on such a device" in page


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([_record("v6e_4k", 4096, 1.0)], "which of the two"),
        ([{"loss": 1}], "no record of `fathom train --aot`"),
        ([_record("a_dense", 4096, 1.0), _record("b_dense", 4096, 2.0)], "of the same step"),
        ([_record("a_dense", 4096, 1.0), _record("a_hybrid", 4096, 2.0, parameters=1)], "twins differ by"),
    ],
)
def test_records_that_are_refused(tmp_path: Path, records: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_modelled(_files(tmp_path, *records))
    with pytest.raises(UserError, match="No such file"):
        read_modelled([tmp_path / "none.json"])


@pytest.mark.parametrize(
    "changed",
    [
        {"modelled_seconds": 0}, {"modelled_seconds": -1.0}, {"modelled_seconds": None}, {"modelled_seconds": "1"},
        {"modelled_seconds": float("nan")}, {"modelled_seconds": float("inf")}, {"tokens_per_step": 0},
        {"parameters": 0}, {"model_flops_per_step": 0}, {"peak_bytes_per_chip": -1}, {"window": 0}, {"window": True},
        {"slice": None}, {"recipe": 7}, {"effort": "some"}, {"compiled": None}, {"compiled": {"modelled": {}}},
        {"compiled": _estimate(uncounted=-1)}, {"compiled": _estimate(unknown=None)}, {"does_not_fit": None},
        {"does_not_fit": []}, {"does_not_fit": ""}, {"does_not_fit": "\n"}, {"does_not_fit": "and yet has a time"},
    ],
    ids=str,
)  # fmt: skip
def test_a_figure_that_cannot_be_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], changed: dict[str, Any]
) -> None:
    monkeypatch.setattr(crossover, "own_process", lambda *_: pytest.fail("measured"))
    records = [_record("a_hybrid", 4096, 1.0), _record("a_dense", 4096, 1.0) | changed]
    words = [word for path in _files(tmp_path, *records) for word in ("--modelled", str(path))]
    assert run_entry(main, ["crossover", "--preset", "cpu_tiny", "--seq-lens", "32,64", *words]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / '1.json'} is no record of `fathom train --aot`" in error
    assert next(iter(changed)) in error


@pytest.mark.parametrize("text", ["3", "[3]", "null", "[[]]", "{"])
def test_what_is_no_record_at_all(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match="no record of `fathom train --aot`"):
        read_modelled([tmp_path / "a.json"])


@pytest.mark.parametrize(
    ("left_out", "said"),
    [
        ({"uncounted": 2}, "calls of kernels (2)"),
        ({"unestimated": 3}, "operations without an estimate (3)"),
        ({"unknown": ["while.1"]}, "turns of loops of unknown length (1)"),
    ],
)
def test_a_time_that_leaves_something_out_crosses_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, left_out: dict[str, Any], said: str
) -> None:
    records = _both_at((4096, 0.3, 0.2), (16384, 0.2, 0.3), compiled=_estimate(**left_out))
    rows = read_modelled(_files(tmp_path, *records))
    assert modelled_crossings(rows, seed=0) == []
    noted = [row for row in rows if row.note is not None]
    assert [row.model for row in noted] == ["hybrid", "hybrid"]
    assert all(said in str(row.note) and "lower bound" in str(row.note) and row.seconds for row in noted)
    receipt = _run(monkeypatch, _found(), rows)
    out = Console(width=300, file=StringIO(), record=True)
    out.print(*crossover_command._tables(receipt))
    assert out.export_text().count(said) == 2
    content = json.loads(receipt.model_dump_json())
    for row in content["modelled"]:
        row["note"] = None
    with pytest.raises(ValidationError, match="no note says so"):
        CrossoverReceipt.model_validate(content)


def test_quick_effort_has_no_time(tmp_path: Path) -> None:
    (row,) = read_modelled(_files(tmp_path, _record("a_dense", 4096, 1.0, effort="quick")))
    assert row.seconds is None
    assert row.peak_bytes == 9 * GIB


def test_what_is_modelled_is_not_the_decision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = _found()
    short = found._replace(samples={key: times for key, times in found.samples.items() if key[1] == 32}, fewer={})
    receipt = _run(monkeypatch, short, read_modelled(_files(tmp_path, *_both_at((4096, 0.3, 0.2), (16384, 0.2, 0.3)))))
    assert [crossing.quantity for crossing in receipt.crossings] == ["modelled time per token on v6e-4"]
    assert receipt.decision.reason == "one length: no crossing can be seen"
