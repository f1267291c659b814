"""`fathom flags ...`: exit statuses of a real process, JSON and tables of this one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from libs.flags.audit_record import audit_path
from libs.flags.catalog import CATALOG
from libs.flags.cli import main_flags
from libs.flags.errors import run_entry
from libs.flags.events import SignalReceived
from libs.flags.registry import GateSpec
from libs.flags.runlog import RunLog, log_path, read_events

ROOT = Path(__file__).resolve().parents[3]
Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def _no_gates_in_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.upper().startswith("FATHOM_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def _process(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.upper().startswith("FATHOM_")} | environ
    env["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "libs.flags", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def _call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of the entry point, run as its program runs it."""
    status = run_entry(main_flags, list(arguments))
    out = capsys.readouterr()
    return status, out.out, out.err


def _anchor(run: Path) -> str:
    return str([record for record in read_events(run) if record["event"] == "run.stop"][-1]["audit_anchor"])


def _tamper(run: Path) -> None:
    path = audit_path(run)
    path.write_bytes(path.read_bytes().replace(b'"gate":"split_scan"', b'"gate":"split_scam"', 1))


@pytest.mark.parametrize(
    ("arguments", "environ", "status", "said"),
    [
        (["list"], {}, 0, ""),
        (["status"], {}, 0, ""),
        (["status"], {"FATHOM_TMA": "off", "FATHOM_TRAIN__OPTIM__LR": "1"}, 0, ""),
        (["status"], {"FATHOM_PSIV_CACHE": "yes"}, 78, "'yes' is not a value of FATHOM_PSIV_CACHE"),
        (["status"], {"FATHOM_PSVI_CACHE": "off"}, 78, "nearest known name is FATHOM_PSIV_CACHE"),
        (["status", "--json"], {"FATHOM_PSIV_CACHE": "gmem_pool"}, 78, "has no stage gmem_pool"),
        (["status"], {"FATHOM_REGISTER_SPLIT": "on"}, 78, "infra/decisions/0002-register-split-rejected.md"),
        (["explain", "nope"], {}, 2, "unknown gate 'nope'"),
        (["verify", "nope"], {}, 2, "no run at nope"),
        (["frobnicate"], {}, 2, "invalid choice"),
        ([], {}, 2, "required: command"),
        (["list", "--jso"], {}, 2, "unrecognized arguments"),
    ],
)
def test_exit_statuses(arguments: list[str], environ: dict[str, str], status: int, said: str) -> None:
    done = _process(*arguments, **environ)
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    if status == 0:
        assert done.stdout
        assert not done.stderr


