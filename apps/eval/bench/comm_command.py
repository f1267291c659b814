"""Options and output of `fathom bench comm`: which lengths, how many processes, table or JSON."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from apps.eval.bench.comm import CommReceipt, run_comm
from apps.eval.bench.comm_job import CommPlan
from apps.eval.bench.operands import Shape
from apps.eval.bench.ops import RedGate
from apps.eval.bench.receipt import write_receipt
from apps.eval.bench.table import print_receipt
from libs.flags.errors import ExitStatus, UserError

SEQ_LENS = (8192, 16384, 32768, 65536)
QUICK_SEQ_LENS = (256, 512)
QUICK_SHAPE = Shape(S=0, H=4, N=16, P=16)
MAX_PROCESSES = 8
MAX_ROUNDS = 1000


def add_comm_options(parser: argparse.ArgumentParser) -> None:
    """Lengths, processes, samples, and where the receipt goes."""
    parser.add_argument("--json", action="store_true", help="the receipt on stdout as JSON")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs, not how fast")
    parser.add_argument("--n", type=int, default=3, help="interleaved samples per contender and length")
    parser.add_argument("--processes", type=int, default=2, help="gloo processes that share the row")
    parser.add_argument("--seq-len", type=int, action="append", help="a length of the row (may be repeated)")
    parser.add_argument("--threads", type=int, help="threads per process (default: the cores, shared evenly)")
    parser.add_argument("--chunk-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--receipt-dir", type=Path, help="also write <date>_<subject>_<hardware>/receipt.json there")
    parser.add_argument("--machine", help="name of the machine in the receipt")


def _plan(args: argparse.Namespace) -> CommPlan:
    cores = os.cpu_count() or 1
    shape = QUICK_SHAPE if args.quick else Shape(S=0)
    threads = max(1, cores // max(1, args.processes)) if args.threads is None else args.threads
    seq_lens = tuple(args.seq_len or (QUICK_SEQ_LENS if args.quick else SEQ_LENS))
    for option, value, lowest, highest in (
        ("--processes", args.processes, 2, MAX_PROCESSES),
        ("--n", args.n, 1, MAX_ROUNDS),
        ("--threads", threads, 1, cores),
        ("--chunk-size", args.chunk_size, 1, 256),
    ):
        if not lowest <= value <= highest:
            raise UserError(f"{option} {value}: allowed are {lowest} to {highest}")
    if shape.H % args.processes:
        legal = [str(n) for n in range(2, MAX_PROCESSES + 1) if shape.H % n == 0]
        raise UserError(
            f"--processes {args.processes}: the all-to-all gives every process as many of the {shape.H} heads; "
            f"allowed are {', '.join(legal)}"
        )
    for seq_len in seq_lens:
        if seq_len < 1 or seq_len % args.processes:
            raise UserError(f"--seq-len {seq_len}: allowed are multiples of the {args.processes} processes")
    if args.receipt_dir is not None and args.receipt_dir.exists() and not args.receipt_dir.is_dir():
        raise UserError(f"--receipt-dir {args.receipt_dir} is not a directory")
    return CommPlan(seq_lens, args.processes, args.n, args.chunk_size, threads, args.seed, shape)


def run_comm_command(args: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Run the benchmark; 1 when the correctness gate is red.

    Raises:
        UserError: an option that is not allowed.
    """
    try:
        receipt = run_comm(_plan(args), command=["fathom", "bench", *arguments], machine=args.machine)
    except RedGate as red:
        print(f"error: {red}", file=sys.stderr)
        return ExitStatus.FAILURE
    if args.json:
        print(receipt.model_dump_json(indent=2))
    else:
        console = Console()
        print_receipt(receipt, console)
        console.print(_traffic_table(receipt))
    if args.receipt_dir is not None:
        print(f"receipt: {write_receipt(receipt, args.receipt_dir)}", file=sys.stderr)
    return ExitStatus.OK


def _traffic_table(receipt: CommReceipt) -> Table:
    table = Table(title="MB given by one rank, per layer, forward + backward", title_justify="left")
    for heading in ("S", "hand-over", "all-to-all", "all-to-all / hand-over"):
        table.add_column(heading, justify="right")
    for row in receipt.traffic:
        times = f"{row.all_to_all_bytes / row.hand_over_bytes:.0f}"
        table.add_row(str(row.seq_len), f"{row.hand_over_bytes / 1e6:.2f}", f"{row.all_to_all_bytes / 1e6:.2f}", times)
    return table
