"""`fathom serve`: argument parsing, and the lines on the console when it starts."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from libs.flags.errors import UserError, run_entry

_NEEDED = ("starlette", "uvicorn")


def build_parser() -> argparse.ArgumentParser:
    """The options of `fathom serve`; their ranges are in config.py."""
    parser = argparse.ArgumentParser(
        prog="fathom serve",
        description="Serve a checkpoint over HTTP, in the shape of OpenAI's completions API.",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, type=Path, metavar="RUN_OR_DIR", help="a run (its newest) or a checkpoint")
    add("--host", help="address to listen on (127.0.0.1); another than this machine's own needs --token-file")
    add("--port", type=int, help="8000; 0: a free one")
    add("--token-file", type=Path, metavar="FILE", help="a file with the bearer token that requests must carry")
    add("--name", help="what requests call the model (default: its config's name)")
    add("--device", help="auto (default), cpu or cuda")
    add("--max-batch", type=int, help="requests computed together (8)")
    add("--max-tokens", help="longest request, prompt and generated, as 512 or 4k (4k)")
    add("--kv-blocks", type=int, help="blocks of keys and values (default: room for --max-batch of --max-tokens)")
    add("--draft-length", type=int, help="tokens drafted per step (0); needs FATHOM_MTP_SPECULATION=on")
    add("--queue", type=int, help="requests that may wait besides those computed (64); more are answered 503")
    add("--max-body", type=int, metavar="BYTES", help="of a request's body (1048576)")
    add("--max-header", type=int, metavar="BYTES", help="of a request's line and headers (16384)")
    add("--max-connections", type=int, help="at a time (256)")
    add("--body-timeout", type=float, metavar="SECONDS", help="for a body to arrive (30)")
    add("--timeout", type=float, metavar="SECONDS", help="of a request, waiting and computing (600)")
    add("--grace", type=float, metavar="SECONDS", help="for open requests after SIGTERM or SIGINT (30)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal: 0. 1: the engine failed, and the last line says why."""
    values = vars(build_parser().parse_args(list(sys.argv[1:] if argv is None else argv)))
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"fathom serve needs {' and '.join(missing)}: install the extra with `pip install 'fathom[serve]'`"
        )
    from apps.eval.config import parse_tokens
    from apps.eval.serve.config import ServeConfig
    from apps.eval.serve.load import load, plan_lines
    from apps.eval.serve.server import reserve, serve, url_of

    if "max_tokens" in values:
        values["max_tokens"] = parse_tokens(values["max_tokens"])
    config = ServeConfig.parse(values)
    with reserve(config.host, config.port) as reserved:
        engine, served = load(config)
        print(*plan_lines(engine), sep="\n")
        protection = "no token" if config.token is None else "with a bearer token"
        line = f"serving {served.name} ({served.fingerprint}) at {url_of(reserved)}, {protection}"
        return asyncio.run(serve(engine, served, config, reserved, announce=lambda: print(line, flush=True)))


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
