"""The pages of receipts, gates and kernels: complete, self-contained, honest about what is unreadable; in a browser."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from apps.eval.bench.kernel_table import GridRow, KernelRow, KernelTable
from apps.eval.bench.receipt import Aim, Check, Code, Comparison, Hardware, Receipt, Sampled, write_receipt
from apps.eval.report.__main__ import main
from apps.eval.report.receipts_page import load_receipts
from libs.flags.audit import AuditLog
from libs.flags.audit_record import audit_path
from libs.flags.catalog import CATALOG
from libs.flags.compare import GateChange
from libs.flags.errors import run_entry
from libs.flags.evidence import Scope
from libs.flags.installed import record_changes
from tests.support.browser import Browser


def make_receipt(subject: str, ratio: float, *, scope: Scope = "step", day: int = 2, what: str = "a test") -> Receipt:
    a = [1.0 + 0.01 * (i % 3) for i in range(9)]
    b = [ratio * x * (1 + 0.001 * (i % 4)) for i, x in enumerate(a)]
    arms = [Sampled.of(name, name, times, flops=None, warm_up=True) for name, times in (("a", a), ("b", b))]
    comparison = Comparison.of(*arms, scope=scope, gate=("psiv_cache", "off", "gmem_pool"))
    hardware = Hardware(
        machine="Box", device="cpu", cpu="x", cpu_count=1, cpu_affinity=1, threads=1, memory_bytes=1, load_before=0.0
    )
    return Receipt(
        what=what, subject=subject, created=f"2026-01-0{day}T03:04:05.000000Z", command=["fathom", "bench"],
        code=Code(version="0", git_commit="0" * 40, git_dirty=False, git_dirty_hash=None, git_reason=None), config={},
        config_hash="c", gates_hash="g", gates={}, hardware=hardware, versions={"torch": "2"},
        correctness=[Check(name="loss", error=0.0, tolerance=1.0, passed=True)], contenders=arms,
        ratios=[comparison.ratio], memory=[], aims=[], left_out=[], notes=["a note"], comparison=comparison,
        decision=comparison.decision(),
    )  # fmt: skip


@pytest.fixture
def receipts(tmp_path: Path) -> Path:
    """Kept, rejected, noise by the forward alone; one that says more than the common schema; one that is damaged."""
    folder = tmp_path / "receipts"
    write_receipt(make_receipt("step_psiv_cache", 0.95, day=2), folder)
    write_receipt(make_receipt("step_tma", 1.10, day=3, what="<script>alert(1)</script>"), folder)
    path = write_receipt(make_receipt("forward_psiv_cache", 0.80, scope="forward", day=4), folder)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"traffic": [1]}))
    bad = folder / "2026-01-01_ops_box" / "receipt.json"
    bad.parent.mkdir()
    bad.write_text("{}")
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Chains by the real code: psiv_cache active, refused, changed on resume; and one that was tampered with."""
    folder = tmp_path / "runs"
    for name in ("on", "refused", "changed", "tampered"):
        audit = AuditLog.open(audit_path(folder / name), name, 0)
        event = "active" if name == "on" else "refused" if name == "refused" else "off"
        reason = "no <stage> here" if name == "refused" else "requested"
        audit.record(event, gate="psiv_cache", value="gmem_pool", reason=reason, source="FATHOM_PSIV_CACHE")
        if name == "refused":
            audit.record("refused", value="1", reason="no such gate", source="FATHOM_TMAA")
        if name == "changed":
            record_changes([GateChange("tma", "off", "fwd")], audit, None)
        audit.close()
    path = audit_path(folder / "tampered")
    path.write_bytes(path.read_bytes().replace(b"requested", b"requestee"))
    return folder


def page(words: Sequence[str], out: Path) -> str:
    assert run_entry(main, [*words, "--out", str(out)]) == 0
    html = out.read_text(encoding="utf-8")
    assert html.count("<script>") == 1, "the one script, and nothing of the data's"
    assert not re.search(r"(src|href)=\"(?!#)", html)
    assert not re.search(r"https?:|url\(|@import", html)
    assert re.search(r"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-[A-Za-z0-9+/=]{44}'", html)
    assert 'name="viewport"' in html
    assert "prefers-color-scheme:dark" in html
    return html


