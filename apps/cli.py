"""`fathom COMMAND ...`: dispatch to the entry modules, nothing else.

Each command is also `python -m` of the module named in COMMANDS. Modules are imported only when asked for, so that
`fathom flags` starts without torch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from libs.flags.errors import UserError, run_entry


class Command(NamedTuple):
    """Where a command lives and what it is for."""

    module: str
    function: str
    summary: str


COMMANDS = {
    "data": Command("apps.train.data.__main__", "main", "build and inspect corpora: build, inspect"),
    "train": Command("apps.train.__main__", "main", "train a recipe; resume a run; --dry-run, --show-config"),
    "checkpoint": Command("apps.train.checkpoint.__main__", "main", "saved checkpoints: verify, inspect, export"),
    "eval": Command("apps.eval.__main__", "main", "evaluate a checkpoint or a run"),
    "report": Command("apps.eval.report.__main__", "main", "write a run's self-contained HTML report"),
    "bench": Command("apps.eval.bench.__main__", "main", "benchmarks with receipts: ops, comm; kernels"),
    "flags": Command("libs.flags.cli", "main_flags", "gates: list, status, explain, audit, verify, diff, history"),
    "log": Command("libs.flags.cli", "main_log", "run logs: check"),
}


def usage() -> str:
    """The help text."""
    width = max(len(name) for name in COMMANDS)
    lines = ["usage: fathom COMMAND [options]", ""]
    lines += [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    lines += ["", "fathom COMMAND --help shows a command's own options."]
    return "\n".join(lines)


def dispatch(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. Raises UserError for an unknown command."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        raise UserError.unknown("command", name, COMMANDS)
    command = COMMANDS[name]
    status: int = getattr(importlib.import_module(command.module), command.function)(rest)
    return status


def main() -> int:
    """Console script entry point."""
    return run_entry(dispatch)


if __name__ == "__main__":
    raise SystemExit(main())
