"""The report as a file: complete, self-contained, honest about what is missing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from apps.eval.__main__ import main as eval_main
from apps.eval.report.__main__ import main
from apps.eval.report.build import render
from apps.eval.report.compare import names, warnings
from apps.eval.report.load import load_run
from apps.eval.results import Estimate, EvalReport, PrefixUse, QuestionScores, Score, read_result, write_result
from libs.flags.audit_record import audit_path
from libs.flags.catalog import CATALOG
from libs.flags.errors import run_entry
from libs.flags.events import AnomalyNonfinite, CheckpointRestore, RunStart, SignalReceived
from libs.flags.facts import Facts
from libs.flags.logcheck import check_log
from libs.flags.resolve import resolve
from libs.flags.runlog import RunLog, log_path
from tests.apps.eval.small_run import RUN_ID, make_refused_run, make_run, open_records, train_step


class Page(HTMLParser):
    """Collects tags, references and text; checks that every tag that must be closed is."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})
    IN_SVG = frozenset({"line", "rect", "circle", "polyline"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.ids: set[str] = set()
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.references += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "data", "action", "srcset")]
        if values.get("id"):
            self.ids.add(str(values["id"]))
        if tag not in self.VOID and tag not in self.IN_SVG:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.IN_SVG:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def report(run_dir: Path) -> tuple[Page, str]:
    assert run_entry(main, [str(run_dir)]) == 0
    html = (run_dir / "report.html").read_text(encoding="utf-8")
    return Page(html), html


def check_offline(page: Page, html: str) -> None:
    """Nothing that a browser would fetch, and nothing that it would run but the one script of the page's policy."""
    assert page.tags.count("script") == 1
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html
    html = html.replace(script, "")
    assert not {"img", "link", "iframe", "object", "embed", "video", "audio", "base"} & set(page.tags)
    assert all(reference.startswith("#") for reference in page.references)
    assert {reference[1:] for reference in page.references} <= page.ids
    assert not re.search(r"https?:|//[a-z]|url\(|@import", html)
    assert "default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-" in html


def test_a_finished_run_with_an_evaluation(run_dir: Path) -> None:
    assert (
        run_entry(eval_main, ["--checkpoint", str(run_dir), "--suite", "loss_by_position", "--max-tokens", "2k"]) == 0
    )
    page, html = report(run_dir)
    check_offline(page, html)
    for title in ("Bits per byte", "Training loss", "Bits per byte by position", "What context is worth", "Throughput"):
        assert title in page.text
    for title in ("Memory", "Where a step's time goes", "Gates", "Records", "Checkpoints", "Config", "Environment"):
        assert title in page.text
    assert page.tags.count("svg") >= 9
    result = json.loads((run_dir / "eval" / "loss_by_position.json").read_text())
    assert f"{result['details']['bpb']['value']:.4f}" in page.text
    for compressor in result["details"]["compression"]["compressors"]:
        assert f"{compressor['per_document_bpb']:.3f}" in page.text
    for item in result["excluded"]:
        assert item["reason"] in page.text
    assert "50% lower" in page.text  # validation 8.0 at step 0, 4.0 at step 40
    assert "intact: " in page.text
    assert "command line --optim.lr" in page.text
    assert "prefers-color-scheme:dark" in html
    assert 'name="viewport"' in html
    assert str(run_dir / "report.html") not in html


def make_result(run_dir: Path, suite: str, details: QuestionScores) -> EvalReport:
    """A result of another suite, made of the one that is there."""
    model = read_result(run_dir / "eval" / "loss_by_position.json")
    result = model.model_copy(update={"suite": suite, "details": details, "metrics": {}})
    write_result(result, "", run_dir / "eval" / f"{suite}.json")
    return result


def score(metric: str, value: float, chance: float | None = None, **axes: str | int | float) -> Score:
    bounds = Estimate(value=value, low=value - 0.05, high=value + 0.05)
    return Score(axes=axes, metric=metric, n=20, units=5, estimate=bounds, chance=chance)


