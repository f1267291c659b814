"""What the server offers, behind its HTTP face: encoding, room in the queue, jobs with a deadline, the end.

Not for bytes on a connection (`guard`, `connection`) nor for the shape of answers (`completions`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from apps.eval.serve.errors import ApiError
from apps.eval.serve.schema import CompletionRequest
from apps.eval.serve.worker import EngineThread, Job
from libs.model.inference import Sampling
from libs.model.text.tokenizer import Tokenizer

# A prompt that has so many times the room, however well it is encoded, is refused before time is spent on encoding it.
FAR_TOO_LONG = 4
RESTING, DRAINING, ENDED = "ok", "shutting_down", "engine_stopped"


class Served(NamedTuple):
    """The model on offer. name: what requests call it. fingerprint: of its weights. created: unix seconds."""

    name: str
    fingerprint: str
    created: int
    tokenizer: Tokenizer
    max_tokens: int


class Service:
    """Jobs for one engine. Lives on the event loop.

    Args:
        room: most jobs at a time, running and waiting. timeout: seconds from admission to the last token.
    """

    def __init__(self, served: Served, engine: EngineThread, *, room: int, timeout: float) -> None:
        self.served, self.engine, self.room = served, engine, room
        self._timeout = timeout
        self._jobs: set[Job] = set()
        self._draining = False
        self._longest_piece = int(served.tokenizer.token_bytes.max())
        self.counts = {"accepted": 0, "finished": 0}

    @property
    def health(self) -> str:
        """One word."""
        if self.engine.failure is not None:
            return ENDED
        return DRAINING if self._draining else RESTING

    def refuse_unless_open(self) -> None:
        """Raises ApiError (503) while there is no room, when the server is ending, and without an engine."""
        if self.engine.failure is not None:
            raise ApiError.unavailable(ENDED, f"the engine has stopped and the server ends: {self.engine.failure}")
        if self._draining:
            raise ApiError.unavailable(DRAINING, "the server is shutting down and takes no new requests")
        if len(self._jobs) >= self.room:
            raise ApiError.unavailable("queue_full", f"all {self.room} places are taken; try again")

    def check_model(self, name: str | None) -> None:
        """Raises ApiError (404) for the name of another model."""
        if name is not None and name != self.served.name:
            message = f"no model {name[:80]!r} here; the one served is {self.served.name!r}"
            raise ApiError(404, "model_not_found", message, param="model")

    async def encode(self, asked: CompletionRequest) -> Sequence[int]:
        """The prompt's token ids. Raises ApiError: empty, ids that do not exist, or too long with its completion."""
        tokenizer, wanted = self.served.tokenizer, asked.tokens_wanted
        if isinstance(asked.prompt, list):
            bad = next((i for i in asked.prompt if not 0 <= i < tokenizer.vocab_size), None)
            if bad is not None:
                message = f"prompt: no token has the id {bad}; allowed are 0 to {tokenizer.vocab_size - 1}"
                raise ApiError.invalid(message, param="prompt")
            ids: Sequence[int] = asked.prompt
        else:
            raw = asked.prompt.encode("utf-8")
            at_least = -(-len(raw) // self._longest_piece)
            if at_least > FAR_TOO_LONG * self.served.max_tokens:
                self._check_length(at_least, wanted, "at least ")
            ids = (await asyncio.to_thread(tokenizer.encode, raw)).tolist()
        if not ids:
            raise ApiError.invalid("prompt is empty; it needs at least one token", param="prompt")
        self._check_length(len(ids), wanted, "")
        return ids

    def _check_length(self, prompt: int, wanted: int, bound: str) -> None:
        available = self.served.max_tokens
        if prompt + wanted > available:
            raise ApiError.invalid(
                f"prompt of {bound}{prompt} tokens and max_tokens={wanted}: needed {bound}{prompt + wanted}, available "
                f"{available} tokens per request; shorten one of them, or start the server with a larger --max-tokens",
                param="prompt" if prompt >= available else "max_tokens",
                code="context_length_exceeded",
            )

    @asynccontextmanager
    async def job(self, prompt: Sequence[int], sampling: Sampling) -> AsyncIterator[Job]:
        """A job that the engine has accepted. Leaving the block lets go of it, finished or not.

        Raises:
            ApiError: no room (503), or refused by the engine (400).
        """
        self.refuse_unless_open()
        job = self.engine.submit(prompt, sampling)
        self._jobs.add(job)
        late = ApiError.unavailable("timeout", f"not finished within {self._timeout:g} s")
        timer = asyncio.get_running_loop().call_later(self._timeout, job.fail, late)
        try:
            await job.accepted()
            self.counts["accepted"] += 1
            yield job
            self.counts["finished"] += 1
        finally:
            timer.cancel()
            self._jobs.discard(job)
            self.engine.abort(job)

    def drain(self, grace: float) -> None:
        """Take no new jobs; those that are not finished after so many seconds fail."""
        self._draining = True
        asyncio.get_running_loop().call_later(grace, self._fail_all)

    def _fail_all(self) -> None:
        for job in self._jobs:
            job.fail(ApiError.unavailable(DRAINING, "the server is shutting down"))

    def metrics(self) -> dict[str, Any]:
        """Counters of the engine, its blocks, and the jobs."""
        state = self.engine.state
        return {
            "status": self.health,
            "engine": {
                "running": state.running,
                "waiting": state.waiting,
                "blocks": state.blocks._asdict(),
                "counters": dict(state.counters),
            },
            "jobs": {"open": len(self._jobs), "room": self.room, **self.counts},
        }
