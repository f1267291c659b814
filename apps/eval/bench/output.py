"""What the commands of benchmarks share: options of output and sampling, and a receipt on its way out.

Not for any benchmark's own options.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.table import Table

from apps.eval.bench.ops import RedGate
from apps.eval.bench.receipt import Receipt, write_receipt
from apps.eval.bench.table import print_receipt
from libs.flags.errors import ExitStatus, UserError
from libs.flags.whole_file import try_folder

R = TypeVar("R", bound=Receipt)
MAX_ROUNDS = 1000


def add_shared_options(parser: argparse.ArgumentParser, *, rounds: int | None, json: bool = True) -> None:
    """--n, --threads, --seed, --machine, --json, --quick, --receipt-dir. rounds: None where there is no choice of --n.
    json: whether there is one receipt to print."""
    if json:
        parser.add_argument("--json", action="store_true", help="the receipt on stdout as JSON")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller sizes")
    if rounds is not None:
        parser.add_argument("--n", type=int, default=rounds, help=f"interleaved samples per contender ({rounds})")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own number)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--receipt-dir", type=Path, help="also write <date>_<subject>_<hardware>/receipt.json there")
    parser.add_argument("--machine", help="name of the machine in the receipt (default: its CPU and threads, or GPU)")


def checked_threads(args: argparse.Namespace) -> int:
    """The threads to use. Raises UserError for a shared option out of its range."""
    threads = torch.get_num_threads() if args.threads is None else args.threads
    if "n" in args:
        in_range("--n", args.n, 1, MAX_ROUNDS)
    in_range("--threads", threads, 1, os.cpu_count() or 1)
    check_place(args.receipt_dir)
    return int(threads)


def check_place(receipt_dir: Path | None) -> None:
    """Raises UserError when no folder can be made there: better known before the measurement than after it."""
    if receipt_dir is None:
        return
    try:
        try_folder(receipt_dir)
    except OSError as error:
        raise UserError(f"--receipt-dir {receipt_dir}: no folder can be made there: {error.strerror}") from error


def in_range(option: str, value: float, lowest: float, highest: float) -> None:
    """Raises UserError."""
    if not lowest <= value <= highest:
        raise UserError(f"{option} {value}: allowed are {lowest} to {highest}")


def deliver(
    args: argparse.Namespace, run: Callable[[], R], tables: Callable[[R], Sequence[Table]] | None = None,
    after: Callable[[R, Path | None], None] = lambda receipt, path: None,
) -> int:  # fmt: skip
    """Run, print or dump, write; 1 when the correctness gate is red. after: with the receipt's path, if it has one."""
    try:
        receipt = run()
    except RedGate as red:
        print(f"error: {red}", file=sys.stderr)
        return ExitStatus.FAILURE
    if args.json:
        print(receipt.model_dump_json(indent=2))
    else:
        console = Console(width=None if sys.stdout.isatty() else 110)
        print_receipt(receipt, console, None if tables is None else tables(receipt))
        console.print(f"decision: {receipt.decision.value}: {receipt.decision.reason}", soft_wrap=True, highlight=False)
    path = None
    if args.receipt_dir is not None:
        path = write_receipt(receipt, args.receipt_dir)
        print(f"receipt: {path}", file=sys.stderr)
    after(receipt, path)
    return ExitStatus.OK