def test_receipts(receipts: Path, tmp_path: Path) -> None:
    html = page(["receipts", str(receipts)], tmp_path / "receipts.html")
    for text in ("chip kept", "chip rejected", "chip noise", "faster beyond noise", "only the whole step decides"):
        assert text in html
    assert "2026-01-01_ops_box/receipt.json is no receipt" in html
    assert "&lt;script&gt;alert(1)" in html
    assert html.index("forward_psiv_cache") < html.index("step_tma") < html.index("step_psiv_cache"), "newest first"
    assert len(load_receipts(receipts).found) == 3


def test_no_receipts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert "No receipt is here yet" in page(["receipts", str(tmp_path / "empty")], tmp_path / "r.html")
    assert run_entry(main, ["receipts", str(tmp_path / "nowhere"), "--out", str(tmp_path / "x.html")]) == 2
    assert "not a directory of receipts" in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()


def test_flags(runs: Path, tmp_path: Path) -> None:
    html = page(["flags", str(runs)], tmp_path / "flags.html")
    for spec in CATALOG.values():
        assert f"<code>{spec.name}</code>" in html
        assert spec.summary in html.replace("&#39;", "'")
    row = next(line for line in html.splitlines() if "<code>psiv_cache</code>" in line)
    assert re.findall(r'<td class="n">(\d+)</td>', row) == ["1", "1", "1"]  # active, refused, off
    assert "no &lt;stage&gt; here" in html
    assert "FATHOM_TMAA" in html
    assert "the checkpoint had off" in html
    assert "tampered (edit) at record 0" in html
    alone = page(["flags"], tmp_path / "alone.html")
    assert "Audit chains" not in alone
    assert "infra/decisions/0002-register-split-rejected.md" in alone


def kernel_row(kernel: str, gates: str, registers: int, problems: Sequence[str] = ()) -> KernelRow:
    return KernelRow.model_validate({
        "kernel": kernel, "gates": gates, "mode": "plain" if gates == "off" else "tma",
        "N": 64, "P": 64, "R": 4, "C": 16, "threads": 128, "registers": registers, "registers_needed": registers + 2,
        "spill_bytes": 8 * len(problems), "spill_bytes_allowed": 0, "shared_bytes": 1024 * registers,
        "blocks_per_multiprocessor": 2, "occupancy": 0.125, "tma_loads": 1, "bulk_copies": 2, "tma_stores": 1,
        "async_copies": 0, "wgmma": 4, "mma": 0, "tma_ranks": [2], "problems": list(problems),
    })  # fmt: skip


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    """Three kernels, one with a problem; one launch; one aim that is not met."""
    rows = [
        kernel_row("fwd", "off", 168),
        kernel_row("fwd", "tma", 96),
        kernel_row("bwd_bwd", "off", 255, ["<spills>"]),
    ]
    launch = GridRow(
        kernel="fwd", B=1, S=8192, H=16, split="auto", splits=8, grid=(8, 16, 1), blocks=128, busy_multiprocessors=128
    )
    aim = Aim(name="kernels with spills", measured=1, relation="<=", target=0, met=False)
    table = KernelTable(versions={"nvcc": "13.0"}, multiprocessors=132, kernels=rows, grids=[launch], aims=[aim])
    path = tmp_path / "kernels.json"
    path.write_text(table.model_dump_json())
    return path


def test_kernels(kernels: Path, tmp_path: Path) -> None:
    html = page(["kernels", str(kernels)], tmp_path / "kernels.html")
    row = next(line for line in html.splitlines() if line.startswith("<tr><td><code>bwd_bwd</code>"))
    for cell in ("255", "257", "255.0 KiB", "12.5 %", "&lt;spills&gt;", "chip bad"):
        assert cell in row
    assert "bwd_bwd (off, N=64): &lt;spills&gt;" in html
    assert "8 x 16 x 1" in html
    assert "not run" in html
    assert "nvcc 13.0" in html


