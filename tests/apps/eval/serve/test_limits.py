"""Whoever asks too much, too long, too slowly or without leave: refused, and nothing stays behind."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import h11
import pytest

from apps.eval.serve import connection as server_connection
from apps.eval.serve import guard
from apps.eval.serve.config import ServeConfig
from libs.flags.errors import UserError
from tests.apps.eval.serve.client import JSON, Answer, Connection, ask, ask_chunked, complete
from tests.apps.eval.serve.serving import Dictated, Running, running, saying

TOKEN = "0123456789abcdef0123"
PATH = "/v1/completions"


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    return path


def test_without_the_token_only_health_is_answered(token_file: Path) -> None:
    async def run() -> None:
        engine = Dictated(saying("ok"))
        async with running(engine, token_file=token_file) as server:
            wrong = ["", TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer \xe9\xff"]
            for path in (PATH, "/v1/models", "/metrics", "/nowhere"):
                for value in wrong:
                    answer = await ask(server.port, path, {"prompt": "x"}, headers={"Authorization": value})
                    assert answer.status == 401, (path, value)
                    assert answer.json["error"]["type"] == "authentication_error"
                    assert answer.headers["www-authenticate"] == "Bearer"
                    assert TOKEN not in answer.body.decode()
            assert engine.seen == []
            assert (await ask(server.port, "/health")).status == 200
            for scheme in ("Bearer", "bearer"):
                right = await ask(server.port, PATH, {"prompt": "x"}, headers={"Authorization": f"{scheme} {TOKEN}"})
                assert right.text == "ok"

    asyncio.run(run())


def test_without_a_token_only_this_machines_names_are_answered() -> None:
    async def run() -> None:
        async with running(Dictated(saying("ok"))) as server:
            for host in ("localhost:80", "127.0.0.1", "[::1]:8000", "127.1.2.3"):
                assert (await ask(server.port, PATH, {"prompt": "x"}, headers={"Host": host})).status == 200, host
            for host in ("evil.example", "localhost.evil.example", "10.0.0.1", "[::1", "", "127.0.0.1.example:80"):
                answer = await ask(server.port, PATH, {"prompt": "x"}, headers={"Host": host})
                assert (answer.status, answer.code) == (421, "wrong_host"), host

    asyncio.run(run())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "example.org"])
def test_other_machines_are_not_let_in_without_a_token(host: str, token_file: Path) -> None:
    with pytest.raises(UserError, match="--token-file"):
        ServeConfig.parse({"checkpoint": Path("x"), "host": host})
    config = ServeConfig.parse({"checkpoint": Path("x"), "host": host, "token_file": token_file})
    assert config.token == TOKEN
    assert TOKEN not in repr(config)
    assert TOKEN not in config.model_dump_json()


@pytest.mark.parametrize("content", [b"", b"short", b"two words 0123456789", b"\xff" * 20, b"line one 0123\nline two"])
def test_a_bad_token_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(UserError, match="token"):
        ServeConfig.parse({"checkpoint": Path("x"), "token_file": path})
    with pytest.raises(UserError, match="cannot be read"):
        ServeConfig.parse({"checkpoint": Path("x"), "token_file": tmp_path / "none"})


def test_a_body_that_is_too_large_is_refused_however_it_is_sent() -> None:
    async def run() -> None:
        engine = Dictated()
        async with running(engine, max_body=1000) as server:
            fits = json.dumps({"prompt": "x", "max_tokens": 1}).encode().ljust(1000)
            assert (await ask(server.port, PATH, fits)).status == 200
            for answer in (
                await ask(server.port, PATH, fits + b" "),
                await ask(server.port, PATH, b" " * 3_000_000),
                await ask_chunked(server.port, PATH, [fits, b" "]),
                await ask_chunked(server.port, PATH, [b" " * 500] * 3),
                await ask_chunked(server.port, PATH, [b" " * 65_536] * 50),
            ):
                assert (answer.status, answer.code) == (413, "body_too_large")
            assert (await ask_chunked(server.port, PATH, [fits[:7], fits[7:]])).status == 200
            assert len(engine.seen) == 2
            await _asks_before_sending(server)

    asyncio.run(run())


async def _asks_before_sending(server: Running) -> None:
    """`Expect: 100-continue`: refused without being told to go on; told, where it is in order."""
    for length, wanted in ((5000, 413), (20, 200)):
        connection = await Connection.open(server.port)
        headers = {"Host": "localhost", "Expect": "100-continue", "Content-Length": str(length), **JSON}
        await connection.head("POST", PATH, headers)
        if wanted == 200:
            async for event in connection.events():
                assert isinstance(event, h11.InformationalResponse)
                break
            await connection.write(connection.protocol.send(h11.Data(data=b'{"prompt": "x"}     ')))
            await connection.write(connection.protocol.send(h11.EndOfMessage()))
        answer = await connection.answer()
        assert answer.status == wanted
        assert ("connection" in answer.headers) == (wanted == 413)
        await connection.close()


def test_a_client_that_sends_before_it_reads_still_finds_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the kernel holds: closing on it would break the sending."""
    monkeypatch.setattr(guard, "DISCARD_SECONDS", 30.0)

    async def run() -> None:
        async with running(Dictated(), max_body=1000) as server:
            assert (await ask(server.port, PATH, b" " * 30_000_000)).status == 413
            assert (await ask(server.port, "/nowhere", b" " * 30_000_000)).status == 413
            assert (await ask_chunked(server.port, PATH, [b" " * 1_000_000] * 30)).status == 413

    asyncio.run(run())


