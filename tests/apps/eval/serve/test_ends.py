"""Clients that leave, an engine that dies or hangs, a server that is told to end: it ends, and says how."""

from __future__ import annotations

import asyncio
import json
import signal

import pytest

from apps.eval.serve import server as server_module
from libs.flags.errors import ExitStatus
from tests.apps.eval.serve.client import JSON, Connection, ask, complete
from tests.apps.eval.serve.serving import Dictated, Running, running, saying

PATH = "/v1/completions"


async def _busy(server: Running, running_: int) -> None:
    while (await server.metrics())["engine"]["running"] < running_:
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("when", ["waiting", "generating"])
def test_a_client_that_leaves_aborts_its_request(stream: bool, when: str) -> None:
    async def run() -> None:
        engine = Dictated(step_seconds=0.005, max_batch=1, max_tokens=10_000)
        async with running(engine, max_batch=1) as server:
            stays = asyncio.create_task(complete(server.port, prompt="stays", max_tokens=100))
            if when == "generating":
                await stays
            else:
                await _busy(server, 1)
            leaves = await Connection.open(server.port)
            body = json.dumps({"prompt": "leaves", "max_tokens": 5000, "stream": stream}).encode()
            await leaves.send("POST", PATH, body, JSON)
            await _busy(server, 1 if when == "generating" else 2)
            leaves.vanish()
            assert (await stays).status == 200
            metrics = await server.rest()
            assert engine.aborted == [2]
            assert (metrics["jobs"]["accepted"], metrics["jobs"]["finished"]) == (2, 1)

    asyncio.run(run())


def test_a_client_that_leaves_within_its_body_leaves_nothing() -> None:
    async def run() -> None:
        engine = Dictated()
        async with running(engine) as server:
            connection = await Connection.open(server.port)
            await connection.head("POST", PATH, {"Host": "localhost", "Content-Length": "500", **JSON})
            await connection.write(b'{"prompt": ')
            await asyncio.sleep(0.05)
            connection.vanish()
            await server.rest()
            assert engine.seen == []

    asyncio.run(run())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_answers_503_and_ends_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    async def run() -> ExitStatus:
        engine = Dictated(step_seconds=0.01, max_tokens=100_000)
        async with running(engine, grace=20.0) as server:
            whole = asyncio.create_task(complete(server.port, prompt="x", max_tokens=90_000))
            streamed = asyncio.create_task(complete(server.port, prompt="x", max_tokens=90_000, stream=True))
            late = await Connection.open(server.port)
            await late.head("POST", PATH, {"Host": "localhost", "Content-Length": "15", **JSON})
            await _busy(server, 2)
            engine.trouble = RuntimeError("states are not what they were")
            answer = await whole
            assert (answer.status, answer.code) == (503, "engine_stopped")
            assert "states are not what they were" in answer.json["error"]["message"]
            assert (await streamed).parts[-1]["error"]["code"] == "engine_stopped"
            await late.write(b'{"prompt": "x"}')
            assert (await late.answer()).status == 503
            return await asyncio.wait_for(server.ended, 15)

    assert asyncio.run(run()) is ExitStatus.FAILURE
    assert "the engine stopped: RuntimeError: states are not what they were" in capsys.readouterr().err


def test_a_signal_lets_open_requests_finish_and_takes_no_new_ones() -> None:
    async def run() -> ExitStatus:
        engine = Dictated(step_seconds=0.01)
        async with running(engine, grace=20.0) as server:
            whole = asyncio.create_task(complete(server.port, prompt="x", max_tokens=60))
            streamed = asyncio.create_task(complete(server.port, prompt="x", max_tokens=60, stream=True))
            open_connection = await Connection.open(server.port)
            await open_connection.head("POST", PATH, {"Host": "localhost", "Content-Length": "15", **JSON})
            await _busy(server, 2)
            signal.raise_signal(signal.SIGTERM)
            await asyncio.sleep(0.15)
            with pytest.raises(ConnectionError):
                await ask(server.port, "/health")
            await open_connection.write(b'{"prompt": "x"}')
            refused = await open_connection.answer()
            assert (refused.status, refused.code) == (503, "shutting_down")
            assert len((await whole).text) == len((await streamed).text) == 60
            assert (await streamed).events[-1] == "[DONE]"
            assert engine.aborted == []
            status = await asyncio.wait_for(server.ended, 10)
            assert engine.closed
            return status

    assert asyncio.run(run()) is ExitStatus.OK


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_does_not_finish_within_the_grace_time_is_aborted(number: signal.Signals) -> None:
    async def run() -> ExitStatus:
        engine = Dictated(step_seconds=0.02, max_tokens=100_000)
        async with running(engine, grace=0.3) as server:
            whole = asyncio.create_task(complete(server.port, prompt="x", max_tokens=90_000))
            streamed = asyncio.create_task(complete(server.port, prompt="x", max_tokens=90_000, stream=True))
            await _busy(server, 2)
            signal.raise_signal(number)
            answer = await whole
            assert (answer.status, answer.code) == (503, "shutting_down")
            assert (await streamed).parts[-1]["error"]["code"] == "shutting_down"
            status = await asyncio.wait_for(server.ended, 10)
            assert sorted(engine.aborted) == [1, 2]
            return status

    assert asyncio.run(run()) is ExitStatus.OK


def test_an_engine_that_hangs_does_not_hang_the_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server_module, "JOIN_SECONDS", 0.3)

    async def run() -> ExitStatus:
        engine = Dictated()
        engine.gate.clear()
        async with running(engine, grace=0.2) as server:
            task = asyncio.create_task(complete(server.port, prompt="x"))
            await _busy(server, 1)
            signal.raise_signal(signal.SIGTERM)
            assert (await task).status == 503
            status = await asyncio.wait_for(server.ended, 10)
            assert not engine.closed, "closed under the feet of its thread"
            engine.gate.set()
            return status

    assert asyncio.run(run()) is ExitStatus.FAILURE
    assert "did not end its step" in capsys.readouterr().err


def test_an_idle_server_ends_at_once() -> None:
    async def run() -> ExitStatus:
        async with running(Dictated(saying("ok")), grace=60.0) as server:
            kept = await Connection.open(server.port)
            await kept.send("GET", "/health", None, {})
            await kept.answer()
            signal.raise_signal(signal.SIGTERM)
            status = await asyncio.wait_for(server.ended, 5)
            await kept.close()
            return status

    assert asyncio.run(run()) is ExitStatus.OK