def scores_of(suite: str, shift: float = 0.0) -> QuestionScores:
    cells = {
        "needle": [
            score(metric, (length + 1000 * depth) / 30_000 + shift, chance, length=length, depth=depth)
            for metric, chance in (("exact_match", 0.0), ("choice", 0.25))
            for length in (1024, 16384) for depth in (0.0, 0.5, 1.0)
        ],
        "scope": [score("right", 0.61 + shift, 0.5, kind="real", length=1024, distance=128)],
        "callgraph": [],
        "completion": [
            score("edit_similarity", 0.4 + shift, span=span, order=order)
            for span in ("line", "node") for order in ("psm", "spm")
        ],
    }  # fmt: skip
    totals = {
        "needle": [score("choice", 0.4 + shift, 0.25, kind="single", length=1024), score("choice", 0.37 + shift, 0.25),
                   score("choice", 0.377 + shift, 0.25, length=1024)],
        "scope": [score("right", 0.62 + shift, 0.5, kind="real", distance=d) for d in (128, 512)],
        "callgraph": [score("edit_similarity", 0.123 + shift, context=c) for c in ("none", "same_file", "full")],
        "completion": [score("edit_similarity", 0.456 + shift, order="psm")],
    }  # fmt: skip
    use = PrefixUse(
        mode="snapshots", prompt_tokens=1000, matched_tokens=900, skipped_tokens=876, computed_tokens=124, verified=3,
        note="same bits",
    )  # fmt: skip
    return QuestionScores(
        kind=suite,  # type: ignore[arg-type]
        metrics=dict.fromkeys(("exact_match", "choice", "right", "edit_similarity"), "share of what is meant"),
        cells=cells[suite], totals=totals[suite], control=[score("choice", 0.251, 0.25)], prefix=use,
        trained_window=128,
    )  # fmt: skip


def evaluated(run_dir: Path) -> None:
    arguments = [
        "--checkpoint",
        str(run_dir),
        "--suite",
        "loss_by_position",
        "--max-documents",
        "4",
        "--span-tokens",
        "32",
    ]
    assert run_entry(eval_main, arguments) == 0


def test_suites_that_ask_questions(run_dir: Path) -> None:
    evaluated(run_dir)
    for suite in ("needle", "scope", "callgraph", "completion"):
        make_result(run_dir, suite, scores_of(suite))
    page, html = report(run_dir)
    check_offline(page, html)
    for title in ("Needles answered", "Needles chosen among four", "Right names by distance", "Next line by context"):
        assert title in page.text
    assert "876 of 1,000 prompt tokens skipped" in page.text
    assert "verified 3: same bits" in page.text
    assert "control: all" in page.text
    # The heat map in words: every cell, in the description that stands for the picture.
    (spoken,) = [text for text in re.findall(r'aria-label="([^"]*)"', html) if text.startswith("Needles answered")]
    for length in ("1k", "16k"):
        for depth in ("0%", "50%", "100%"):
            assert f"{length} tokens, depth {depth}: exact_match" in spoken
    assert "0.546 (0.496 to 0.596), n = 20" in spoken  # 16384 tokens, depth 0
    shades = [float(x) for x in re.findall(r'fill-opacity="([\d.]+)"', html)]
    assert len(shades) == 13  # two maps of 2 x 3, and one kind at one length
    assert sorted(shades)[0] < sorted(shades)[-1]


def test_a_comparison_shows_what_differs_and_results_side_by_side(tmp_path: Path, data_dir: Path) -> None:
    runs = []
    for number, (steps, shift) in enumerate(((20, 0.0), (40, 0.1))):
        run = tmp_path / f"run{number}"
        run.mkdir()
        make_run(run, data_dir, steps=steps)
        evaluated(run)
        make_result(run, "needle", scores_of("needle", shift))
        runs.append(run)
    config = json.loads((log := log_path(runs[1])).read_text().splitlines()[1])
    assert config["event"] == "config.resolved"
    log.write_text(log.read_text().replace('"lr":0.001', '"lr":0.5'))
    out = tmp_path / "compare.html"
    assert run_entry(main, ["compare", *map(str, runs), "--out", str(out)]) == 0
    html = out.read_text()
    page = Page(html)
    check_offline(page, html)
    differs = html[html.index('id="differences"') : html.index('id="curves"')]
    assert "optim.lr" in differs
    assert "<td>0.001</td><td>0.5</td>" in differs
    assert "data.window" not in differs, "the same in both"
    assert "0.3700 (0.3200 to 0.4200)" in page.text
    assert "0.4700 (0.4200 to 0.5200)" in page.text
    for title in ("Training", "Validation", "Bits per byte by position", "Needles chosen among four"):
        assert title in page.text
    bpb = [read_result(run / "eval" / "loss_by_position.json").details.bpb.value for run in runs]
    assert all(f"{value:.4f}" in page.text for value in bpb)
    assert "not of the same questions" not in page.text


