"""Pages about runs in a browser, and all pages side by side: every link leads somewhere; what is left out is said."""

from __future__ import annotations

import math
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from apps.eval.bench.receipt import write_receipt
from apps.eval.report.__main__ import main
from apps.eval.report.page import digits, environment
from libs.flags.audit_record import audit_path
from libs.flags.errors import run_entry
from tests.apps.eval.report.test_crossover_page import RATIOS, make
from tests.apps.eval.report.test_report import evaluated, make_result, report, scores_of
from tests.apps.eval.small_run import make_refused_run, make_run
from tests.support.browser import Browser


@pytest.fixture
def folder(tmp_path: Path, data_dir: Path) -> Path:
    """Two runs that trained, one that was refused, one whose chain was edited."""
    runs = tmp_path / "runs"
    for name in ("a", "b", "tampered <x>"):
        (runs / name).mkdir(parents=True)
        make_run(runs / name, data_dir, steps=20)
    (runs / "refused").mkdir()
    make_refused_run(runs / "refused", data_dir)
    chain = audit_path(runs / "tampered <x>")
    chain.write_bytes(chain.read_bytes().replace(b"never requested", b"never requestee", 1))
    return runs


def site(folder: Path, out: Path, *options: str) -> dict[str, str]:
    """Every page by its file name."""
    assert run_entry(main, ["all", str(folder), "--out", str(out), *options]) == 0
    return {path.name: path.read_text(encoding="utf-8") for path in out.iterdir()}


def test_every_link_leads_to_a_page_or_a_place(folder: Path, tmp_path: Path) -> None:
    receipts = tmp_path / "receipts"
    write_receipt(make(RATIOS), receipts)
    pages = site(folder, tmp_path / "out", "--receipts", str(receipts))
    runs = {f"run-{name}.html" for name in ("a", "b", "refused", "tampered <x>")}
    (crossover,) = (name for name in pages if name.startswith("crossover-"))
    assert set(pages) == {"index.html", "compare.html", "flags.html", "receipts.html", crossover} | runs
    for name, html in pages.items():
        found = set(re.findall(r"href=\"([^\"]+)\"", html))
        assert {"index.html", "flags.html", "receipts.html"} <= found, name
        for link in found:
            file, _, place = link.partition("#")
            target = pages[unquote(file) or name]
            assert not place or f'id="{place}"' in target, (name, link)
    index = pages["index.html"]
    assert {unquote(link) for link in re.findall(r"href=\"(run-[^\"]+)\"", index)} == runs
    assert "tampered (edit) at record" in index
    assert "FATHOM_PSIV_CACHE=yes" in index
    assert f'href="{crossover}"' in pages["receipts.html"]
    assert 'href="flags.html#gate-tma"' in pages["run-a.html"]


def test_what_has_no_page_is_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "empty" / "logs").mkdir(parents=True)
    pages = site(folder, tmp_path / "out")
    assert "empty has no page: no run log at" in pages["index.html"]
    few = site(folder, tmp_path / "few", "--limit", "1")
    assert "4 older runs have no page (--limit 1)" in few["index.html"]
    assert "compare.html" not in few
    (tmp_path / "file").write_text("")
    for options, said in (
        ([str(tmp_path / "nowhere")], "not a directory of runs"),
        ([str(folder), "--receipts", str(tmp_path / "nowhere")], "not a directory of receipts"),
        ([str(folder), "--kernels", str(tmp_path / "nowhere")], "cannot read the table of kernels"),
        ([str(folder), "--out", str(tmp_path / "file")], "this is a file"),
    ):
        assert run_entry(main, ["all", "--out", str(tmp_path / "none"), *options]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)])