def test_no_torch_is_imported() -> None:
    code = (
        "import sys, libs.flags, libs.flags.__main__, libs.flags.logcheck, libs.flags.provenance\n"
        "heavy = ('torch', 'jax', 'tilelang', 'megatron', 'apps')\n"
        "print([name for name in sys.modules if name.split('.')[0] in heavy])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    _, text, _ = _call(capsys, "list", "--json")
    rows = json.loads(text)
    assert [row["name"] for row in rows] == list(CATALOG)
    assert rows[2]["values"] == ["off", "python_precompute", "gmem_pool", "bwd_fwd_reuse", "bwd_bwd_reuse"]
    assert set(rows[2]["value_stages"].values()) == {"experimental"}
    _, table, _ = _call(capsys, "list")
    for spec in CATALOG.values():
        assert spec.variable in table


def test_status(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _, text, _ = _call(capsys, "status", "--json")
    result = json.loads(text)
    assert result["refused"] is False
    assert [row["outcome"] for row in result["gates"]] == ["off"] * len(CATALOG)
    _, table, _ = _call(capsys, "status")
    assert result["hash"] in table
    assert "never requested" in table
    monkeypatch.setenv("FATHOM_TMA", "fwd")
    status, text, _ = _call(capsys, "status", "--json")
    assert status == 78
    assert json.loads(text)["refusals"][0]["gate"] == "tma"


def test_status_with_the_facts_of_another_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    facts = tmp_path / "facts.json"
    monkeypatch.setenv("FATHOM_PSIV_CACHE", "gmem_pool")
    facts.write_text(json.dumps({"device": "cuda", "mimo_backend": "sm90", "psiv_stages": ["python_precompute"]}))
    status, _, error = _call(capsys, "status", "--facts", str(facts))
    assert status == 78
    assert "scan backend sm90 has no stage gmem_pool; the stages it has: python_precompute" in error
    monkeypatch.setenv("FATHOM_PSIV_CACHE", "off")
    monkeypatch.setenv("FATHOM_TMA", "fwd")
    facts.write_text(json.dumps({"device": "cuda", "packages": {"tilelang": "main"}}))
    status, _, error = _call(capsys, "status", "--facts", str(facts))
    assert status == 78
    assert "found 'main', which is not a version" in error
    for content, said in (("{", "JSON"), ('{"devise": "cpu"}', "devise"), ('{"device": "abacus"}', "device")):
        facts.write_text(content)
        status, _, error = _call(capsys, "status", "--facts", str(facts))
        assert status == 2
        assert said in error
    assert _call(capsys, "status", "--facts", "nowhere")[0] == 2


@pytest.mark.parametrize("name", [*CATALOG, "FATHOM_TMA"])
def test_explain(capsys: pytest.CaptureFixture[str], name: str) -> None:
    status, text, _ = _call(capsys, "explain", name, "--json")
    assert status == 0
    gate = json.loads(text)
    assert set(gate["refused_here"]) == set(gate["values"][1:])
    # Sharing blocks is the one value that needs nothing of a machine.
    assert all(found or value == "memory_only" for value, found in gate["refused_here"].items())
    _, table, _ = _call(capsys, "explain", name)
    assert gate["summary"] in table
    assert (gate["decision"] or gate["expiry"]) in table


def test_audit_shows_the_records(
    capsys: pytest.CaptureFixture[str],
    write_run: Write,
    working_catalog: Mapping[str, GateSpec],
    tmp_path: Path,
) -> None:
    run = write_run(tmp_path / "run", {"FATHOM_ALPHA": "1"}, working_catalog)
    _, text, _ = _call(capsys, "audit", str(run), "--json")
    result = json.loads(text)
    events = [(record["event"], record["gate"]) for record in result["records"]]
    assert events == [("active", "alpha"), ("off", "beta"), ("off", "gamma"), ("exposed", "alpha")]
    assert "4 records, anchors that match: 1" in result["verdict"]["0"]
    status, table, _ = _call(capsys, "audit", str(run))
    assert status == 0
    assert "alpha" in table
    assert "first branch on this gate" in table


def test_verify_a_good_run(capsys: pytest.CaptureFixture[str], write_run: Write, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    status, text, _ = _call(capsys, "verify", str(run), "--json")
    (row,) = json.loads(text)
    assert (status, row["status"], row["anchor"]) == (0, "intact", _anchor(run))
    assert _call(capsys, "verify", str(run), "--anchor", _anchor(run))[0] == 0


def test_verify_names_the_record(write_run: Write, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    _tamper(run)
    index = list(CATALOG).index("split_scan")
    for command in ("verify", "audit"):
        done = _process(command, str(run))
        assert done.returncode == 2
        assert f"tampered (edit) at record {index}" in done.stderr
    done = _process("diff", str(run), str(run))
    assert done.returncode == 2
    assert f"record {index}" in done.stderr


def test_a_cut_tail_is_seen_by_the_anchors_of_the_log(
    capsys: pytest.CaptureFixture[str], write_run: Write, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run")
    anchor = _anchor(run)
    path = audit_path(run)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))
    status, _, error = _call(capsys, "verify", str(run))
    assert status == 2
    assert "truncate" in error
    # With the log's anchors gone too, one kept elsewhere still tells.
    log_path(run).unlink()
    assert _call(capsys, "verify", str(run))[0] == 0
    assert "truncate" in _call(capsys, "verify", str(run), "--anchor", anchor)[2]
    status, _, error = _call(capsys, "verify", str(run), "--anchor", "12:ab")
    assert status == 2
    assert "HASH:LEN" in error


def test_the_anchor_of_a_committed_checkpoint_counts(
    capsys: pytest.CaptureFixture[str], write_run: Write, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run")
    state = run / "checkpoints" / "step-00000003" / "trainer.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"audit_anchor": "1" * 64 + ":3"}))
    assert _call(capsys, "verify", str(run))[0] == 0
    (state.parent / "COMMITTED").write_text("")
    assert _call(capsys, "verify", str(run))[0] == 2
    state.write_text("{")
    status, _, error = _call(capsys, "verify", str(run))
    assert status == 2
    assert "trainer.json" in error


def test_a_crash_in_mid_line_is_told_apart(
    capsys: pytest.CaptureFixture[str], write_run: Write, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run")
    with audit_path(run).open("ab") as file:
        file.write(b'{"attempt":0,"def')
    status, text, _ = _call(capsys, "verify", str(run))
    assert status == 0
    assert "a crash, not tampering" in text


def test_every_rank_is_verified(capsys: pytest.CaptureFixture[str], write_run: Write, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_run(run, rank=1)
    assert len(json.loads(_call(capsys, "verify", str(run), "--json")[1])) == 2
    path = audit_path(run, 1)
    path.write_bytes(path.read_bytes().replace(b'"off"', b'"fwd"', 1))
    status, _, error = _call(capsys, "verify", str(run))
    assert status == 2
    assert "rank00001" in error
    path.unlink()
    assert "missing" in _call(capsys, "verify", str(run))[2]


def test_the_chain_of_another_run_is_found(
    capsys: pytest.CaptureFixture[str], write_run: Write, tmp_path: Path
) -> None:
    """A whole, sound chain put in the place of another, where no anchor was written yet."""
    other, run = write_run(tmp_path / "other"), tmp_path / "run"
    with RunLog.open(run, run_id="run", attempt=0) as log:
        log.emit(SignalReceived(signal="SIGTERM", phase="start"))
    shutil.copytree(other / "audit", run / "audit")
    status, _, error = _call(capsys, "verify", str(run))
    assert status == 2
    assert "belongs to run 'other'" in error


def test_missing_runs_are_named(capsys: pytest.CaptureFixture[str], write_run: Write, tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "first-run")
    for name in ("frist-run", "runs/frist-run"):
        status, _, error = _call(capsys, "verify", name)
        assert status == 2
        assert "did you mean 'runs/first-run'" in error.replace(
            f"{Path('runs/first-run')}", "'runs/first-run'"
        ).replace("''", "'")
    (tmp_path / "empty").mkdir()
    assert "no logs/ and no audit/" in _call(capsys, "verify", "empty")[2]
    (tmp_path / "logs_only" / "logs").mkdir(parents=True)
    assert "no audit chain" in _call(capsys, "verify", "logs_only")[2]


def test_runs_are_found_by_name_and_by_latest(
    capsys: pytest.CaptureFixture[str], write_run: Write, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "runs" / "one")
    latest = tmp_path / "runs" / "latest"
    assert _call(capsys, "verify", "one")[0] == 0
    for content in ("one\n", "runs/one", str(run)):
        latest.write_text(content)
        assert _call(capsys, "verify", "runs/latest")[0] == 0
        assert _call(capsys, "verify", "latest")[0] == 0
    latest.write_text("gone")
    assert _call(capsys, "verify", "runs/latest")[0] == 2
    latest.unlink()
    latest.symlink_to("one")
    assert _call(capsys, "verify", "runs/latest")[0] == 0
    assert len(json.loads(_call(capsys, "history", "--json")[1])) == 1


def test_diff(
    capsys: pytest.CaptureFixture[str],
    write_run: Write,
    working_catalog: Mapping[str, GateSpec],
    tmp_path: Path,
) -> None:
    one = write_run(tmp_path / "one", {"FATHOM_ALPHA": "1", "FATHOM_BETA": "fwd"}, working_catalog)
    two = write_run(tmp_path / "two", {"FATHOM_BETA": "all"}, working_catalog)
    refused = write_run(tmp_path / "refused", {"FATHOM_TMA": "all", "FATHOM_TMAA": "1"})
    _, text, _ = _call(capsys, "diff", str(one), str(two), "--json")
    result = json.loads(text)
    assert result["identical"] is False
    assert result["differences"] == [
        {"gate": "alpha", "a": "active (on, exposed)", "b": "off"},
        {"gate": "beta", "a": "active (fwd)", "b": "active (all)"},
    ]
    status, table, _ = _call(capsys, "diff", str(one), str(two))
    assert status == 0
    assert "active (all)" in table
    assert "had the same gates" in _call(capsys, "diff", str(one), str(one))[1]
    rows = json.loads(_call(capsys, "diff", str(one), str(refused), "--json")[1])["differences"]
    assert {"gate": "tma", "a": "absent", "b": "refused (all)"} in rows
    assert {"gate": "FATHOM_TMAA", "a": "absent", "b": "refused"} in rows


def test_history_over_several_runs(
    capsys: pytest.CaptureFixture[str],
    write_run: Write,
    working_catalog: Mapping[str, GateSpec],
    tmp_path: Path,
) -> None:
    runs = tmp_path / "history"
    write_run(runs / "a", {}, working_catalog)
    write_run(runs / "b", {"FATHOM_ALPHA": "1", "FATHOM_GAMMA": "third"}, working_catalog)
    write_run(runs / "c", {"FATHOM_PSIV_CACHE": "gmem_pool"})
    # A gate that was active in one attempt and off in the next, such as an evaluation, was active.
    write_run(runs / "d", {"FATHOM_ALPHA": "1"}, working_catalog)
    write_run(runs / "d", {}, working_catalog)
    (runs / "not-a-run").mkdir()
    status, text, _ = _call(capsys, "history", str(runs), "--json")
    assert status == 0
    rows = {row["run"]: row for row in json.loads(text)}
    assert list(rows) == ["a", "b", "c", "d"]
    outcomes = {run: {g: [e["outcome"] for e in v] for g, v in row["gates"].items()} for run, row in rows.items()}
    assert outcomes["a"] == {gate: ["off"] for gate in working_catalog}
    assert outcomes["b"] == {"alpha": ["active"], "beta": ["off"], "gamma": ["active"]}
    assert outcomes["c"] == {"psiv_cache": ["refused"]}
    assert outcomes["d"] == outcomes["a"] | {"alpha": ["active", "off"]}
    assert [entry["attempts"] for entry in rows["d"]["gates"]["alpha"]] == [[0], [1]]
    assert rows["d"]["gates"]["beta"][0]["attempts"] == [0, 1]
    assert rows["b"]["gates"]["gamma"][0]["value"] == "third"
    _, table, _ = _call(capsys, "history", str(runs))
    assert "alpha=on, gamma=third" in table
    assert "alpha=on (attempts 0)" in table
    assert "psiv_cache=gmem_pool" in table
    _, table, _ = _call(capsys, "history", str(runs), "--gate", "psiv_cache")
    assert "psiv_cache=gmem_pool" in table
    assert "alpha" not in table
    assert _call(capsys, "history", str(runs), "--gate", "FATHOM_PSIV_CACHE") == (0, table, "")
    assert "did you mean 'psiv_cache'" in _call(capsys, "history", str(runs), "--gate", "FATHOM_PSVI_CACHE")[2]
    assert _call(capsys, "history", str(runs), "--gate", "psvi_cache")[0] == 2


def test_diff_over_attempts(
    capsys: pytest.CaptureFixture[str],
    write_run: Write,
    working_catalog: Mapping[str, GateSpec],
    tmp_path: Path,
) -> None:
    one = write_run(write_run(tmp_path / "one", {}, working_catalog), {"FATHOM_BETA": "fwd"}, working_catalog)
    two = write_run(tmp_path / "two", {}, working_catalog)
    (row,) = json.loads(_call(capsys, "diff", str(one), str(two), "--json")[1])["differences"]
    assert row == {"gate": "beta", "a": "off in attempts 0; active (fwd) in attempts 1", "b": "off"}


def test_history_does_not_show_a_tampered_run_as_off(
    capsys: pytest.CaptureFixture[str], write_run: Write, tmp_path: Path
) -> None:
    runs = tmp_path / "history"
    write_run(runs / "good")
    _tamper(write_run(runs / "bad"))
    status, text, error = _call(capsys, "history", str(runs), "--json")
    rows = {row["run"]: row for row in json.loads(text)}
    assert status == 2
    assert "1 of 2 runs cannot be trusted" in error
    assert rows["bad"]["gates"] == {}
    assert "tampered" in rows["bad"]["problem"]
    assert rows["good"]["problem"] is None
    assert _call(capsys, "history", "nowhere")[0] == 2


def test_human_output_has_no_cut_cells(capsys: pytest.CaptureFixture[str], write_run: Write, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    outputs: list[Any] = [_call(capsys, *arguments)[1] for arguments in (["list"], ["status"], ["audit", str(run)])]
    assert all("…" not in text for text in outputs)