def test_results_of_other_questions_are_said_to_be_so(tmp_path: Path, data_dir: Path) -> None:
    runs = []
    for number in range(2):
        run = tmp_path / f"run{number}"
        run.mkdir()
        make_run(run, data_dir, steps=20)
        arguments = ["--checkpoint", str(run), "--suite", "loss_by_position", "--span-tokens", "32"]
        assert run_entry(eval_main, [*arguments, "--max-documents", str(4 + number)]) == 0
        runs.append(run)
    found = warnings([load_run(run) for run in runs])
    assert len(found) == 1
    assert "loss_by_position: what was scored differ" in found[0]


def test_runs_are_named_by_what_tells_them_apart(tmp_path: Path, data_dir: Path) -> None:
    """Equal recipes: by id; a copied run has the id too: by folder."""
    for name in ("one", "copy"):
        (tmp_path / name).mkdir()
        make_run(tmp_path / name, data_dir, steps=2)
    one, copy = load_run(tmp_path / "one"), load_run(tmp_path / "copy")
    assert names([one, copy]) == ["one", "copy"]
    assert names([one, copy._replace(run_id="other")]) == [RUN_ID, "other"]
    assert names([one, copy._replace(recipe="cpu_demo")]) == ["cpu_tiny", "cpu_demo"]


