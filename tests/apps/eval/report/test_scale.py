"""A log of 100,000 steps: what the report makes of it, how large the page is, and how long it takes (printed)."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path

import pytest

from apps.eval.report.__main__ import main
from apps.eval.report.charts import POINTS_DRAWN, Axes, Series, drawn_stretch, line_chart, running_mean, thinned
from apps.eval.report.load import load_run
from libs.flags.errors import run_entry
from libs.flags.runlog import log_path
from tests.support.browser import Browser

STEPS = 100_000
SPIKE = 54_321


def _loss(step: int) -> float:
    return 2 + 3 * math.exp(-step / 9000) + 0.1 * math.sin(step * 2.1) + (5 if step == SPIKE else 0)


def make_long(short: Path, run: Path) -> Path:
    """The run's log with its steps replaced by STEPS of them; the audit chain as it is."""
    records = [json.loads(line) for line in log_path(short).read_bytes().splitlines()]
    at = [i for i, record in enumerate(records) if record["event"] == "train.step"]
    step = records[at[0]]
    steps = [
        step
        | {
            "step": n,
            "tokens_total": 512 * n,
            "loss": _loss(n),
            "bpb": _loss(n),
            "cursor": step["cursor"] | {"index": n},
        }
        for n in range(1, STEPS + 1)
    ]
    before = [record for record in records[: at[0]] if record["event"] != "eval.result"]
    whole = [*before, *steps, records[-1]]
    log_path(run).parent.mkdir(parents=True)
    with log_path(run).open("w", encoding="ascii") as file:
        for number, record in enumerate(whole):
            file.write(json.dumps(record | {"mono_ns": number}, separators=(",", ":")) + "\n")
    shutil.copytree(short / "audit", run / "audit")
    return run


@pytest.mark.slow
def test_a_hundred_thousand_steps(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_long(run_dir, tmp_path / "long")
    started, cpu = time.perf_counter(), time.process_time()
    view = load_run(run)
    loaded = time.process_time() - cpu
    assert len(view.steps) == STEPS
    assert all(verdict.good is not False for verdict in view.verdicts), view.verdicts
    cpu = time.process_time()
    assert run_entry(main, [str(run)]) == 0
    built, wall = time.process_time() - cpu, time.perf_counter() - started
    page = run / "report.html"
    assert page.stat().st_size < 500_000
    with Browser(tmp_path / "profile") as browser:
        browser.look()
        begun = time.perf_counter()
        browser.open(page.as_uri())
        opened = time.perf_counter() - begun
        assert browser.js("document.querySelectorAll('svg').length") >= 6
        assert browser.js("performance.timing.loadEventStart - performance.timing.navigationStart") > 0
        assert browser.errors == []
        browser.screenshot(tmp_path / "long.png")
    with capsys.disabled():
        print(
            f"\n{STEPS} steps, {log_path(run).stat().st_size / 1e6:.0f} MB: read and checked in {loaded:.2f} s of CPU, "
            f"the whole command in {built:.2f} s of CPU (both together {wall:.2f} s by the clock); "
            f"page of {page.stat().st_size / 1e3:.0f} kB opened in {opened:.2f} s"
        )


def test_thinning_keeps_every_spike() -> None:
    values = [_loss(step) for step in range(1, STEPS + 1)]
    curve = Series("loss", list(range(1, STEPS + 1)), values, 1)
    kept = thinned(curve)
    assert len(kept.xs) <= POINTS_DRAWN
    assert list(kept.xs) == sorted(set(kept.xs))
    assert set(zip(kept.xs, kept.ys, strict=True)) <= set(zip(curve.xs, curve.ys, strict=True))
    assert (min(kept.ys), max(kept.ys)) == (min(values), max(values))
    assert (kept.xs[0], kept.xs[-1]) == (1, STEPS)
    assert kept.xs[kept.ys.index(max(kept.ys))] == SPIKE
    assert len(line_chart(Axes("step", "loss", "loss"), [curve])) < 30_000


def test_the_caption_says_what_is_drawn() -> None:
    """Two points of each stretch, and as many stretches as the words say."""
    for count in (POINTS_DRAWN, POINTS_DRAWN + 1, 880, STEPS):
        curve = thinned(Series("loss", range(count), [float(i % 7) for i in range(count)], 1))
        assert len(curve.xs) == pytest.approx(min(count, 2 * count / drawn_stretch(count)), rel=0.3)
        assert (drawn_stretch(count) == 1) == (len(curve.xs) == count)


def test_short_curves_and_marked_points_stay_whole() -> None:
    short = Series("loss", list(range(POINTS_DRAWN)), [0.0] * POINTS_DRAWN, 1)
    assert thinned(short) is short
    marked = Series("valid", list(range(2000)), [0.0] * 2000, 1, style="points")
    assert thinned(marked) is marked


@pytest.mark.parametrize("window", [1, 2, 7, 50])
def test_the_running_mean_is_the_slow_one(window: int) -> None:
    values = [math.sin(i) * 1000 for i in range(40)]
    slow = [sum(part) / len(part) for i in range(40) if (part := values[max(0, i - window + 1) : i + 1])]
    assert running_mean(values, window) == pytest.approx(slow)
