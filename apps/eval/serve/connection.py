"""One TCP connection: what uvicorn's protocol leaves without a limit, and its errors in our shape.

uvicorn waits without end for the rest of a request's head, and for a client that does not read its answer. Not for
requests (`guard` and what is behind it).
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from apps.eval.serve.errors import ApiError

# From connecting, or from the last answer, to the end of a request's headers.
HEAD_SECONDS = 10.0
# For a client to take what has been written to it.
STALL_SECONDS = 30.0


class Connection(H11Protocol):
    """HTTP/1.1 on one connection, with an end to every wait. `limit_concurrency` of the config limits connections."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._most, self.limit_concurrency = self.limit_concurrency, None
        self._head: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by the loop."""
        super().connection_made(transport)
        # "Paused" then means that the kernel has not taken everything, "resumed" that it has.
        transport.set_write_buffer_limits(high=0)
        if self._most is not None and len(self.connections) > self._most:
            self.app = _overloaded
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop."""
        super().connection_lost(exc)
        for timer in (self._head, self._stall):
            if timer is not None:
                timer.cancel()

    def on_response_complete(self) -> None:
        """Called after each answer."""
        super().on_response_complete()
        self._expect_head()

    def pause_writing(self) -> None:
        """Called by the transport when something is left to send."""
        super().pause_writing()
        self._stall = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Called by the transport when nothing is left to send."""
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()

    def send_400_response(self, msg: str) -> None:
        """Called for bytes that are not HTTP, and for a head without end."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        error = ApiError.invalid("not a valid HTTP/1.1 request, or its headers are too long", code="invalid_http")
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=json.dumps(error.body).encode()),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _expect_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
        self._head = self.loop.call_later(HEAD_SECONDS, self._end_without_request)

    def _end_without_request(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


async def _overloaded(scope: Scope, receive: Receive, send: Send) -> None:
    error = ApiError.unavailable("too_many_connections", "too many connections; try again")
    error.headers["Connection"] = "close"
    await error.response()(scope, receive, send)
