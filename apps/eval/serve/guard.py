"""What stands between a connection and the application: who may ask, how much, and how long it may take to say it.

An ASGI wrapper around everything. Not for what a request means (`completions`), nor for connections that never become a
request (`connection`).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import urllib.parse
from collections import Counter
from typing import NamedTuple

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from apps.eval.serve.errors import ApiError

OPEN_PATHS = frozenset({"/health"})
# How long the rest of a refused body is read and thrown away: a client that is still sending does not look for an
# answer, and closing on it would lose the answer.
DISCARD_SECONDS = 2.0


class Limits(NamedTuple):
    """max_header, max_body: bytes. body_seconds: from the request line to the end of the body. token: None: none."""

    max_header: int
    max_body: int
    body_seconds: float
    token: str | None


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own, without asking a resolver."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """Refuses before the application sees anything. Attribute `statuses`: answers so far, by status."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app, self._limits = app, limits
        self._digest = None if limits.token is None else _digest(limits.token.encode())
        self.statuses: Counter[int] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request. Raises what the application raises."""
        assert scope["type"] == "http", "websockets and lifespan are switched off"
        headers = Headers(scope=scope)
        body = _Body(receive, self._limits, expects="expect" in headers)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.statuses[message["status"]] += 1
                if not await body.discard():
                    MutableHeaders(raw=message["headers"])["connection"] = "close"
            await send(message)

        try:
            self._check(scope, headers)
        except ApiError as error:
            await error.response()(scope, body.receive, answer)
            return
        await self._app(scope, body.receive, answer)

    def _check(self, scope: Scope, headers: Headers) -> None:
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        size += len(scope["raw_path"]) + len(scope["query_string"])
        if size > self._limits.max_header:
            message = f"request line and headers of {size} bytes; allowed are {self._limits.max_header}"
            raise ApiError(431, "headers_too_large", message)
        if self._digest is None:
            self._check_host(headers.get("host", ""))
        elif scope["path"] not in OPEN_PATHS:
            self._check_token(headers.get("authorization", ""))
        length = headers.get("content-length")
        if length is not None and int(length) > self._limits.max_body:
            raise _too_large(self._limits.max_body)

    def _check_host(self, host: str) -> None:
        """Without a token, a web page whose name has been pointed at this machine must not reach the model."""
        try:
            name = urllib.parse.urlsplit(f"//{host}").hostname
        except ValueError:
            name = None
        if name is None or not is_loopback(name):
            message = f"without a token only requests for this machine itself are answered, not for {host[:80]!r}"
            raise ApiError(421, "wrong_host", message)

    def _check_token(self, authorization: str) -> None:
        """Digests are compared, so that time tells neither the token nor its length."""
        assert self._digest is not None, "no token to check"
        scheme, _, given = authorization.partition(" ")
        right = hmac.compare_digest(_digest(given.strip().encode("latin-1")), self._digest)
        if scheme.lower() != "bearer" or not right:
            message = "wrong or missing token; send `Authorization: Bearer TOKEN`"
            raise ApiError(401, "invalid_token", message, headers={"WWW-Authenticate": "Bearer"})


class _Body:
    """The body of one request on its way in: counted, and with a deadline."""

    def __init__(self, receive: Receive, limits: Limits, *, expects: bool) -> None:
        self._receive, self._limit = receive, limits.max_body
        self._deadline = asyncio.get_running_loop().time() + limits.body_seconds
        self._seconds = limits.body_seconds
        # The client waits for a word before it sends: reading would say it.
        self._expects = expects
        self._size, self._complete = 0, False

    async def receive(self) -> Message:
        """As ASGI's receive. Raises ApiError: too large (413), too slow (408)."""
        if self._complete:
            return await self._receive()
        try:
            message = await self._read(self._deadline)
        except TimeoutError as error:
            message_ = f"the body was not complete after {self._seconds:g} s"
            raise ApiError(408, "body_timeout", message_) from error
        if self._size > self._limit:
            raise _too_large(self._limit)
        return message

    async def discard(self) -> bool:
        """Read what is left and forget it. False: there is more than there is time for."""
        if self._expects:
            return self._complete
        try:
            until = min(self._deadline, asyncio.get_running_loop().time() + DISCARD_SECONDS)
            while not self._complete:
                await self._read(until)
        except TimeoutError:
            return False
        return True

    async def _read(self, until: float) -> Message:
        async with asyncio.timeout_at(until):
            message = await self._receive()
        self._expects = False
        self._size += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        return message


def _too_large(limit: int) -> ApiError:
    return ApiError(413, "body_too_large", f"the body is larger than the {limit} bytes that are allowed")


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
