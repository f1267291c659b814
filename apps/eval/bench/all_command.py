"""`fathom bench all`: every benchmark that this machine can run, each in a process of its own, a receipt each.

One that fails is reported and stops no other. Not for what a benchmark does.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from apps.eval.bench.output import add_shared_options, checked_threads
from apps.eval.bench.receipt import FILE_NAME
from libs.flags.errors import ExitStatus, UserError

# Benchmark -> its options beside the shared ones, by speed.
QUICK: Mapping[str, tuple[str, ...]] = {
    "ops": ("--quick",),
    "step": ("--quick",),
    "prefix": ("--quick",),
    "decode": ("--quick",),
    "crossover": ("--quick", "--seq-lens", "4k,6k,8k,12k,16k"),
    "psiv": ("--quick",),
}
FULL: Mapping[str, tuple[str, ...]] = dict.fromkeys(QUICK, ())
_SAID = 12  # last lines of what a failed one said


class Ran(NamedTuple):
    """How one ended: its exit status, its seconds, the receipt it wrote, and what it said if it failed."""

    name: str
    status: int
    seconds: float
    receipt: Path | None
    said: str


def add_all_options(parser: argparse.ArgumentParser) -> None:
    """The shared options but --n, of which each benchmark has its own number, and --json; and which to run."""
    add_shared_options(parser, rounds=None, json=False)
    parser.add_argument("--only", help=f"some of {','.join(QUICK)}")


def run_all_command(args: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Run them one after the other; 1 when one failed or wrote no receipt.

    Raises:
        UserError: an option out of its range, or a benchmark that is not there.
    """
    checked_threads(args)
    speed = QUICK if args.quick else FULL
    names = list(speed) if args.only is None else args.only.split(",")
    for name in names:
        if name not in speed:
            raise UserError.unknown("benchmark", name, speed)
    folder = args.receipt_dir or Path(tempfile.mkdtemp(prefix="fathom-bench-"))
    shared = ["--seed", str(args.seed), "--receipt-dir", str(folder)]
    shared += [] if args.threads is None else ["--threads", str(args.threads)]
    shared += [] if args.machine is None else ["--machine", args.machine]
    ran = []
    for name in names:
        print(f"bench all: {name}", file=sys.stderr, flush=True)
        ran.append(run_one(name, [*speed[name], *shared], folder))
    _show(ran)
    return ExitStatus.OK if all(one.status == 0 and one.receipt is not None for one in ran) else ExitStatus.FAILURE


def run_one(name: str, words: Sequence[str], folder: Path) -> Ran:
    """One benchmark in a process of its own."""
    before, started = set(folder.glob(f"*/{FILE_NAME}")), time.monotonic()
    command = [sys.executable, "-m", "apps.eval.bench", name, *words]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    written = sorted(set(folder.glob(f"*/{FILE_NAME}")) - before)
    said = "" if done.returncode == 0 else "\n".join(done.stderr.strip().splitlines()[-_SAID:])
    return Ran(name, done.returncode, time.monotonic() - started, written[0] if written else None, said)


def _show(ran: Sequence[Ran]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 110)
    table = Table(title=f"{sum(one.seconds for one in ran) / 60:.1f} minutes", title_justify="left")
    for heading in ("benchmark", "status", "s", "receipt"):
        table.add_column(heading, justify="right" if heading == "s" else "left", overflow="fold")
    for one in ran:
        status = "done" if one.status == 0 else f"FAILED, exit status {one.status}"
        table.add_row(one.name, status, f"{one.seconds:.0f}", "none" if one.receipt is None else str(one.receipt))
    console.print(table)
    for one in ran:
        if one.said:
            print(f"{one.name}:\n{one.said}", file=sys.stderr)