def test_a_comparison_needs_two_different_runs(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for runs, message in (([run_dir], "2 to 5"), ([run_dir, run_dir], "twice"), ([run_dir, tmp_path], "not a run")):
        assert run_entry(main, ["compare", *map(str, runs), "--out", str(tmp_path / "c.html")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "c.html").exists()


def test_every_gate_shows_its_outcome_and_stage(run_dir: Path) -> None:
    view = load_run(run_dir)
    gates = resolve({}, Facts())
    assert [(g.gate, g.outcome, g.stage) for g in view.gates] == [
        (r.gate, str(r.outcome), str(r.stage)) for r in gates.resolutions
    ]
    page, html = report(run_dir)
    for resolution in gates.resolutions:
        assert resolution.gate in page.text
    rows = {name: next(line for line in html.splitlines() if f"<code>{name}</code>" in line) for name in CATALOG}
    assert "<td>infra/decisions/0002-register-split-rejected.md</td>" in rows["register_split"]
    assert "<td>none</td>" in rows["psiv_cache"], "nothing has been shown of it"


def test_a_run_without_an_evaluation_says_so(run_dir: Path) -> None:
    page, html = report(run_dir)
    check_offline(page, html)
    assert "No evaluation has been run" in page.text
    assert "zlib" not in page.text


def test_a_refused_run(tmp_path: Path, data_dir: Path) -> None:
    run_dir = tmp_path / RUN_ID
    run_dir.mkdir()
    page, html = report(make_refused_run(run_dir, data_dir))
    check_offline(page, html)
    assert "No training step was recorded" in page.text
    assert "FATHOM_PSIV_CACHE=yes" in page.text
    assert "FATHOM_PSVI_CACHE=off" in page.text
    assert "no such gate" in page.text
    outcomes = {gate.gate: gate.outcome for gate in load_run(run_dir).gates}
    assert outcomes["psiv_cache"] == outcomes["tma"] == "refused"
    assert outcomes["split_scan"] == "not resolved"
    assert "active" not in outcomes.values()
    assert "svg" not in page.tags


def test_a_tampered_chain_is_shown(run_dir: Path) -> None:
    chain = audit_path(run_dir)
    chain.write_bytes(chain.read_bytes().replace(b"never requested", b"never requestee", 1))
    page, _ = report(run_dir)
    assert "tampered: tampered (edit)" in page.text
    bad = [verdict for verdict in load_run(run_dir).verdicts if verdict.good is False]
    assert {verdict.what for verdict in bad} == {"audit chain, rank 0", "run log"}


@pytest.mark.parametrize("event", ["run.start", "config.resolved", "train.step", "checkpoint.commit", "run.stop"])
@pytest.mark.parametrize("change", ["drop", "text"])
def test_a_damaged_line_is_left_out_and_said(run_dir: Path, event: str, change: str) -> None:
    """Each field of an event gone, or text in its place: never a traceback, and no word of it hidden."""
    lines = log_path(run_dir).read_text().splitlines()
    at, record = next((i, r) for i, line in enumerate(lines) if (r := json.loads(line))["event"] == event)
    for field in record:
        changed = {name: value for name, value in record.items() if name != field}
        if change == "text":
            changed[field] = "<q>"
        log_path(run_dir).write_text("\n".join([*lines[:at], json.dumps(changed), *lines[at + 1 :]]) + "\n")
        if check_log(run_dir).violations == ():  # a text where any text may stand
            continue
        view = load_run(run_dir)
        assert any(verdict.good is False for verdict in view.verdicts), field
        if view.problems:
            assert f"the first at line {at + 1}: " in view.problems[0], field
        assert "<q>" not in render(view)


def test_a_crashed_and_resumed_run_counts_each_step_once(run_dir: Path, data_dir: Path) -> None:
    lines = log_path(run_dir).read_bytes().splitlines(keepends=True)
    log_path(run_dir).write_bytes(b"".join(lines[:-1]))  # no run.stop: a crash after step 40
    gates = resolve({}, Facts())
    log, audit = open_records(run_dir, data_dir, gates, attempt=1)
    log.emit(CheckpointRestore(path="checkpoints/step-00000020"), step=20)
    log.emit(train_step(21), step=21)
    log.emit(SignalReceived(signal="SIGTERM", phase="training"))
    log.emit(AnomalyNonfinite(what="loss", value=float("nan"), bundle=None, action="stop"), step=22)
    log.close()
    audit.close()
    view = load_run(run_dir)
    assert [event["step"] for event in view.steps] == list(range(1, 22))
    assert view.steps[-1]["attempt"] == 1
    assert [event["step"] for event in view.validations] == [0, 20]
    assert view.training.status is None
    page, html = report(run_dir)
    check_offline(page, html)
    assert "no run.stop" in page.text
    assert "SIGTERM in training" in page.text
    assert "loss: stop" in page.text


def test_text_of_the_run_is_escaped(tmp_path: Path, data_dir: Path) -> None:
    run_dir = tmp_path / RUN_ID
    run_dir.mkdir()
    make_run(run_dir, data_dir, steps=2)
    log = RunLog.open(run_dir, run_id=RUN_ID, attempt=1)
    hostile = "<script>alert(1)</script><img src=http://x>"
    log.emit(RunStart(command=[hostile], recipe=hostile, config_hash="c", gates_hash=None, world_size=1))
    log.close()
    page, html = report(run_dir)
    check_offline(page, html.replace("http://x", ""))
    assert "img" not in page.tags
    assert page.references
    assert "&lt;script&gt;" in html


def test_a_damaged_result_is_reported_not_hidden(run_dir: Path) -> None:
    (run_dir / "eval").mkdir()
    (run_dir / "eval" / "loss_by_position.json").write_text("{}")
    page, _ = report(run_dir)
    assert "is no evaluation result of this version" in page.text
    assert "make it again: fathom eval --checkpoint RUN --suite loss_by_position" in page.text


def test_refusals_of_the_command(tmp_path: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_entry(main, [str(tmp_path / "nothing")]) == 2
    assert "no run at" in capsys.readouterr().err
    assert run_entry(main, [str(run_dir), "--out", str(tmp_path)]) == 2
    assert "--out" in capsys.readouterr().err
    empty = tmp_path / "empty"
    RunLog.open(empty, run_id="x", attempt=0).close()
    assert run_entry(main, [str(empty)]) == 2
    assert not (empty / "report.html").exists()
    assert run_entry(main, [str(run_dir), "--out", str(tmp_path / "there.html")]) == 0
    assert (tmp_path / "there.html").is_file()
