"""A small HTTP client that can also misbehave: half a body, no reading, gone without a word.

h11 parses what comes back, so that a badly framed answer is an error and not a guess.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any, NamedTuple

import h11

JSON = {"Content-Type": "application/json"}


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return self.json["error"]["code"]

    @property
    def events(self) -> list[str]:
        """The data of every server-sent event; each one is whole and valid UTF-8."""
        blocks = self.body.decode("utf-8").split("\n\n")
        assert blocks.pop() == ""
        assert all(block.startswith("data: ") and "\n" not in block for block in blocks), blocks
        return [block.removeprefix("data: ") for block in blocks]

    @property
    def parts(self) -> list[Any]:
        """The JSON of every event but the closing one."""
        return [json.loads(event) for event in self.events if event != "[DONE]"]

    @property
    def text(self) -> str:
        parts = self.parts if self.headers["content-type"].startswith("text/event-stream") else [self.json]
        return "".join(choice["text"] for part in parts for choice in part["choices"])


class Connection:
    """One connection to a server on this machine."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.protocol = h11.Connection(h11.CLIENT)

    @classmethod
    async def open(cls, port: int) -> Connection:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def send(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> None:
        """A whole request; with a body also its Content-Length."""
        sent = {"Host": "localhost", **headers}
        if body is not None:
            sent.setdefault("Content-Length", str(len(body)))
        await self.head(method, path, sent)
        if body is not None:
            await self.write(self.protocol.send(h11.Data(data=body)))
        await self.write(self.protocol.send(h11.EndOfMessage()))

    async def head(self, method: str, path: str, headers: Mapping[str, str]) -> None:
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        request = h11.Request(method=method, target=path, headers=raw)
        await self.write(self.protocol.send(request))

    async def write(self, data: bytes | None) -> None:
        self.writer.write(data or b"")
        await self.writer.drain()

    async def events(self) -> AsyncIterator[h11.Event]:
        """What comes back, up to its end. Raises h11.RemoteProtocolError when it is cut off."""
        while True:
            event = self.protocol.next_event()
            if event is h11.NEED_DATA:
                self.protocol.receive_data(await self.reader.read(65536))
                continue
            yield event
            if isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
                return

    async def answer(self) -> Answer:
        status, headers, body = 0, {}, b""
        async for event in self.events():
            if isinstance(event, h11.Response):
                status = event.status_code
                headers = {name.decode(): value.decode() for name, value in event.headers}
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
        return Answer(status, headers, body)

    async def close(self) -> None:
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except OSError:
            return

    def vanish(self) -> None:
        """Reset the connection, as a killed client does."""
        linger = struct.pack("ii", 1, 0)
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.transport.abort()


async def ask(
    port: int, path: str, body: Any = None, *, headers: Mapping[str, str] | None = None, method: str | None = None
) -> Answer:
    """One request on a connection of its own. A body that is not bytes is sent as JSON."""
    raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    sent = {**(JSON if raw is not None else {}), **(headers or {})}
    connection = await Connection.open(port)
    try:
        await connection.send(method or ("GET" if raw is None else "POST"), path, raw, sent)
        return await connection.answer()
    finally:
        await connection.close()


async def complete(port: int, **fields: Any) -> Answer:
    """POST /v1/completions."""
    return await ask(port, "/v1/completions", fields)


async def ask_chunked(port: int, path: str, chunks: Iterable[bytes], headers: Mapping[str, str] = JSON) -> Answer:
    """A body without a declared length."""
    connection = await Connection.open(port)
    try:
        await connection.head("POST", path, {"Host": "localhost", "Transfer-Encoding": "chunked", **headers})
        for chunk in chunks:
            await connection.write(connection.protocol.send(h11.Data(data=chunk)))
        await connection.write(connection.protocol.send(h11.EndOfMessage()))
        return await connection.answer()
    finally:
        await connection.close()
