"""Writing the audit chain: records, reopening, crashes, full disks, a second writer."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from libs.flags.append_file import AppendFile
from libs.flags.audit import AuditLog
from libs.flags.audit_record import FIELDS, GENESIS, Anchor, read_audit
from libs.flags.errors import UserError
from libs.flags.verify import verify_chain


def _fill(path: Path, count: int, attempt: int = 0) -> AuditLog:
    log = AuditLog.open(path, "run", attempt, 0)
    for index in range(count):
        log.record("off", gate=f"g{index}", value=False, default=False, stage="scaffold", reason="r", source="s")
    return log


def test_the_format_is_as_published(tmp_path: Path) -> None:
    """Recomputed here from the words of the design, not with the code under test."""
    path = tmp_path / "a.jsonl"
    _fill(path, 3)
    prev = "0" * 64
    for seq, line in enumerate(path.read_bytes().splitlines()):
        record = json.loads(line)
        assert set(record) == set(FIELDS)
        stated = record.pop("hash")
        body = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
        assert stated == hashlib.sha256(prev.encode() + body).hexdigest()
        assert (record["seq"], record["prev"]) == (seq, prev)
        prev = stated


def test_anchor(tmp_path: Path) -> None:
    log = AuditLog.open(tmp_path / "a.jsonl", "run", 0, 0)
    assert log.anchor() == Anchor(GENESIS, 0)
    record = log.record("active", gate="g", value="fwd", reason="r", source="s")
    assert log.anchor() == Anchor(record["hash"], 1)
    assert Anchor.parse(str(log.anchor())) == log.anchor()


@pytest.mark.parametrize(
    "text", ["", "abc:1", "0" * 64, "0" * 64 + ":", "0" * 64 + ":-1", "G" * 64 + ":1", "0" * 64 + ":1 "]
)
def test_bad_anchor(text: str) -> None:
    with pytest.raises(UserError, match="HASH:LEN"):
        Anchor.parse(text)


def test_reopening_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    first = _fill(path, 2)
    anchor = first.anchor()
    first.close()
    second = _fill(path, 2, attempt=1)
    assert [(r["seq"], r["attempt"]) for r in read_audit(path)] == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert verify_chain(path, [anchor, second.anchor()]).status == "intact"


def test_a_tampered_chain_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    _fill(path, 3).close()
    path.write_bytes(path.read_bytes().replace(b'"g1"', b'"g9"'))
    before = path.read_bytes()
    with pytest.raises(UserError, match="record 1"):
        AuditLog.open(path, "run", 1, 0)
    assert path.read_bytes() == before
    with pytest.raises(UserError, match="record 1"):
        AuditLog.open(path, "run", 1, 0)  # the refusal has let go of the file


@pytest.mark.parametrize(("run_id", "rank"), [("other", 0), ("run", 1)])
def test_the_chain_of_another_run_is_not_continued(tmp_path: Path, run_id: str, rank: int) -> None:
    path = tmp_path / "a.jsonl"
    _fill(path, 1).close()
    with pytest.raises(UserError, match="belongs to run 'run' rank 0"):
        AuditLog.open(path, run_id, 1, rank)


@pytest.mark.parametrize("kept", [1, 12, 100, -1])
def test_a_torn_tail_is_cut_and_recorded(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "a.jsonl"
    _fill(path, 3).close()
    whole = path.read_bytes().splitlines(keepends=True)
    torn = whole[2][:kept]
    path.write_bytes(b"".join(whole[:2]) + torn)
    assert verify_chain(path).status == "torn"
    log = _fill(path, 1, attempt=1)
    records = read_audit(path)
    assert [(r["event"], r["attempt"]) for r in records] == [
        ("off", 0),
        ("off", 0),
        ("torn_tail_cut", 1),
        ("off", 1),
    ]
    assert records[2]["reason"] == f"{len(torn)} bytes, sha256 {hashlib.sha256(torn).hexdigest()}"
    assert verify_chain(path, [log.anchor()]).status == "intact"


def test_two_writers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    log = _fill(path, 1)
    with pytest.raises(UserError, match="another process"):
        AuditLog.open(path, "run", 0, 0)
    log.close()
    AuditLog.open(path, "run", 0, 0).close()


def test_every_record_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    path = tmp_path / "a.jsonl"
    monkeypatch.setattr(AppendFile, "sync", lambda self: synced.append(self.path.read_bytes()))
    _fill(path, 3)
    assert [content.count(b"\n") for content in synced] == [1, 2, 3]


def test_many_threads_keep_the_chain(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    log = _fill(path, 0)

    def work() -> None:
        for _ in range(20):
            log.record("exposed", gate="g", reason="r", source="s")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    result = verify_chain(path, [log.anchor()])
    assert (result.status, result.anchor.length) == ("intact", 80)


def test_a_killed_writer_leaves_every_record(tmp_path: Path) -> None:
    """SIGKILL right after `record` returned: nothing waits in the process."""
    path = tmp_path / "a.jsonl"
    code = (
        "import os, signal, sys; from pathlib import Path; from libs.flags.audit import AuditLog\n"
        "log = AuditLog.open(Path(sys.argv[1]), 'run', 0, 0)\n"
        "for i in range(5): log.record('off', gate='g', reason='r', source='s')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], timeout=60)
    assert done.returncode == -9
    result = verify_chain(path)
    assert (result.status, result.anchor.length) == ("intact", 5)


def test_a_full_disk_is_the_users_error_and_leaves_whole_lines(tmp_path: Path) -> None:
    """A file size limit stands in for a full disk: the system writes a part of the line, then refuses."""
    path = tmp_path / "a.jsonl"
    code = (
        "import resource, signal, sys; from pathlib import Path; from libs.flags.audit import AuditLog\n"
        "from libs.flags.errors import run_entry\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "log = AuditLog.open(Path(sys.argv[1]), 'run', 0, 0)\n"
        "log.record('off', gate='g', reason='r', source='s')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))\n"
        "main = lambda argv: bool(log.record('off', gate='g', reason='r', source='s')) - 1\n"
        "raise SystemExit(run_entry(main))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], timeout=60, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "cannot append" in done.stderr
    assert verify_chain(path).status == "intact"
    assert len(read_audit(path)) == 1


def test_a_record_that_may_not_be_on_the_disk_is_followed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsync fails once: the user's error, and neither the anchor nor the next record calls the chain tampered with."""

    def failing(_file: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path = tmp_path / "a.jsonl"
    log = _fill(path, 1)
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", failing)
        with pytest.raises(UserError, match=r"cannot bring .*a\.jsonl to the disk"):
            log.record("off", gate="g", reason="r", source="s")
    assert log.anchor().length == len(read_audit(path)) == 2
    log.record("off", gate="g", reason="r", source="s")
    result = verify_chain(path, [log.anchor()])
    assert (result.status, result.anchor.length) == ("intact", 3)


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "audit").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        AuditLog.open(tmp_path / "audit" / "a.jsonl", "run", 0, 0)


def test_reading_what_is_not_a_chain(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with pytest.raises(UserError, match="no audit file"):
        read_audit(path)
    for content in (b"{not json}\n", b"[1]\n", b'{"seq":0}\n'):
        path.write_bytes(content)
        with pytest.raises(UserError, match="line 1"):
            read_audit(path)
