"""The page over HTTP: four files and one stream of server-sent events; nothing can be changed through it.

Not for what is shown (feed.py). Standard library: a handful of readers on one machine need no more.
"""

from __future__ import annotations

import json
import socket
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from ipaddress import IPv6Address, ip_address
from typing import Any
from urllib.parse import urlsplit

from apps.watch.feed import Feed

# Nothing from elsewhere, no inline script: run names and reasons come from files that anyone may have written.
_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'"
_KEEP_ALIVE_S = 15.0
_TEMPLATES = "apps.eval.report.templates"
_FILES = {
    "/": ("text/html", (("apps.watch", "page.html"),)),
    "/watch.js": ("text/javascript", ((_TEMPLATES, "tables.js"), ("apps.watch", "watch.js"))),
    "/watch.css": ("text/css", ((_TEMPLATES, "report.css"), (_TEMPLATES, "tables.css"), ("apps.watch", "watch.css"))),
}


def _is_loopback(text: str) -> bool:
    """Of an address; False for anything else."""
    try:
        address = ip_address(text)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback


class WatchServer(ThreadingHTTPServer):
    """Serves one feed. keep_alive_s: an idle stream says something that often, so that a dead reader is noticed."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, host: str, port: int, feed: Feed, keep_alive_s: float = _KEEP_ALIVE_S) -> None:
        self.feed = feed
        self.keep_alive_s = keep_alive_s
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), _Handler)
        # Where it listens decides, not how that was written: LOCALHOST and 127.0.0.2 are this machine too.
        self.local = _is_loopback(str(self.server_address[0]))

    @property
    def url(self) -> str:
        host, port = str(self.server_address[0]), self.server_address[1]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that has gone is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: WatchServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self._from_elsewhere():
            # Another site's page whose name was made to point here (DNS rebinding) is not this machine's user.
            self._text(HTTPStatus.FORBIDDEN, "this page is served to localhost only\n")
        elif path == "/events":
            self._stream()
        elif path in _FILES:
            kind, parts = _FILES[path]
            content = b"\n".join(resources.files(package).joinpath(name).read_bytes() for package, name in parts)
            self._send(HTTPStatus.OK, kind, content)
        else:
            self._text(HTTPStatus.NOT_FOUND, "no such page; the page is /\n")

    do_HEAD = do_GET

    def _refuse(self) -> None:
        self._text(HTTPStatus.METHOD_NOT_ALLOWED, "read only\n")

    do_POST = do_PUT = do_DELETE = do_PATCH = _refuse

    def _from_elsewhere(self) -> bool:
        try:
            name = urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
        except ValueError:
            name = ""
        return self.server.local and name != "localhost" and not _is_loopback(name)

    def _stream(self) -> None:
        """Everything at first, then what changes, until the reader or the server goes."""
        self.close_connection = True
        self.send_response(HTTPStatus.OK)
        self._headers("text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        version, feed = 0, self.server.feed
        while self.command != "HEAD" and not feed.closed:
            news = feed.since(version, self.server.keep_alive_s)
            if news is None:
                self.wfile.write(b": still here\n\n")
            else:
                version = news.version
                self.wfile.write(f"event: runs\ndata: {json.dumps(news.plain())}\n\n".encode())
            self.wfile.flush()

    def _text(self, status: HTTPStatus, text: str) -> None:
        self.close_connection = True  # a body that was sent and not read must not be taken for the next request
        self._send(status, "text/plain", text.encode())

    def _send(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(status)
        self._headers(kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _headers(self, kind: str) -> None:
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")

    def version_string(self) -> str:
        return "fathom-watch"

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the terminal is the user's."""
