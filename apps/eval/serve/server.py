"""The life of the server: listen, serve, and end with a status that says how. Never by hanging.

uvicorn carries the connections. Not for loading a model (`__main__`).
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Callable, Generator

import uvicorn

from apps.eval.serve.app import build_app
from apps.eval.serve.config import ServeConfig
from apps.eval.serve.connection import Connection
from apps.eval.serve.guard import Limits
from apps.eval.serve.service import Served, Service
from apps.eval.serve.worker import EngineThread
from libs.flags.errors import ExitStatus, UserError
from libs.model.inference import Engine

# For the step that the engine is in when it is told to stop.
JOIN_SECONDS = 30.0
# Between the last job's end and the last byte of its answer.
LAST_BYTES_SECONDS = 3
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def reserve(host: str, port: int) -> socket.socket:
    """A socket with an address, on which nobody listens yet; port 0 takes a free one.

    Raises:
        UserError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        reserved = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _no_address(host, port, error) from error
    try:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(address)
    except OSError as error:
        reserved.close()
        raise _no_address(host, port, error) from error
    return reserved


def _no_address(host: str, port: int, error: OSError) -> UserError:
    return UserError(f"cannot listen on --host {host} --port {port}: {error.strerror or error}")


def url_of(reserved: socket.socket) -> str:
    """Where a client finds it."""
    host, port = reserved.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve(
    engine: Engine, served: Served, config: ServeConfig, reserved: socket.socket, *, announce: Callable[[], None]
) -> ExitStatus:
    """Serve until a signal (OK) or until the engine fails (FAILURE, with the reason on stderr).

    announce: called once, when clients can connect and signals are obeyed.
    """
    worker = EngineThread(engine)
    service = Service(served, worker, room=config.max_batch + config.queue, timeout=config.timeout)
    limits = Limits(
        max_header=config.max_header,
        max_body=config.max_body,
        # So that a body on its way when the server is told to end has its answer within the grace time.
        body_seconds=min(config.body_timeout, max(config.grace, 1.0)),
        token=config.token,
    )
    settings = uvicorn.Config(
        build_app(service, limits),
        http=Connection,
        loop="asyncio",
        ws="none",
        lifespan="off",
        workers=1,
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        forwarded_allow_ips=[],
        server_header=False,
        limit_concurrency=config.max_connections,
        h11_max_incomplete_event_size=config.max_header,
        timeout_graceful_shutdown=int(config.grace) + LAST_BYTES_SECONDS,
    )
    server = _Server(settings, announce=announce, on_stop=lambda: service.drain(config.grace))
    worker.start(on_failure=lambda reason: server.stop())
    await server.serve(sockets=[reserved])
    ended = await worker.stop(JOIN_SECONDS)
    if worker.failure is not None:
        print(f"error: the engine stopped: {worker.failure}", file=sys.stderr)
        return ExitStatus.FAILURE
    if not ended:
        print(f"error: the engine did not end its step within {JOIN_SECONDS:g} s", file=sys.stderr)
        return ExitStatus.FAILURE
    engine.close()
    return ExitStatus.OK


class _Server(uvicorn.Server):
    """Ends on SIGINT and SIGTERM without dying of them, as uvicorn does after its own shutdown."""

    def __init__(self, config: uvicorn.Config, *, announce: Callable[[], None], on_stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._announce, self._on_stop = announce, on_stop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn: begins to listen."""
        await super().startup(sockets)
        self._announce()

    def stop(self) -> None:
        """Stop accepting and drain; asked a second time, do not wait for connections."""
        if self.should_exit:
            self.force_exit = True
            return
        self.should_exit = True
        self._on_stop()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Called by uvicorn around serving."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)
