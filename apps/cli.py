"""`fathom COMMAND ...`: dispatch to the entry modules, nothing else.

Each command is also `python -m` of the module named in COMMANDS. Modules are imported only when asked for, so that
`fathom flags` starts without torch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from libs.flags.errors import UserError, run_entry


class Command(NamedTuple):
    """Where a command lives, what it is for, and what its exit status says beyond 0, 1 and 2 (`ExitStatus`)."""

    module: str
    function: str
    summary: str
    exits: Mapping[int, str] = MappingProxyType({})


_REFUSED = "a gate was refused"


COMMANDS = {
    "data": Command(
        "apps.train.data.__main__", "main", "build and inspect corpora: build, inspect",
        {130: "interrupted, the directory is as it was"},
    ),
    "train": Command(
        "apps.train.__main__", "main", "train a recipe; resume a run; --dry-run, --show-config",
        {
            1: "other ranks were lost, or a bug",
            2: "also a full disk, a damaged checkpoint, a tampered audit, a plan that does not fit",
            70: "loss or gradient not finite",
            75: "interrupted and saved",
            78: "a gate was refused, ranks differ, or the scan backend failed its self-test",
        },
    ),
    "checkpoint": Command(
        "apps.train.checkpoint.__main__", "main", "saved checkpoints: verify, inspect, export",
        {2: "also a wrong checksum"},
    ),
    "eval": Command("apps.eval.__main__", "main", "evaluate a checkpoint or a run", {78: _REFUSED}),
    "serve": Command(
        "apps.eval.serve.__main__", "main", "a checkpoint behind an OpenAI-compatible HTTP endpoint",
        {1: "the engine failed", 78: _REFUSED},
    ),
    "generate": Command(
        "apps.eval.generate", "main", "text from a checkpoint, streamed; --plan: its memory", {78: _REFUSED}
    ),
    "report": Command("apps.eval.report.__main__", "main", "self-contained HTML: a run, compare, all, receipts ..."),
    "bench": Command(
        "apps.eval.bench.__main__", "main", "benchmarks with receipts: ab, ops, comm; kernels",
        {1: "the correctness gate is red: nothing was timed", 78: "a gate of an arm was refused"},
    ),
    "flags": Command(
        "libs.flags.cli", "main_flags", "gates: list, status, explain, promote, verify, history ...",
        {2: "also a chain that was tampered with", 78: "a run would be refused (status)"},
    ),
    "runs": Command(
        "libs.flags.fleet_cli", "main_runs", "many runs at once: list, show, diff",
        {2: "also a run that cannot be trusted"},
    ),
    "watch": Command("apps.watch.__main__", "main", "a live page of a folder of runs, on localhost"),
    "doctor": Command(
        "apps.doctor.__main__", "main", "what this machine can run, and what to do about the rest",
        {1: "not even the CPU lane works"},
    ),
    "docs": Command(
        "apps.docs.__main__", "main", "renew the documents' parts that are made from the code; --check",
        {1: "a block is stale (--check)"},
    ),
    "log": Command("libs.flags.cli", "main_log", "run logs: check", {1: "a rule is broken"}),
}  # fmt: skip


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
