"""`fathom bench all`: each in a process of its own, a failing one stops no other, and the exit status tells."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apps.eval.bench import all_command
from apps.eval.bench.__main__ import BENCHES, main
from apps.eval.bench.all_command import FULL, QUICK, Ran
from apps.eval.bench.train_step import StepReceipt
from libs.flags.errors import run_entry


def _fake(
    monkeypatch: pytest.MonkeyPatch, failing: dict[str, int], silent: tuple[str, ...] = ()
) -> dict[str, list[str]]:
    """Replace the processes; what each was given, in the order they ran."""
    given: dict[str, list[str]] = {}

    def run_one(name: str, words: list[str], folder: Path) -> Ran:
        given[name] = words
        status = failing.get(name, 0)
        receipt = None if status or name in silent else folder / f"2026-01-01_{name}_box" / "receipt.json"
        return Ran(name, status, 1.0, receipt, "it went wrong" if status else "")

    monkeypatch.setattr(all_command, "run_one", run_one)
    return given


def test_every_bench_it_names_is_there() -> None:
    assert set(QUICK) == set(FULL) <= set(BENCHES)
    assert {"ops", "step", "prefix", "decode", "crossover", "psiv"} == set(QUICK)
    assert QUICK["crossover"][-1].endswith("16k")


def test_the_options_are_handed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = _fake(monkeypatch, {})
    words = ["all", "--quick", "--threads", "1", "--machine", "box", "--receipt-dir", str(tmp_path), "--seed", "4"]
    assert main(words) == 0
    assert list(given) == list(QUICK)
    for name, got in given.items():
        assert got[: len(QUICK[name])] == list(QUICK[name])
        assert got[len(QUICK[name]) :] == [
            *("--seed", "4", "--receipt-dir", str(tmp_path), "--threads", "1", "--machine", "box")
        ]


def test_one_that_fails_stops_no_other(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given = _fake(monkeypatch, {"step": 1, "decode": 78})
    assert main(["all", "--quick"]) == 1
    assert list(given) == list(QUICK)
    shown = capsys.readouterr()
    assert shown.out.count("FAILED") == 2
    assert "exit status 78" in shown.out
    assert "step:\nit went wrong" in shown.err


def test_one_without_a_receipt_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    _fake(monkeypatch, {}, silent=("psiv",))
    assert main(["all", "--quick"]) == 1
    assert main(["all", "--quick", "--only", "ops,step"]) == 0


@pytest.mark.parametrize("words", [["all", "--n", "3"], ["all", "--json"], ["loss-side", "--n", "3"]])
def test_options_that_would_change_nothing_are_not_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    given = _fake(monkeypatch, {})
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert given == {}
    assert words[1] in capsys.readouterr().err


def test_an_unknown_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_entry(main, ["all", "--only", "ops,spe"]) == 2
    assert "unknown benchmark 'spe'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_process(tmp_path: Path) -> None:
    words = ["--preset", "cpu_tiny", "--seq-len", "48", "--n", "2", "--threads", "1", "--receipt-dir", str(tmp_path)]
    ran = all_command.run_one("step", words, tmp_path)
    assert (ran.status, ran.said) == (0, "")
    assert ran.receipt is not None
    receipt = StepReceipt.model_validate(json.loads(ran.receipt.read_bytes()))
    assert receipt.command[:3] == ["fathom", "bench", "step"]
    assert all(size is None or size > 0 for size in receipt.peak_bytes.values())
    bad = all_command.run_one("step", ["--preset", "nosuch", "--receipt-dir", str(tmp_path)], tmp_path)
    assert (bad.status, bad.receipt) == (2, None)
    assert "unknown model preset" in bad.said
