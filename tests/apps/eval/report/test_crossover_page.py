"""The page of a crossover sweep: what it draws, that it stays legible, and that a browser has nothing against it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from apps.eval.bench.crossover import CrossoverReceipt, Point, contender_name, crossings_of, decision_of, ratios_of
from apps.eval.bench.crossover_job import MODELS
from apps.eval.bench.modelled import Modelled
from apps.eval.bench.receipt import Check, Code, Hardware, LeftOut, Sampled
from apps.eval.report.crossover_page import crossover_page, figures
from tests.support.browser import Browser

RATIOS = {4096: 1.4, 6144: 1.2, 8192: 1.05, 12288: 0.9, 16384: 0.75}


def make(ratios: dict[int, float], *, pairs: int = 3, modelled: list[Modelled] | None = None) -> CrossoverReceipt:
    """The hybrid takes these shares of its twin's time."""
    contenders, points = [], []
    for seq_len, ratio in ratios.items():
        for model in MODELS:
            times = [(ratio if model == "hybrid" else 1.0) * seq_len / 1e4 * (1 + 0.01 * i) for i in range(pairs)]
            times = [t * (1 + 0.004 * i if model == "hybrid" else 1.0) for i, t in enumerate(times)]
            sampled = Sampled.of(contender_name(model, seq_len), "a step", times, flops=None, warm_up=True)
            contenders.append(sampled)
            points.append(
                Point(
                    model=model, seq_len=seq_len, rounds=pairs, seconds=sampled.mean_s,
                    tokens_per_s=seq_len / sampled.mean_s, peak_bytes=seq_len * 60_000,
                    flops_per_token=1e6 * (20 if model == "hybrid" else 10 + seq_len / 1024),
                )
            )  # fmt: skip
    crossings = crossings_of(points, contenders, modelled or [], seed=0)
    hardware = Hardware(
        machine="Box", device="cpu", cpu="x", cpu_count=1, cpu_affinity=1, threads=1, memory_bytes=1, load_before=0.0
    )
    return CrossoverReceipt(
        what="training step of cpu_demo against its dense twin", subject="crossover",
        created="2026-01-02T03:04:05.000000Z", command=["fathom", "bench", "crossover"],
        code=Code(version="0", git_commit="0" * 40, git_dirty=False, git_dirty_hash=None, git_reason=None), config={},
        config_hash="c", gates_hash="g", gates={}, hardware=hardware, versions={"torch": "2"},
        correctness=[Check(name="loss", error=0.0, tolerance=1.0, passed=True)], contenders=contenders,
        ratios=ratios_of(points, contenders), memory=[], aims=[], parameters={"hybrid": 1000, "twin": 1001}, seed=0,
        points=points, crossings=crossings, modelled=modelled or [],
        left_out=[LeftOut(name="S=65536", reason="no <time>")], notes=["a note"],
        decision=decision_of(crossings),
    )  # fmt: skip


def modelled_rows() -> list[Modelled]:
    times = {("hybrid", 4096): 0.3, ("twin", 4096): 0.2, ("hybrid", 16384): 0.2, ("twin", 16384): 0.3}
    return [
        Modelled.model_validate({
            "slice": "v6e-4", "recipe": f"v6e_{seq_len}_{model}", "model": model, "seq_len": seq_len,
            "tokens_per_step": 65536, "parameters": 1000, "flops_per_token": 1e9, "seconds": seconds,
            "peak_bytes": 2**33, "uncounted": 0, "note": None, "source": "x.json", "source_sha256": "0" * 64,
        })
        for (model, seq_len), seconds in times.items()
    ]  # fmt: skip


def test_the_page_says_where_they_cross_and_what_is_missing() -> None:
    receipt = make(RATIOS)
    page = crossover_page(receipt)
    assert receipt.crossings[0].sentence() in page
    assert 8192 < float(receipt.crossings[0].tokens or 0) < 12288
    assert "S=65536: no &lt;time&gt;" in page
    assert "MODELLED" not in page
    assert page.count("<tr>") >= len(RATIOS)
    assert not re.search(r"(?:src|href)=\"(?!#)", page), "nothing outside itself"


def test_the_crossing_is_drawn_where_it_is() -> None:
    """At a ratio of 1, between the two lengths around it; without one there is no mark."""
    crossed, apart = (str(figures(make(ratios))[0].chart) for ratios in (RATIOS, dict.fromkeys(RATIOS, 1.5)))
    assert "crossing: 1" in crossed
    assert "crossing: 1" not in apart
    dots = [float(x) for x in re.findall(r'class="dot c1" cx="([\d.]+)"', crossed)]
    (mark,) = (float(x) for x in re.findall(r'class="dot c3" cx="([\d.]+)"', crossed))
    assert dots[2] < mark < dots[3]


def test_one_length_or_one_pair_can_be_shown() -> None:
    assert "no crossing can be seen" in crossover_page(make({4096: 1.2}))
    assert "95 %: " not in crossover_page(make(RATIOS, pairs=1)).split("<details>")[0].split("<table")[0]


def test_modelled_rows_stand_apart() -> None:
    page = crossover_page(make(RATIOS, modelled=modelled_rows()))
    measured, modelled = page.split("<h2>Modelled, never measured</h2>")
    assert "v6e_4096_hybrid" not in measured
    assert modelled.count("<td>modelled</td>") == 4
    assert "Never run on such a device" in modelled


@pytest.mark.parametrize("phone", [False, True])
def test_in_a_browser(tmp_path: Path, phone: bool) -> None:
    path = tmp_path / "crossover.html"
    path.write_text(crossover_page(make(RATIOS, modelled=modelled_rows())), encoding="utf-8")
    with Browser(tmp_path / "profile") as browser:
        browser.look(width=390 if phone else 1200, dark=phone, phone=phone)
        browser.open(path.as_uri())
        assert browser.errors == []
        assert browser.js("document.querySelectorAll('figure svg').length") == 5
        assert browser.js("document.documentElement.scrollWidth <= window.innerWidth")
        browser.js("document.querySelectorAll('th button')[0].click()")
        browser.js("document.querySelectorAll('th button')[0].click()")
        assert browser.js("document.querySelector('tbody td').textContent") in ("16,384", "4,096")
        browser.screenshot(tmp_path.parent / f"crossover-{'phone' if phone else 'desk'}.png")
