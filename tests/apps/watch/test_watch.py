"""The live page: over plain HTTP and its stream, that nothing can be changed through it, and in a browser."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import struct
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from apps.watch.feed import Feed
from apps.watch.server import WatchServer
from libs.flags.audit import AuditLog
from libs.flags.audit_record import audit_path
from libs.flags.errors import run_entry
from libs.flags.events import AnomalyGeneric, CursorRecord, RunStart, RunStop, TrainStep
from libs.flags.index import FILE_NAME
from libs.flags.runlog import RunLog
from tests.support.browser import Browser

ROOT = Path(__file__).resolve().parents[3]


def begin(folder: Path, name: str, *, refused: bool = False) -> None:
    """A run as it writes: started, one gate off, one active; or refused."""
    run = folder / name
    with RunLog.open(run, run_id=name, attempt=0) as log:
        log.emit(RunStart(command=["fathom"], recipe="r", config_hash="c", gates_hash="g", world_size=1))
        audit = AuditLog.open(audit_path(run), name, 0)
        audit.record("off", gate="tma", value="off", reason="never requested", source="default")
        if refused:
            audit.record("refused", gate="psiv_cache", value="gmem_pool", reason="no such stage <b>here</b>",
                         source="FATHOM_PSIV_CACHE")  # fmt: skip
            anchor = str(audit.anchor())
            log.emit(RunStop(status="refused", exit_code=78, reason="refused", audit_anchor=anchor))
        else:
            audit.record("active", gate="split_scan", value="auto", reason="requested", source="environment")
        audit.close()


def step(folder: Path, name: str, number: int) -> None:
    with RunLog.open(folder / name, run_id=name, attempt=0) as log:
        cursor = CursorRecord(epoch=0, index=number, token_offset=0)
        log.emit(
            TrainStep(
                loss=2.5, main_loss=2.5, mtp_loss=None, bpb=1.25, lr=1e-3, grad_norm=1.0, tokens=10,
                tokens_total=10 * number, tokens_per_s=1234.0, time_s=0.1, data_s=0.0, forward_backward_s=0.1,
                optimizer_s=0.0, other_s=0.0, mfu=None, mfu_reason="x", max_memory_bytes=None, cursor=cursor,
            ),
            step=number,
        )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    runs = tmp_path / "runs"
    begin(runs, "going")
    step(runs, "going", 7)
    begin(runs, "refused", refused=True)
    return runs


@pytest.fixture
def feed(folder: Path) -> Iterator[Feed]:
    made = Feed(folder, 100)
    yield made
    made.close()


@pytest.fixture
def server(feed: Feed) -> Iterator[WatchServer]:
    made = WatchServer("127.0.0.1", 0, feed, keep_alive_s=0.2)
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    feed.close()
    made.shutdown()
    thread.join()
    made.server_close()


@contextlib.contextmanager
def listening(host: str, feed: Feed) -> Iterator[WatchServer]:
    with WatchServer(host, 0, feed) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def ask(server: WatchServer, method: str, path: str, **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", int(server.server_address[1]), timeout=30)
    connection.request(method, path, headers=headers)
    return connection.getresponse()


def damage(folder: Path) -> None:
    """A run whose log has a number that JSON lacks, and one whose name is not UTF-8."""
    begin(folder, "bad")
    step(folder, "bad", 1)
    log = folder / "bad" / "logs" / "rank00000.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"loss":2.5', b'"loss":NaN'))
    begin(folder, "name")
    (folder / "name").rename(folder / "nam\udce9")


def not_finite(text: str) -> float:
    raise AssertionError(f"{text} is not JSON")


class Stream:
    """Server-sent events, as they come."""

    def __init__(self, server: WatchServer) -> None:
        self._answer = ask(server, "GET", "/events")
        assert self._answer.status == 200
        assert str(self._answer.headers["Content-Type"]).startswith("text/event-stream")
        self.idle = 0

    def next(self) -> dict[str, Any]:
        while True:
            line = self._answer.readline()
            assert line, "the stream has ended"
            self.idle += line.startswith(b":")
            if line.startswith(b"data: "):
                found: dict[str, Any] = json.loads(line[6:], parse_constant=not_finite)
                return found

    def rest(self) -> bytes:
        return self._answer.read()


def by_name(news: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["run"]: row for row in news["rows"]}


def test_the_page_and_its_files(server: WatchServer) -> None:
    for path, kind, part in (
        ("/", "text/html", b"watch.js"),
        ("/watch.js", "text/javascript", b"EventSource"),
        ("/watch.js", "text/javascript", b"aria-sort"),
        ("/watch.css", "text/css", b"prefers-color-scheme:dark"),
    ):
        answer = ask(server, "GET", path)
        assert answer.status == 200
        assert str(answer.headers["Content-Type"]).startswith(kind)
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert "unsafe" not in answer.headers["Content-Security-Policy"]
        assert part in answer.read()
        assert ask(server, "HEAD", path).read() == b""


def test_the_stream_tells_everything_and_then_what_changes(server: WatchServer, feed: Feed, folder: Path) -> None:
    stream = Stream(server)
    first = stream.next()
    rows = by_name(first)
    assert (first["total"], set(rows)) == (2, {"going", "refused"})
    assert (rows["going"]["status"], rows["going"]["step"], rows["going"]["active"]) == ("open", 7, ["split_scan=auto"])
    assert (rows["refused"]["status"], rows["refused"]["refused"]) == ("refused", ["psiv_cache=gmem_pool"])
    assert rows["refused"]["why"] == ["FATHOM_PSIV_CACHE=gmem_pool: no such stage <b>here</b>"]
    step(folder, "going", 8)
    with RunLog.open(folder / "going", run_id="going", attempt=0) as log:
        log.emit(AnomalyGeneric(what="loss spike", action="none"), step=8)
    feed.refresh()
    second = stream.next()
    assert list(by_name(second)) == ["going"]
    row = by_name(second)["going"]
    assert (row["step"], row["n_anomalies"], row["anomalies"]) == (8, 1, ["step 8: generic: loss spike none"])
    begin(folder, "later")
    feed.refresh()
    assert list(by_name(stream.next())) == ["later"]
    # Who comes now gets all of it at once.
    assert set(by_name(Stream(server).next())) == {"going", "refused", "later"}
    assert not (folder / FILE_NAME).exists(), "read-only: no index is left behind"


def test_a_run_that_is_gone_goes(server: WatchServer, feed: Feed, folder: Path) -> None:
    stream = Stream(server)
    stream.next()
    for path in sorted((folder / "refused").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    feed.refresh()
    news = stream.next()
    assert (news["removed"], news["rows"], news["total"]) == (["refused"], [], 1)


def test_a_damaged_run_ends_nothing(server: WatchServer, feed: Feed, folder: Path) -> None:
    stream = Stream(server)
    stream.next()
    damage(folder)
    feed.refresh()
    rows = by_name(stream.next())
    assert set(rows) == {"bad", r"nam\udce9"}
    assert "is not JSON" in rows["bad"]["problem"]
    assert rows["bad"]["loss"] is None
    (folder / "going" / "logs" / "rank00001.jsonl").symlink_to("/gone")
    feed.refresh()
    step(folder, "going", 8)
    feed.refresh()
    news = feed.since(0, 0.0)
    assert news is not None
    assert by_name(news.plain())["going"]["step"] == 8


def test_a_tampered_run_shows_no_gates(feed: Feed, folder: Path) -> None:
    path = audit_path(folder / "going")
    path.write_bytes(path.read_bytes().replace(b"requested", b"requestee", 1))
    feed.refresh()
    news = feed.since(0, 0.0)
    assert news is not None
    row = by_name(news.plain())["going"]
    assert (row["chain"], row["active"]) == ("tampered", [])
    assert "at record 0" in row["problem"]


def test_only_the_newest_are_shown(folder: Path) -> None:
    begin(folder, "newest")
    feed = Feed(folder, 1)
    news = feed.since(0, 0.0)
    assert news is not None
    assert (list(by_name(news.plain())), news.total) == (["newest"], 3)
    step(folder, "going", 9)
    feed.refresh()
    news = feed.since(news.version, 0.0)
    assert news is not None
    assert (list(by_name(news.plain())), news.removed) == (["going"], ["newest"])
    feed.close()


def test_silence_is_kept_alive_and_an_end_is_an_end(server: WatchServer, feed: Feed, folder: Path) -> None:
    stream = Stream(server)
    stream.next()
    threading.Timer(0.7, feed.end).start()
    rest = stream.rest()
    assert rest.count(b": still here") >= 2


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_nothing_can_be_changed(server: WatchServer, folder: Path, method: str) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for path in ("/", "/events", "/runs/going"):
        assert ask(server, method, path).status == 405
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "path", ["/../../etc/passwd", "/going/logs/rank00000.jsonl", "/watch.html", "/%2e%2e/page.html"]
)
def test_no_other_file_is_served(server: WatchServer, path: str) -> None:
    assert ask(server, "GET", path).status == 404


def test_another_site_cannot_read_it(server: WatchServer) -> None:
    """A name that resolves to this machine is still not this machine's name."""
    assert ask(server, "GET", "/events", Host="evil.example:8790").status == 403
    for host in ("localhost:1", "LOCALHOST:8795", "127.0.0.1", "127.0.0.2:8790", "[::1]:8790"):
        assert ask(server, "GET", "/", Host=host).status == 200
    for host in ("", "evil.com", "localhost.evil.com", "127.0.0.1.evil.com:8790", "10.0.0.1", "[::1", "[::2]:8790"):
        assert ask(server, "GET", "/", Host=host).status == 403


