"""One engine in one thread of its own, and the jobs that the event loop gives it.

The engine is touched by its thread only, a job's queue by the event loop only; between them go calls: to the thread
through a queue that never blocks, back through `call_soon_threadsafe`, both in order. Not for HTTP, text or limits.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from apps.eval.serve.errors import ApiError
from libs.flags.errors import UserError
from libs.model.inference import BlockUsage, Engine, Generated, Sampling

_Command = Callable[[], None]


class EngineState(NamedTuple):
    """The engine's figures after its last step or command. running: requests it holds, waiting ones among them."""

    running: int
    waiting: int
    blocks: BlockUsage
    counters: Mapping[str, int]


class Job:
    """One request on its way through the engine. Made by `EngineThread.submit`, used on the event loop."""

    def __init__(self, prompt: Sequence[int], sampling: Sampling) -> None:
        self.prompt, self.sampling = prompt, sampling
        # The engine's number for it: written and read by the engine's thread.
        self.request: int | None = None
        self._events: asyncio.Queue[Generated | ApiError | None] = asyncio.Queue()

    async def accepted(self) -> None:
        """Wait until the engine has taken it. Raises ApiError when it cannot, or when the job has failed."""
        first = await self._events.get()
        if isinstance(first, ApiError):
            raise first
        assert first is None, "the engine accepts a request before it works on it"

    async def next(self) -> Generated:
        """The next token. Raises ApiError when the job has failed."""
        event = await self._events.get()
        if isinstance(event, ApiError):
            raise event
        assert event is not None, "accepted twice"
        return event

    def accept(self) -> None:
        """The engine has taken it."""
        self._events.put_nowait(None)

    def give(self, generated: Generated) -> None:
        """One more token."""
        self._events.put_nowait(generated)

    def fail(self, error: ApiError) -> None:
        """End it: whoever waits for it gets this error after what has come before."""
        self._events.put_nowait(error)


class EngineThread:
    """Runs an engine until `stop`, or until the engine raises: then every open job fails and `failure` says why."""

    def __init__(self, engine: Engine) -> None:
        self.failure: str | None = None
        self._engine = engine
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._running: dict[int, Job] = {}
        self._open: set[Job] = set()
        self._loop: asyncio.AbstractEventLoop
        self._on_failure: Callable[[str], None]
        # A daemon: a step that never returns must not keep a process alive that was told to end.
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.state = self._look()

    def start(self, on_failure: Callable[[str], None]) -> None:
        """Start the thread; it reports to the running event loop, where `on_failure` gets the reason of its end."""
        self._loop, self._on_failure = asyncio.get_running_loop(), on_failure
        self._thread.start()

    async def stop(self, seconds: float) -> bool:
        """Let the thread end after the step it is in. False: it has not within that time."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join, seconds)
        return not self._thread.is_alive()

    def submit(self, prompt: Sequence[int], sampling: Sampling) -> Job:
        """Hand a request over; the job tells what becomes of it. Never blocks."""
        job = Job(prompt, sampling)
        if self.failure is not None:
            job.fail(_dead(self.failure))
            return job
        self._open.add(job)
        self._commands.put(partial(self._submit, job))
        return job

    def abort(self, job: Job) -> None:
        """Let go of a job in any state; nothing for one that has ended. Never blocks."""
        if job in self._open:
            self._open.discard(job)
            self._commands.put(partial(self._abort, job))

    def _run(self) -> None:
        """The thread."""
        try:
            while self._obey():
                self._step()
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
            self._loop.call_soon_threadsafe(self._fail, reason)
            raise

    def _obey(self) -> bool:
        """Take every command there is, waiting for one while there is nothing to compute. False: stop."""
        while True:
            try:
                command = self._commands.get(block=not self._engine.busy)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            self.state = self._look()

    def _step(self) -> None:
        given = []
        for generated in self._engine.step():
            job = self._running.get(generated.request)
            if job is None:
                continue
            if generated.finished is not None:
                del self._running[generated.request]
            given.append((job, generated))
        self.state = self._look()
        if given:
            self._loop.call_soon_threadsafe(self._give, given)

    def _submit(self, job: Job) -> None:
        try:
            job.request = self._engine.submit(job.prompt, job.sampling)
        except UserError as error:
            refusal = ApiError.invalid(str(error), code="request_refused")
            self._loop.call_soon_threadsafe(job.fail, refusal)
            return
        self._running[job.request] = job
        self._loop.call_soon_threadsafe(job.accept)

    def _abort(self, job: Job) -> None:
        if job.request is not None and self._running.pop(job.request, None) is not None:
            self._engine.abort(job.request)

    def _look(self) -> EngineState:
        engine = self._engine
        return EngineState(len(self._running), engine.waiting, engine.usage, dict(engine.counters))

    def _give(self, given: Sequence[tuple[Job, Generated]]) -> None:
        """On the event loop."""
        for job, generated in given:
            job.give(generated)

    def _fail(self, reason: str) -> None:
        """On the event loop."""
        self.failure = reason
        for job in self._open:
            job.fail(_dead(reason))
        self._on_failure(reason)


def _dead(reason: str) -> ApiError:
    return ApiError.unavailable("engine_stopped", f"the engine has stopped and the server ends: {reason}")
