"""POST /v1/completions: one request from its body to its answer, whole or as server-sent events.

The shapes are those of OpenAI's completions API. Not for scheduling (`service`, `worker`) or strings (`text`).
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, Literal, NamedTuple

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from apps.eval.serve.errors import ApiError
from apps.eval.serve.schema import CompletionRequest
from apps.eval.serve.service import Served, Service
from apps.eval.serve.text import Piece, TextStream
from apps.eval.serve.worker import Job
from libs.model.inference import FinishReason, Sampling

Finish = Literal["stop", "length"]
_EVENTS = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store"))


class Part(NamedTuple):
    """What one token, or several, added. tokens: generated so far. finish: set in the last part."""

    piece: Piece
    tokens: int
    finish: Finish | None


class Completions:
    """The endpoint, as an ASGI application."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises ApiError as long as nothing has been answered."""
        self._service.refuse_unless_open()
        asked = CompletionRequest.parse(await _read_json(Headers(scope=scope), receive))
        self._service.check_model(asked.model)
        exchange = _Exchange(self._service, asked, await self._service.encode(asked))
        answer = exchange.stream(send) if asked.stream else exchange.whole(scope, receive, send)
        await _unless_gone(receive, answer)


class _Exchange:
    """A request that is in order, and its answer."""

    def __init__(self, service: Service, asked: CompletionRequest, prompt: Sequence[int]) -> None:
        self._service, self._asked, self._prompt = service, asked, prompt
        self._sampling = _sampling(asked, service.served)
        self._envelope = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.served.name,
            "system_fingerprint": service.served.fingerprint,
            "seed": self._sampling.seed,
        }

    async def whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One JSON object when all is done."""
        async with self._service.job(self._prompt, self._sampling) as job:
            parts = [part async for part in self._parts(job)]
        text = "".join(part.piece.text for part in parts)
        tokens = tuple(token for part in parts for token in part.piece.tokens)
        last = parts[-1]
        body = self._body(Part(Piece(text, tokens), last.tokens, last.finish)) | {"usage": self._usage(last.tokens)}
        await JSONResponse(body)(scope, receive, send)

    async def stream(self, send: Send) -> None:
        """An event for each part with something in it. An error after the first is an event, and then the end."""
        options = self._asked.stream_options
        started, tokens = False, 0
        try:
            async with self._service.job(self._prompt, self._sampling) as job:
                await send({"type": "http.response.start", "status": 200, "headers": list(_EVENTS)})
                started = True
                async for part in self._parts(job):
                    tokens = part.tokens
                    if part.piece.text or part.piece.tokens or part.finish is not None:
                        await _event(send, self._body(part))
        except ApiError as error:
            if not started:
                raise
            await _event(send, error.body)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        if options is not None and options.include_usage:
            await _event(send, self._envelope | {"choices": [], "usage": self._usage(tokens)})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    async def _parts(self, job: Job) -> AsyncIterator[Part]:
        text = TextStream(self._service.served.tokenizer, self._asked.stops)
        tokens = 0
        finish: Finish | None = None
        while finish is None:
            generated = await job.next()
            assert generated.finished is not FinishReason.ABORTED, "only this server aborts"
            tokens += 1
            piece = text.push(generated.token, generated.logprob)
            if generated.finished is not None and not text.stopped:
                rest = text.finish()
                piece = Piece(piece.text + rest.text, piece.tokens + rest.tokens)
            if text.stopped or generated.finished is FinishReason.STOP:
                finish = "stop"
            elif generated.finished is FinishReason.LENGTH:
                finish = "length"
            yield Part(piece, tokens, finish)

    def _body(self, part: Part) -> dict[str, Any]:
        choice = {
            "index": 0,
            "text": part.piece.text,
            "logprobs": self._logprobs(part.piece),
            "finish_reason": part.finish,
        }
        return self._envelope | {"choices": [choice]}

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if self._asked.logprobs is None:
            return None
        best = [{token.text: token.logprob} for token in piece.tokens] if self._asked.logprobs else None
        return {
            "tokens": [token.text for token in piece.tokens],
            "token_logprobs": [token.logprob for token in piece.tokens],
            "top_logprobs": best,
            "text_offset": [token.offset for token in piece.tokens],
        }

    def _usage(self, tokens: int) -> dict[str, int]:
        prompt = len(self._prompt)
        return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}


def _sampling(asked: CompletionRequest, served: Served) -> Sampling:
    return Sampling(
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        seed=asked.seed_or_drawn(),
        max_new_tokens=asked.tokens_wanted,
        stop_ids=(served.tokenizer.eod_id,),
    )


async def _read_json(headers: Headers, receive: Receive) -> bytes:
    """The body. Raises ApiError: not declared as JSON (415), or cut off by the client."""
    kind, encoding = headers.get("content-type", ""), headers.get("content-encoding", "identity")
    if kind.partition(";")[0].strip().lower() != "application/json" or encoding != "identity":
        raise ApiError(
            415,
            "unsupported_media_type",
            f"send `Content-Type: application/json`, not compressed (sent: {kind[:80]!r}, {encoding[:80]!r})",
        )
    chunks, more = [], True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError.invalid("the body ended early", code="disconnected")
        chunks.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(chunks)


async def _event(send: Send, body: dict[str, Any]) -> None:
    """One server-sent event: JSON has no line breaks of its own."""
    data = json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})


async def _unless_gone(receive: Receive, answer: Coroutine[Any, Any, None]) -> None:
    """Run `answer`; cancel it when the client goes away first."""
    answering = asyncio.ensure_future(answer)
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        leaving.cancel()
        if not answering.done():
            answering.cancel()
        await asyncio.gather(answering, leaving, return_exceptions=True)
    if not answering.cancelled():
        answering.result()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