@pytest.mark.parametrize(("content", "said"), [(None, "No such file"), ("[]", "is no table"), ("{", "is no table")])
def test_no_table_of_kernels(
    content: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "kernels.json"
    if content is not None:
        path.write_text(content)
    assert run_entry(main, ["kernels", str(path), "--out", str(tmp_path / "k.html")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "fathom bench kernels --json > FILE" in error
    assert not (tmp_path / "k.html").exists()


_FIRST = "[...document.querySelector('table').tBodies[0].rows].filter(r => !r.hidden).map(r => r.cells[{}].textContent)"


@pytest.mark.parametrize("name", ["receipts", "flags"])
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)])
def test_in_a_browser(name: str, width: int, dark: bool, receipts: Path, runs: Path, tmp_path: Path) -> None:
    """No error, tables that sort and filter from the keyboard, no sideways scrolling of the page on a phone."""
    out = tmp_path / f"{name}.html"
    page([name, str(receipts if name == "receipts" else runs)], out)
    with Browser(tmp_path / "profile") as browser:
        browser.look(width=width, dark=dark, phone=width < 600)
        browser.open(out.as_uri())
        assert browser.js("document.documentElement.scrollWidth <= innerWidth")
        light = browser.js("getComputedStyle(document.body).backgroundColor")
        assert (light == "rgb(20, 24, 28)") == dark
        names = browser.js(_FIRST.format(0))
        # By keyboard: to the first heading's button, and press it twice.
        browser.js("document.querySelector('table.sortable th button').focus()")
        browser.press("Enter")
        assert browser.js(_FIRST.format(0)) == sorted(names)
        assert browser.js("document.querySelector('th').getAttribute('aria-sort')") == "ascending"
        browser.press(" ")
        assert browser.js(_FIRST.format(0)) == sorted(names, reverse=True)
        browser.press("Tab")
        assert browser.js("document.activeElement.textContent") in ("subject", "stage")
        browser.js("document.querySelector('input[type=search]').focus()")
        browser.type("psiv_cache kept" if name == "receipts" else "psiv_cache")
        assert len(browser.js(_FIRST.format(0))) == 1
        assert browser.js("document.querySelector('.bar output').value").startswith("1 of ")
        browser.js("document.querySelector('input[type=search]').value = ''")
        facet = "document.querySelector('.bar select')"
        browser.js(f"{facet}.selectedIndex = 1; {facet}.dispatchEvent(new Event('change'))")
        assert 0 < len(browser.js(_FIRST.format(0))) < len(names)
        browser.screenshot(tmp_path / f"{name}-{width}.png")
        assert browser.errors == []


_SHOWN = "[...document.querySelector('#kernels table').tBodies[0].rows].filter(r => !r.hidden)"
_COLUMN = _SHOWN + ".map(r => r.cells[{}].innerText)"


@pytest.mark.parametrize(("width", "dark"), [(1200, True), (390, False)])
def test_kernels_in_a_browser(width: int, dark: bool, kernels: Path, tmp_path: Path) -> None:
    """Sizes sort by their bytes and not by their text; a kernel and a gate setting can be chosen."""
    out = tmp_path / "kernels.html"
    page(["kernels", str(kernels)], out)
    with Browser(tmp_path / "profile") as browser:
        browser.look(width=width, dark=dark, phone=width < 600)
        browser.open(out.as_uri())
        assert browser.js("document.documentElement.scrollWidth <= innerWidth")
        browser.js("document.querySelectorAll('#kernels th button')[6].click()")
        assert browser.js(_COLUMN.format(6)) == ["96.0 KiB", "168.0 KiB", "255.0 KiB"]
        facet = "document.querySelector('#kernels select')"
        browser.js(f"{facet}.value = 'fwd'; {facet}.dispatchEvent(new Event('change'))")
        assert browser.js(_COLUMN.format(1)) == ["tma", "off"]
        assert browser.errors == []


def test_the_browser_test_sees_an_error(tmp_path: Path) -> None:
    """A script that throws, one that the page's policy refuses, and one that complains."""
    for number, html in enumerate(
        (
            "<script>undefinedName()</script>",
            "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\"><script>1</script>",
            "<script>console.error('bad')</script>",
        )
    ):
        path = tmp_path / f"{number}.html"
        path.write_text(f"<!doctype html><title>x</title>{html}")
        with Browser(tmp_path / f"profile{number}") as browser:
            browser.open(path.as_uri())
            assert browser.errors, html
