"""Options and output of `fathom bench comm`: which lengths, how many processes, table or JSON."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from apps.eval.bench.comm import CommReceipt, run_comm
from apps.eval.bench.comm_job import CommPlan
from apps.eval.bench.comm_step import StepPlan
from apps.eval.bench.operands import Shape
from apps.eval.bench.output import MAX_ROUNDS, check_place, deliver, in_range
from apps.eval.bench.receipt import Ratio
from apps.eval.bench.table import interval
from libs.flags.errors import UserError

SEQ_LENS = (8192, 16384, 32768, 65536)
# The time of one process grows with the row and nothing else: two lengths are enough to see the speed-up.
ALONE_UP_TO = 16384
STEP = StepPlan("cpu_demo", 2048)
QUICK_SEQ_LENS = (256, 512)
QUICK_SHAPE = Shape(S=0, H=4, N=16, P=16)
QUICK_STEP = StepPlan("cpu_tiny", 64)
MAX_PROCESSES = 8


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
        in_range(option, value, lowest, highest)
    if shape.H % args.processes:
        legal = [str(n) for n in range(2, MAX_PROCESSES + 1) if shape.H % n == 0]
        raise UserError(
            f"--processes {args.processes}: the all-to-all gives every process as many of the {shape.H} heads; "
            f"allowed are {', '.join(legal)}"
        )
    for seq_len in seq_lens:
        if seq_len < 1 or seq_len % args.processes:
            raise UserError(f"--seq-len {seq_len}: allowed are multiples of the {args.processes} processes")
    check_place(args.receipt_dir)
    return CommPlan(
        seq_lens=seq_lens,
        rounds=args.n,
        alone_up_to=max(ALONE_UP_TO, min(seq_lens)),
        processes=args.processes,
        chunk_size=args.chunk_size,
        threads=threads,
        seed=args.seed,
        shape=shape,
        step=QUICK_STEP if args.quick else STEP,
    )


def run_comm_command(args: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Run the benchmark; 1 when the correctness gate is red.

    Raises:
        UserError: an option that is not allowed.
    """
    plan, command = _plan(args), ["fathom", "bench", *arguments]
    return deliver(
        args,
        lambda: run_comm(plan, command=command, machine=args.machine),
        lambda receipt: [_layer_table(receipt), _step_table(receipt)],
    )


def _layer_table(receipt: CommReceipt) -> Table:
    """Both ways side by side, a row for each length. Each way's seconds include its exchange."""
    title = "one layer, forward + backward: mean seconds, those of the exchange alone, MB that one rank gives"
    table = Table(title=title, title_justify="left")
    for heading in (
        *("S", "hand-over s", "exchange s", "MB", "all-to-all s", "exchange s", "MB"),
        "all-to-all / hand-over s",
    ):
        table.add_column(heading, justify="right")
    times, ratios = {s.name: f"{s.mean_s:.3g}" for s in receipt.contenders}, {r.name: r for r in receipt.ratios}
    for row in receipt.traffic:
        at = f"S{row.seq_len}"
        ratio = ratios[f"all_to_all_over_hand_over_{at}"]
        table.add_row(
            *(str(row.seq_len), times[f"hand_over_{at}"], times[f"hand_over_exchange_{at}"]),
            *(f"{row.hand_over_bytes / 1e6:.2f}", times[f"all_to_all_{at}"], times[f"all_to_all_exchange_{at}"]),
            *(f"{row.all_to_all_bytes / 1e6:.2f}", _with_interval(ratio)),
        )
    return table


def _step_table(receipt: CommReceipt) -> Table:
    """Speed-ups from one process to all."""
    table = Table(title="speed-up from 1 process", title_justify="left")
    for heading in ("of", "on 1 process s", "on all s", "times faster"):
        table.add_column(heading, justify="left" if heading == "of" else "right")
    for ratio in receipt.ratios:
        if "one_process" not in ratio.numerator:
            continue
        alone, shared = receipt.contender(ratio.numerator), receipt.contender(ratio.denominator)
        table.add_row(shared.name, f"{alone.mean_s:.3g}", f"{shared.mean_s:.3g}", _with_interval(ratio))
    return table


def _with_interval(ratio: Ratio) -> str:
    return f"{ratio.value:.3g} ({interval(ratio)})"