def test_a_body_without_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "DISCARD_SECONDS", 0.2)

    async def run() -> None:
        async with running(Dictated(), max_body=1000) as server:
            connection = await Connection.open(server.port)
            await connection.head("POST", PATH, {"Host": "localhost", "Transfer-Encoding": "chunked", **JSON})
            with pytest.raises(ConnectionError):
                await asyncio.wait_for(_write_on(connection), 5)
            await connection.close()
            assert (await server.rest())["answers"]["413"] == 1

    asyncio.run(run())


async def _write_on(connection: Connection) -> None:
    while True:
        await connection.write(connection.protocol.send(h11.Data(data=b" " * 4096)))
        await asyncio.sleep(0.001)


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    async def run() -> None:
        async with running(Dictated(), body_timeout=0.2) as server:
            connection = await Connection.open(server.port)
            await connection.head("POST", PATH, {"Host": "localhost", "Content-Length": "50", **JSON})
            await connection.write(b'{"prompt"')
            answer = await connection.answer()
            assert (answer.status, answer.code) == (408, "body_timeout")
            assert await connection.reader.read() == b"", "closed: the rest of the body would be taken for a request"
            await connection.close()

    asyncio.run(run())


def test_a_connection_that_never_asks_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_connection, "HEAD_SECONDS", 0.5)

    async def run() -> None:
        async with running(Dictated(saying("ok"))) as server:
            for said in (b"", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX: "):
                connection = await Connection.open(server.port)
                await connection.write(said)
                assert await asyncio.wait_for(connection.reader.read(), 5) == b""
                await connection.close()
            # After an answer, too: half a second request.
            connection = await Connection.open(server.port)
            await connection.send("GET", "/health", None, {})
            assert (await connection.answer()).status == 200
            await connection.write(b"GET /health HT")
            assert await asyncio.wait_for(connection.reader.read(), 5) == b""
            await connection.close()

    asyncio.run(run())


def test_a_client_that_does_not_read_is_cut_off_and_its_request_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing else: the engine's tokens crowd the loop, where a connection that asks for metrics may take its time.
    monkeypatch.setattr(server_connection, "STALL_SECONDS", 0.3)

    async def run() -> None:
        engine = Dictated(lambda prompt, sampling: [100] * sampling.max_new_tokens, max_tokens=1_000_000)
        # A long name makes long events, which soon fill what the kernel takes.
        async with running(engine, served_name="x" * 50_000) as server:
            connection = await Connection.open(server.port)
            body = json.dumps({"prompt": "x", "max_tokens": 900_000, "stream": True}).encode()
            await connection.send("POST", PATH, body, JSON)
            while (await server.metrics())["jobs"]["accepted"] == 0:
                await asyncio.sleep(0.01)
            assert (await server.rest())["jobs"]["finished"] == 0
            assert len(engine.aborted) == 1
            connection.vanish()

    asyncio.run(run())


def test_bytes_that_are_not_http_are_answered_in_our_shape() -> None:
    async def run() -> None:
        async with running(Dictated(), max_header=2048) as server:
            long_head = b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X-A: " + b"y" * 9000
            lengths = (b"9" * 1500, b"-1", b"1e3", b"5\r\nContent-Length: 6")
            bad = [
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %s\r\n\r\n" % n for n in lengths
            ]
            for said in (b"\x16\x03\x01hello\r\n\r\n", b"GET /health\r\n\r\n", long_head, *bad):
                connection = await Connection.open(server.port)
                await connection.write(said)
                raw = await asyncio.wait_for(connection.reader.read(), 5)
                head, _, body = raw.partition(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 400 ")
                assert b'"invalid_http"' in body
                await connection.close()
            # A broken chunk in the middle of a body.
            connection = await Connection.open(server.port)
            await connection.head("POST", PATH, {"Host": "localhost", "Transfer-Encoding": "chunked", **JSON})
            await connection.write(b"zz\r\n")
            assert (await connection.answer()).status == 400
            await connection.close()
            whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X-A: " + b"y" * 9000 + b"\r\n\r\n"
            connection = await Connection.open(server.port)
            await connection.write(whole)
            status = (await asyncio.wait_for(connection.reader.read(12), 5)).split()[1]
            assert status in (b"400", b"431")
            connection.vanish()

    asyncio.run(run())


def test_too_many_connections() -> None:
    async def run() -> None:
        async with running(Dictated(saying("ok")), max_connections=3) as server:
            idle = [await Connection.open(server.port) for _ in range(3)]
            answer = await complete(server.port, prompt="x")
            assert (answer.status, answer.code) == (503, "too_many_connections")
            assert answer.headers["retry-after"]
            for connection in idle:
                await connection.close()
            await asyncio.sleep(0.05)
            assert (await complete(server.port, prompt="x")).status == 200

    asyncio.run(run())


def test_a_full_queue_is_said_at_once() -> None:
    async def run() -> None:
        engine = Dictated(max_batch=2)
        engine.gate.clear()
        async with running(engine, max_batch=2, queue=3) as server:
            tasks = [asyncio.create_task(complete(server.port, prompt=f"{n}")) for n in range(5)]
            while (await server.metrics())["jobs"]["open"] < 5:
                await asyncio.sleep(0.01)
            # Refused before its body is read: one is not even sent.
            answer = await complete(server.port, prompt="x")
            assert (answer.status, answer.code) == (503, "queue_full")
            assert int(answer.headers["retry-after"]) >= 1
            engine.gate.set()
            assert [answer.status for answer in await asyncio.gather(*tasks)] == [200] * 5
            assert (await complete(server.port, prompt="x")).status == 200

    asyncio.run(run())


def test_a_request_that_takes_too_long_is_aborted() -> None:
    async def run() -> tuple[Answer, Answer]:
        engine = Dictated(step_seconds=0.02)
        async with running(engine, timeout=0.3) as server:
            whole = await complete(server.port, prompt="x", max_tokens=200)
            streamed = await complete(server.port, prompt="x", max_tokens=200, stream=True)
            await server.rest()
            assert len(engine.aborted) == 2
            assert (await complete(server.port, prompt="x", max_tokens=3)).status == 200
            return whole, streamed

    whole, streamed = asyncio.run(run())
    assert (whole.status, whole.code) == (503, "timeout")
    assert streamed.status == 200
    assert streamed.events[-1] != "[DONE]"
    assert streamed.parts[-1]["error"]["code"] == "timeout"
