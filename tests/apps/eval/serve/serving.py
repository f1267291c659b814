"""A server inside the test's own event loop, and an engine whose tokens a test can dictate.

The dictated engine keeps to the interface of `libs.model.inference.engine`; tests/…/test_faults.py uses the real one.
"""

from __future__ import annotations

import asyncio
import hashlib
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

from apps.eval.serve.config import ServeConfig
from apps.eval.serve.server import reserve, serve
from apps.eval.serve.service import Served
from libs.flags.errors import ExitStatus, UserError
from libs.model.inference import BlockUsage, FinishReason, Generated, Sampling
from libs.model.text.tokenizer import Tokenizer
from tests.apps.eval.serve.client import ask

BYTES = Tokenizer.bytes_tokenizer()
POOL = 1000


def lorem(prompt: Sequence[int], sampling: Sampling) -> list[int]:
    """Letters that depend on the prompt and the seed."""
    seed = f"{list(prompt)} {sampling.seed} {sampling.temperature} {sampling.top_p}".encode()
    digest = hashlib.shake_256(seed).digest(sampling.max_new_tokens)
    return BYTES.encode(bytes(97 + byte % 26 for byte in digest)).tolist()


def saying(text: str | bytes) -> Callable[[Sequence[int], Sampling], list[int]]:
    """The same text whatever is asked, then the end of the document."""
    return lambda prompt, sampling: [*BYTES.encode(text).tolist(), BYTES.eod_id]


class Dictated:
    """An engine that says what `says` returns, one token per running request and step.

    gate: steps wait for it while it is clear. trouble: raised by the step after it is set. A block per 16 tokens.
    """

    def __init__(
        self,
        says: Callable[[Sequence[int], Sampling], list[int]] = lorem,
        *,
        max_batch: int = 4,
        max_tokens: int = 256,
        step_seconds: float = 0.0,
    ) -> None:
        self.says, self.max_batch, self.max_tokens, self.step_seconds = says, max_batch, max_tokens, step_seconds
        self.gate, self.trouble = threading.Event(), None
        self.gate.set()
        self.closed = False
        self.aborted: list[int] = []
        self.seen: list[Sampling] = []
        self.threads: set[int] = set()
        self._queue: dict[int, list[int]] = {}
        self._place: dict[int, int] = {}
        self._limit: dict[int, int] = {}
        self._next = 0

    def submit(self, prompt: Sequence[int], sampling: Sampling) -> int:
        self.threads.add(threading.get_ident())
        if len(prompt) + sampling.max_new_tokens > self.max_tokens:
            raise UserError(f"needed {len(prompt) + sampling.max_new_tokens}, available {self.max_tokens}")
        self.seen.append(sampling)
        self._next += 1
        said = self.says(prompt, sampling)
        self._queue[self._next], self._limit[self._next] = said, min(len(said), sampling.max_new_tokens)
        self._place[self._next] = 0
        return self._next

    def step(self) -> list[Generated]:
        self.threads.add(threading.get_ident())
        self.gate.wait()
        time.sleep(self.step_seconds)
        if self.trouble is not None:
            raise self.trouble
        given = []
        for request in list(self._queue)[: self.max_batch]:
            place = self._place[request]
            token = self._queue[request][place]
            self._place[request] += 1
            finished = None
            if token == BYTES.eod_id:
                finished = FinishReason.STOP
            elif place + 1 == self._limit[request]:
                finished = FinishReason.LENGTH
            if finished is not None:
                self._forget(request)
            given.append(Generated(request, token, -0.5 - place / 64, finished))
        return given

    def abort(self, request: int) -> None:
        self.threads.add(threading.get_ident())
        assert request in self._queue, "aborted twice, or after its end"
        self.aborted.append(request)
        self._forget(request)

    def _forget(self, request: int) -> None:
        del self._queue[request], self._place[request], self._limit[request]

    @property
    def busy(self) -> bool:
        return bool(self._queue)

    @property
    def waiting(self) -> int:
        return max(0, len(self._queue) - self.max_batch)

    @property
    def usage(self) -> BlockUsage:
        return BlockUsage(POOL - len(self._queue), 0, len(self._queue), 1)

    @property
    def counters(self) -> dict[str, int]:
        return {"requests": self._next}

    def close(self) -> None:
        self.closed = True


class Running(NamedTuple):
    """port: of the server. ended: its exit status, when it has one."""

    port: int
    ended: asyncio.Task[ExitStatus]

    async def metrics(self) -> Any:
        return (await ask(self.port, "/metrics")).json

    async def rest(self, seconds: float = 20.0) -> Any:
        """The metrics, once nothing is running."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            metrics = await self.metrics()
            if metrics["jobs"]["open"] == 0 and metrics["engine"]["running"] == 0:
                return metrics
            await asyncio.sleep(0.02)
        raise AssertionError(f"still busy: {metrics}")

    async def stop(self) -> ExitStatus:
        if not self.ended.done():
            signal.raise_signal(signal.SIGTERM)
        return await asyncio.wait_for(self.ended, 30)


@asynccontextmanager
async def running(engine: Any, *, served_name: str = "toy", **settings: Any) -> AsyncIterator[Running]:
    """A server on a free port; stopped at the end unless it has ended before."""
    values = {"checkpoint": Path("unused"), "port": 0, "max_batch": 4, "queue": 8, "grace": 5.0, **settings}
    config = ServeConfig.parse(values)
    max_tokens = getattr(engine, "max_tokens", config.max_tokens)
    served = Served(served_name, "fp_0", 1_700_000_000, BYTES, max_tokens)
    reserved, ready = reserve(config.host, config.port), asyncio.Event()
    task = asyncio.create_task(serve(engine, served, config, reserved, announce=ready.set))
    await ready.wait()
    server = Running(reserved.getsockname()[1], task)
    try:
        yield server
    finally:
        if isinstance(engine, Dictated):
            engine.gate.set()
        await server.stop()