@pytest.mark.parametrize("host", ["127.0.0.2", "LOCALHOST", "::1", "::ffff:127.0.0.1"])
def test_where_it_listens_decides_who_may_read(feed: Feed, host: str) -> None:
    with listening(host, feed) as server:
        assert server.local
        connection = http.client.HTTPConnection(
            str(server.server_address[0]), int(server.server_address[1]), timeout=30
        )
        connection.request("GET", "/", headers={"Host": "evil.com"})
        assert connection.getresponse().status == 403
        with urllib.request.urlopen(server.url, timeout=30) as answer:
            assert answer.status == 200


def test_everyone_may_read_what_is_served_to_everyone(feed: Feed) -> None:
    with listening("0.0.0.0", feed) as server:
        assert not server.local
        assert ask(server, "GET", "/", Host="evil.com").status == 200


def test_a_reader_that_has_gone_is_not_reported(server: WatchServer, capsys: pytest.CaptureFixture[str]) -> None:
    """With a reset in the middle of a request; any other error is still told."""
    address = (str(server.server_address[0]), int(server.server_address[1]))
    with socket.create_connection(address) as gone:
        gone.sendall(b"GET / HT")
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handled = threading.Event()
    told, server.shutdown_request = server.shutdown_request, lambda request: (told(request), handled.set())  # type: ignore[assignment,func-returns-value,method-assign]
    assert ask(server, "GET", "/").read()
    assert handled.wait(10)
    assert capsys.readouterr().err == ""
    for error, said in ((BrokenPipeError(), False), (ConnectionResetError(), False), (ValueError("ours"), True)):
        try:
            raise error
        except (OSError, ValueError):
            server.handle_error(None, address)
        assert ("ours" in capsys.readouterr().err) is said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "not a directory of runs"),
        ([".", "--port", "70000"], "--port 70000"),
        ([".", "--every", "0"], "--every"),
        ([".", "--limit", "0"], "--limit"),
        ([".", "--host", ""], "--host ''"),
    ],
)
def test_bad_options(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    from apps.watch.__main__ import main

    assert run_entry(main, words) == 2
    assert said in capsys.readouterr().err


def test_the_program(folder: Path, server: WatchServer) -> None:
    """A real process: says where it listens, follows a run, refuses a port that is taken."""
    words = [sys.executable, "-m", "apps.watch", str(folder), "--every", "0.2", "--port"]
    with subprocess.Popen([*words, "0"], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert "http://127.0.0.1:" in line
            port = int(line.split("127.0.0.1:")[1].split("/")[0])
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("GET", "/events")
            answer = connection.getresponse()
            step(folder, "going", 8)
            while not any(b'"step": 8' in part for part in [answer.readline()]):
                pass
        finally:
            process.kill()
    taken = str(server.server_address[1])
    done = subprocess.run([*words, taken], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "cannot listen on" in done.stderr


def test_in_a_browser(server: WatchServer, feed: Feed, folder: Path, tmp_path: Path) -> None:
    """Rows appear and change without a reload; text from a run stays text; filters work from the keyboard."""
    with Browser(tmp_path / "profile") as page:
        page.look()
        page.open(server.url)
        page.until("document.querySelectorAll('#runs tbody tr').length === 2")
        assert "no such stage <b>here</b>" in page.js("document.getElementById('alerts').textContent")
        assert page.js("document.querySelectorAll('#alerts b').length") == 0
        step(folder, "going", 8)
        begin(folder, "later")
        feed.refresh()
        page.until("document.querySelectorAll('#runs tbody tr').length === 3")
        assert page.js("document.querySelector('tr[data-run=going]').cells[3].textContent") == "8"
        page.js("document.querySelector('input[type=search]').focus()")
        page.type("refused")
        rows = "[...document.querySelectorAll('#runs tbody tr')]"
        assert page.js(f"{rows}.filter(r => !r.hidden).map(r => r.dataset.run).join()") == "refused"
        assert page.js("document.getElementById('state').textContent").startswith("live")
        page.screenshot(tmp_path / "watch.png")
        assert page.errors == []
