"""`fathom watch RUNS_DIR`: options, the server's thread, and the loop that looks at the runs."""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from apps.watch.feed import Feed
from apps.watch.server import WatchServer
from libs.flags.errors import ExitStatus, UserError, run_entry
from libs.flags.runs import RUNS

DEFAULT_PORT = 8790
_REST = 4  # times as long as looking took: ten thousand runs must not keep a core busy that trains


def build_parser() -> argparse.ArgumentParser:
    """The options of `fathom watch`."""
    parser = argparse.ArgumentParser(
        "fathom watch", description="A live page of a folder of runs; read-only.", allow_abbrev=False
    )
    parser.add_argument("runs_dir", metavar="RUNS_DIR", nargs="?", default=str(RUNS))
    parser.add_argument("--host", default="127.0.0.1", help="other than this machine's own: everyone there can read it")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="0: any that is free")
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="how often the runs are looked at")
    parser.add_argument("--limit", type=int, default=200, metavar="N", help="show the N runs that wrote last")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until interrupted.

    Raises:
        UserError: no such folder, an option out of its range, or the port is taken.
    """
    options = build_parser().parse_args(argv)
    for option, value, lowest, highest in (
        ("--port", options.port, 0, 65535),
        ("--every", options.every, 0.1, 3600),
        ("--limit", options.limit, 1, 10_000),
    ):
        if not lowest <= value <= highest:
            raise UserError(f"{option} {value}: allowed are {lowest} to {highest}")
    if not options.host:
        raise UserError("--host '' would be every interface; name one: 127.0.0.1, or 0.0.0.0 for all of them")
    feed = Feed(Path(options.runs_dir), options.limit)
    try:
        server = WatchServer(options.host, options.port, feed)
    except OSError as error:
        feed.close()
        raise UserError(f"cannot listen on {options.host}:{options.port}: {error.strerror}; see --port") from error
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"watching {options.runs_dir}: {server.url} (Ctrl-C ends it)", flush=True)
    took = 0.0
    try:
        while True:
            time.sleep(max(options.every, _REST * took))
            started = time.monotonic()
            feed.refresh()
            took = time.monotonic() - started
    except KeyboardInterrupt:
        return ExitStatus.OK
    finally:
        feed.close()
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
