"""The one byte form of a value, and that everything written can be read: bytes that are not UTF-8 come from command
lines, variables and file names, and Python holds them as lone surrogates."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic_core import from_json

from libs.flags.audit import AuditLog
from libs.flags.audit_record import audit_path, read_audit
from libs.flags.canonical import canonical_json, recordable
from libs.flags.events import ConfigResolved, EnvSnapshot, RunStart
from libs.flags.logcheck import check_log
from libs.flags.provenance import snapshot
from libs.flags.runlog import RunLog, read_events
from libs.flags.runs import verify_run
from libs.flags.summary import summarise

Write = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[3]
TEXT = st.text(st.characters(), max_size=8)  # surrogates too
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_whatever_is_written_is_read(value: object) -> None:
    line = canonical_json(value)
    found = from_json(line)  # what refuses a lone surrogate
    assert found == recordable(value)
    assert canonical_json(found) == line
    assert recordable(found) == found


def test_text_that_is_in_order_stays() -> None:
    for text in ("", "plain", "caf\u00e9", "\U0001f600", "\\udcff", "\ud7ff\ue000"):
        assert recordable(text) == text
        assert canonical_json({text: [text]}) == json.dumps({text: [text]}, separators=(",", ":")).encode()
    assert recordable("a\udcffb") == "a\\udcffb"
    assert canonical_json({"\udcff": ("\udce9", 1)}) == b'{"\\\\udcff":["\\\\udce9",1]}'


def test_a_run_with_such_texts_is_read_and_goes_on(
    write_run: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command line, a variable, a setting and a refused text; and the next attempt finds all of it in order."""
    for name in [name for name in os.environ if name.startswith("FATHOM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XLA_FLAGS", "\udcff")
    monkeypatch.setenv("FATHOM_TRAIN__LOG__\udcff", "\udcfe")
    run = write_run(tmp_path / "run", {"FATHOM_TMA": "\udcff", "FATHOM_\udcff": "\udcfe"})
    with RunLog.open(run, run_id="run", attempt=1) as log:
        command = ["fathom", "--data.dir", "/caf\udce9"]
        log.emit(RunStart(command=command, recipe="\udce9", config_hash="c", gates_hash=None, world_size=1))
        log.emit(ConfigResolved(config={"data": {"dir": "/caf\udce9"}}, origins={"data.dir": "\udce9"}))
        log.emit(EnvSnapshot.model_validate(snapshot({"\udce9": ["\udce9"]})))
        audit = AuditLog.open(audit_path(run), "run", 1)
        audit.record("torn_tail_cut", reason="\udce9", source="\udce9")
        audit.close()
    write_run(run)
    events = list(read_events(run))
    said = {event["event"]: event for event in events if event["attempt"] == 1}
    assert said["run.start"]["command"][-1] == "/caf\\udce9"
    assert said["config.resolved"]["config"] == {"data": {"dir": "/caf\\udce9"}}
    assert said["env.snapshot"]["variables"]["XLA_FLAGS"] == "\\udcff"
    assert said["env.snapshot"]["variables"]["FATHOM_TRAIN__LOG__\\udcff"] == "\\udcfe"
    refused = {event["variable"]: event["value"] for event in events if event["event"] == "gate.refused"}
    assert refused == {"FATHOM_TMA": "\\udcff", "FATHOM_\\udcff": "\\udcfe"}
    assert {record["source"] for record in read_audit(audit_path(run))} >= {"\\udce9", "FATHOM_\\udcff"}
    assert verify_run(run)[0].status == "intact"
    assert summarise(run).problem is None
    assert "schema" not in {finding.rule for finding in check_log(run).violations}


@pytest.mark.parametrize(
    ("name", "value"), [(b"FATHOM_\xff", b"1"), (b"FATHOM_TMA", b"\xff"), (b"fathom_\xe9", b"\xe9")]
)
def test_such_a_variable_is_refused_and_named(name: bytes, value: bytes) -> None:
    variables = {key: text for key, text in os.environb.items() if not key.upper().startswith(b"FATHOM_")}
    command = [sys.executable, "-m", "libs.flags", "status"]
    done = subprocess.run(command, env=variables | {name: value}, cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 78, done.stderr
    assert recordable(os.fsdecode(name)).encode() in done.stderr
    assert b"refused" in done.stderr