def test_runs_in_a_browser(folder: Path, tmp_path: Path, width: int, dark: bool) -> None:
    """Run, refusal, comparison, list: no error, no sideways scrolling, tables that sort and filter, links that work."""
    site(folder, tmp_path / "out")
    with Browser(tmp_path / "profile") as browser:
        browser.look(width=width, dark=dark, phone=width < 600)
        for name in ("index", "run-a", "run-refused", "compare"):
            browser.open((tmp_path / "out" / f"{name}.html").as_uri())
            assert browser.js("document.documentElement.scrollWidth <= innerWidth"), name
            cut = "[...document.querySelectorAll('td, th')].some(e => e.scrollWidth > e.clientWidth + 1)"
            assert not browser.js(cut), name
            assert browser.errors == []
        browser.open((tmp_path / "out" / "run-a.html").as_uri())
        search = "document.querySelector('#gates input')"
        browser.js(f"{search}.focus()")
        browser.type("split retired")
        shown = (
            "[...document.querySelectorAll('#gates tbody tr')].filter(r => !r.hidden).map(r => r.cells[0].innerText)"
        )
        assert browser.js(shown) == ["register_split"]
        browser.js("document.querySelector('#checkpoints th button').click()")
        assert browser.js("document.querySelector('#checkpoints th').getAttribute('aria-sort')") == "ascending"
        browser.js("document.querySelector('nav a[href=\"index.html\"]').click()")
        browser.until("document.title === 'fathom: runs'")
        assert browser.js("document.querySelector('[aria-current]').textContent") == "Runs"
        assert browser.errors == []


def test_heat_maps_and_scores_in_a_browser(run_dir: Path, tmp_path: Path) -> None:
    """A needle result drawn: a cell for each length and depth; numbers with intervals sort by the number."""
    evaluated(run_dir)
    details = scores_of("needle")
    make_result(run_dir, "needle", details)
    report(run_dir)
    with Browser(tmp_path / "profile") as browser:
        browser.look(width=390, phone=True)
        browser.open((run_dir / "report.html").as_uri())
        assert browser.js("document.querySelectorAll('svg rect.share[fill-opacity]').length") == 13
        table = "[...document.querySelectorAll('#evaluation table')].find(t => t.innerText.includes('control'))"
        browser.js(f"{table}.querySelectorAll('th button')[4].click()")
        values = browser.js(f"[...{table}.tBodies[0].rows].map(r => Number(r.cells[4].innerText))")
        assert values == sorted(values)
        assert browser.errors == []


def test_numbers_that_begin_a_cell_sort_as_numbers(tmp_path: Path) -> None:
    """The script of every page: thousands, shares, intervals, negative ones; what is no number stays text."""
    script = environment().loader.get_source(environment(), "tables.js")[0]  # type: ignore[union-attr]
    cells = ["1,024", "512", "-3.5 (-4 to -3)", "12 of 20", "0.37 (0.32 to 0.42)", "2e-3"]
    rows = "".join(f"<tr><td>{cell}</td><td>{cell} x</td></tr>" for cell in cells)
    path = tmp_path / "t.html"
    table = f"<table class=sortable><thead><tr><th>n</th><th>t</th></tr></thead><tbody>{rows}</tbody></table>"
    path.write_text(f"<!doctype html><title>t</title>{table}<script>{script}</script>")
    with Browser(tmp_path / "profile") as browser:
        browser.open(path.as_uri())
        browser.js("document.querySelector('th button').click()")
        got = browser.js("[...document.querySelector('table').tBodies[0].rows].map(r => r.cells[0].innerText)")
        assert got == ["-3.5 (-4 to -3)", "2e-3", "0.37 (0.32 to 0.42)", "12 of 20", "512", "1,024"]
        assert browser.errors == []


@pytest.mark.parametrize(
    ("value", "count", "text"),
    [
        (0.041234, 4, "0.04123"),
        (411.52, 4, "411.5"),
        (9999.7, 4, "10,000"),
        (10231.4, 4, "10,231"),
        (1110, 3, "1,110"),
        (999.4, 3, "999"),
        (999.5, 3, "1,000"),
        (math.inf, 4, "inf"),
    ],
)
def test_digits_without_an_exponent(value: float, count: int, text: str) -> None:
    assert digits(value, count) == text
