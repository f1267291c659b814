"""The real engine under clients that behave and clients that do not: every answer is right or a refusal, and at rest
all blocks, slots, places, connections and memory are back.

Cached prefix blocks are the exception: with the gate prefix_cache on, full blocks of past prompts stay in the pool
until their room is needed. They are held by nobody, and free + cached is what was free at the start.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch

from libs.flags import installed
from libs.flags.errors import ExitStatus
from libs.flags.facts import Facts
from libs.flags.resolve import resolve
from libs.model.inference import Completion, Engine, EngineConfig, FinishReason, Sampling
from tests.apps.eval.serve.client import JSON, Answer, Connection, ask, ask_chunked, complete
from tests.apps.eval.serve.serving import BYTES, Running, running
from tests.apps.eval.small_run import cpp_text, tiny_model

PATH = "/v1/completions"
TOKEN = "a-token-of-the-tests-0123"
RIGHT = {"Authorization": f"Bearer {TOKEN}"}
CONFIG = EngineConfig(max_batch=4, max_tokens=160, block_size=16, prefill_chunk=64)
RSS_SLACK = 32 << 20


class Wanted(NamedTuple):
    """A request, and what the engine alone gives for it."""

    fields: dict[str, Any]
    text: str
    tokens: int
    finish: str
    logprobs: list[float]


@pytest.fixture(params=["off", "snapshots"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr(installed, "_PROCESS", installed.GateState())
    installed.install(resolve({"FATHOM_PREFIX_CACHE": request.param}, Facts(state_slots=True)))
    return Engine(tiny_model().eval(), CONFIG, weights="w" * 64)


def questions(engine: Engine, count: int) -> list[Wanted]:
    """Requests with prompts that share beginnings, greedy and sampled, each answered by the engine alone."""
    rng = random.Random(count)
    shared = cpp_text(1, 70).decode()
    found = []
    for number in range(count):
        prompt = shared[: rng.choice([0, 33, 48, 70])] + cpp_text(number, rng.randint(1, 40)).decode()
        fields = {"prompt": prompt, "max_tokens": rng.randint(1, 20), "seed": number, "logprobs": 0}
        fields["temperature"] = rng.choice([0, 0.8, 1.0])
        sampling = Sampling(
            temperature=fields["temperature"], seed=number, max_new_tokens=fields["max_tokens"],
            stop_ids=(BYTES.eod_id,),
        )  # fmt: skip
        [alone] = engine.generate([BYTES.encode(prompt).tolist()], sampling)
        found.append(_wanted(fields, alone))
    engine.close()
    return found


def _wanted(fields: dict[str, Any], alone: Completion) -> Wanted:
    text = BYTES.decode(alone.tokens).decode(errors="replace")
    finish = "stop" if alone.finish is FinishReason.STOP else "length"
    return Wanted(fields, text, len(alone.tokens), finish, list(alone.logprobs))


def check(wanted: Wanted, answer: Answer) -> None:
    """Right to the bit."""
    assert answer.text == wanted.text
    parts = answer.parts if "text/event-stream" in answer.headers["content-type"] else [answer.json]
    choices = [choice for part in parts for choice in part["choices"]]
    assert choices[-1]["finish_reason"] == wanted.finish
    logprobs = [value for choice in choices for value in choice["logprobs"]["token_logprobs"]]
    # Tokens without text at the very end, such as that of the document's end, are not listed.
    assert logprobs == wanted.logprobs[: len(logprobs)]
    assert len(logprobs) >= len(wanted.text)
    if len(parts) == 1 and "usage" in parts[0]:
        assert parts[0]["usage"]["completion_tokens"] == wanted.tokens


class Crowd:
    """Clients of every kind, each with its own luck."""

    def __init__(self, server: Running, wanted: list[Wanted]) -> None:
        self.port, self.wanted = server.port, wanted
        self.seen: Counter[str] = Counter()

    async def send(self, number: int) -> None:
        kinds: list[Callable[[random.Random], Awaitable[None]]] = [
            self.good, self.good, self.good, self.leaves, self.leaves_stream, self.leaves_body, self.oversized,
            self.no_json, self.no_right, self.too_long, self.no_http,
        ]  # fmt: skip
        kind = kinds[number % len(kinds)]
        await kind(random.Random(number))
        self.seen[kind.__name__] += 1

    async def good(self, rng: random.Random) -> None:
        """Asks until there is room."""
        wanted = rng.choice(self.wanted)
        for _ in range(2000):
            answer = await ask(self.port, PATH, wanted.fields | {"stream": rng.random() < 0.5}, headers=RIGHT)
            self.seen[str(answer.status)] += 1
            if answer.status == 200:
                check(wanted, answer)
                return
            assert (answer.status, answer.code) == (503, "queue_full")
            assert int(answer.headers["retry-after"]) == 1
            await asyncio.sleep(rng.uniform(0.01, 0.05))
        raise AssertionError("never any room")

    async def _sent(self, rng: random.Random, *, stream: bool) -> Connection:
        connection = await Connection.open(self.port)
        fields = rng.choice(self.wanted).fields | {"stream": stream, "max_tokens": 40, "prompt": "void f"}
        await connection.send("POST", PATH, json.dumps(fields).encode(), {**JSON, **RIGHT})
        return connection

    async def leaves(self, rng: random.Random) -> None:
        connection = await self._sent(rng, stream=False)
        await asyncio.sleep(rng.uniform(0, 0.2))
        await self._away(connection, rng)

    async def leaves_stream(self, rng: random.Random) -> None:
        connection = await self._sent(rng, stream=True)
        left = rng.randint(1, 4)
        async for _ in connection.events():
            left -= 1
            if left == 0:
                break
        await self._away(connection, rng)

    async def leaves_body(self, rng: random.Random) -> None:
        connection = await Connection.open(self.port)
        head = {"Host": "localhost", "Content-Length": "400", **JSON, **RIGHT}
        await connection.head("POST", PATH, head)
        await connection.write(b'{"prompt": "' + b"x" * rng.randint(0, 100))
        await asyncio.sleep(rng.uniform(0, 0.1))
        await self._away(connection, rng)

    async def _away(self, connection: Connection, rng: random.Random) -> None:
        if rng.random() < 0.5:
            connection.vanish()
        else:
            await connection.close()

    async def oversized(self, rng: random.Random) -> None:
        if rng.random() < 0.5:
            answer = await ask(self.port, PATH, b"[" * 50_000, headers=RIGHT)
        else:
            answer = await ask_chunked(self.port, PATH, [b" " * 5000] * 10, {**JSON, **RIGHT})
        self._refused(answer, 413, "body_too_large")

    async def no_json(self, rng: random.Random) -> None:
        body = rng.choice([b"{", b"\xff\xfe", b'{"prompt": }', b"[" * 4000])
        self._refused(await ask(self.port, PATH, body, headers=RIGHT), 400, "invalid_json")

    async def no_right(self, rng: random.Random) -> None:
        headers = rng.choice([{}, {"Authorization": f"Bearer {TOKEN[:-1]}"}])
        self._refused(await ask(self.port, PATH, {"prompt": "x"}, headers=headers), 401, "invalid_token")

    async def too_long(self, rng: random.Random) -> None:
        answer = await ask(self.port, PATH, {"prompt": "x" * rng.randint(160, 900)}, headers=RIGHT)
        self._refused(answer, 400, "context_length_exceeded")

    async def no_http(self, rng: random.Random) -> None:
        connection = await Connection.open(self.port)
        await connection.write(rng.choice([b"\x00\x01\x02\r\n\r\n", b"POST\r\n\r\n"]))
        assert (await connection.reader.read()).startswith(b"HTTP/1.1 400 ")
        await connection.close()

    def _refused(self, answer: Answer, status: int, code: str) -> None:
        """As it should be, or for want of a place."""
        self.seen[str(answer.status)] += 1
        assert (answer.status, answer.code) in ((status, code), (503, "queue_full"))


class Rest(NamedTuple):
    """What must be the same before and after. room: blocks that are free or cached, held by nobody."""

    room: int
    active: int
    slots: int
    open: int
    files: int
    tasks: int


async def at_rest(server: Running, engine: Engine) -> Rest:
    async def metrics() -> Any:
        return (await ask(server.port, "/metrics", headers=RIGHT)).json

    for _ in range(1000):
        found = await metrics()
        idle = found["jobs"]["open"] == 0 and found["engine"]["running"] == 0
        if idle and not engine.busy and len(asyncio.all_tasks()) <= 4:
            break
        await asyncio.sleep(0.02)
    engine.check()
    blocks = found["engine"]["blocks"]
    assert sum(blocks.values()) == engine.plan.blocks
    files = psutil.Process().num_fds()
    return Rest(
        blocks["free"] + blocks["cached"], blocks["active"], engine._slots.available, found["jobs"]["open"], files,
        len(asyncio.all_tasks()),
    )  # fmt: skip


def storm(engine: Engine, tmp_path: Path, *, clients: int, at_once: int) -> Counter[str]:
    token_file = tmp_path / "token"
    token_file.write_text(TOKEN)
    wanted = questions(engine, 16)

    async def run() -> Counter[str]:
        settings = {"token_file": token_file, "max_body": 20_000, "queue": 8, "max_tokens": CONFIG.max_tokens}
        async with running(engine, **settings) as server:
            crowd = Crowd(server, wanted)
            # Once through every path, so that what is made once is there before it is counted.
            await asyncio.gather(*(crowd.send(number) for number in range(11)))
            before = await at_rest(server, engine)
            assert before.slots == CONFIG.max_batch
            assert (before.active, before.open) == (0, 0)
            gc.collect()
            resident = psutil.Process().memory_info().rss
            gate = asyncio.Semaphore(at_once)

            async def one(number: int) -> None:
                async with gate:
                    await crowd.send(number)

            await asyncio.gather(*(one(number) for number in range(11, 11 + clients)))
            assert await at_rest(server, engine) == before
            gc.collect()
            assert psutil.Process().memory_info().rss - resident < RSS_SLACK
            # And it still works.
            answer = await ask(server.port, PATH, wanted[0].fields, headers=RIGHT)
            check(wanted[0], answer)
            return crowd.seen

    return asyncio.run(run())


def test_a_few_clients_of_every_kind(engine: Engine, tmp_path: Path) -> None:
    seen = storm(engine, tmp_path, clients=33, at_once=33)
    assert seen["good"] == seen["200"] == 12


@pytest.mark.slow
def test_two_hundred_clients_at_once(engine: Engine, tmp_path: Path) -> None:
    seen = storm(engine, tmp_path, clients=200, at_once=200)
    assert sum(seen[kind] for kind in seen if not kind.isdigit()) == 211
    assert seen["503"], "never full: the queue was not tried"
    assert all(seen[status] for status in ("400", "401", "413"))


def test_the_real_engine_streams_what_it_generates(engine: Engine) -> None:
    """Without a crowd: one after the other, and all at once."""
    wanted = questions(engine, 6)

    async def run() -> None:
        async with running(engine) as server:
            for each in wanted:
                check(each, await complete(server.port, **each.fields))
                check(each, await complete(server.port, **each.fields, stream=True))
            together = await asyncio.gather(*(complete(server.port, **each.fields) for each in wanted))
            for each, answer in zip(wanted, together, strict=True):
                check(each, answer)

    asyncio.run(run())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("fields", [{"temperature": 1}, {"temperature": 0, "logprobs": 1}, {"stream": True}])
def test_a_model_whose_logits_are_not_finite_gives_no_answer(engine: Engine, fields: dict[str, Any]) -> None:
    async def run() -> tuple[Answer, ExitStatus]:
        async with running(engine) as server:
            assert (await complete(server.port, prompt="x", max_tokens=3, **fields)).status == 200
            with torch.no_grad():
                engine.model.final_norm.weight[0] = float("nan")
            answer = await complete(server.port, prompt="x", max_tokens=3, **fields)
            return answer, await asyncio.wait_for(server.ended, 15)

    answer, status = asyncio.run(run())
    streamed = "stream" in fields
    assert answer.status == (200 if streamed else 503)
    (body,) = answer.parts if streamed else [answer.json]
    assert (body["error"]["type"], body["error"]["code"]) == ("server_error", "engine_stopped")
    assert "LogitsNotFinite: request 1: logits are not finite" in body["error"]["message"]
    assert "[DONE]" not in answer.body.decode()
    assert status is ExitStatus.FAILURE
