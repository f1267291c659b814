"""`fathom bench ops`: argument parsing and output only."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from apps.eval.bench.ops import RedGate, full_plan, quick_plan, run_ops
from apps.eval.bench.receipt import write_receipt
from apps.eval.bench.table import print_receipt
from libs.flags.errors import ExitStatus, UserError, run_entry

MAX_ROUNDS = 1000


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fathom bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    ops = commands.add_parser("ops", help="the MIMO scan against the GEMM rate, plain PyTorch and causal SDPA")
    ops.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    ops.add_argument("--json", action="store_true", help="the receipt on stdout as JSON")
    ops.add_argument("--n", type=int, default=7, help="interleaved samples per contender (3 above S=8192)")
    ops.add_argument("--quick", action="store_true", help="small sizes: shows that it runs, not how fast")
    ops.add_argument("--receipt-dir", type=Path, help="also write <date>_<subject>_<hardware>/receipt.json there")
    ops.add_argument("--threads", type=int, help="CPU threads (default: torch's own number)")
    ops.add_argument("--chunk-size", type=int, default=16, help="chunk of the op; FLOPs are counted at 16")
    ops.add_argument("--seed", type=int, default=0)
    ops.add_argument("--machine", help="name of the machine in the receipt (default: its CPU and threads)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 when the correctness gate is red."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(arguments)
    if args.device != "cpu":
        raise UserError(f"--device {args.device}: there are no GPU kernels yet, so nothing to time; use --device cpu")
    cores = os.cpu_count() or 1
    threads = torch.get_num_threads() if args.threads is None else args.threads
    for option, value, highest in (
        ("--n", args.n, MAX_ROUNDS),
        ("--threads", threads, cores),
        ("--chunk-size", args.chunk_size, 256),
    ):
        if not 1 <= value <= highest:
            raise UserError(f"{option} {value}: allowed are 1 to {highest}")
    if args.receipt_dir is not None and args.receipt_dir.exists() and not args.receipt_dir.is_dir():
        raise UserError(f"--receipt-dir {args.receipt_dir} is not a directory")
    make_plan = quick_plan if args.quick else full_plan
    plan = make_plan(rounds=args.n, chunk_size=args.chunk_size, threads=threads, seed=args.seed)
    try:
        receipt = run_ops(plan, command=["fathom", "bench", *arguments], machine=args.machine)
    except RedGate as red:
        print(f"error: {red}", file=sys.stderr)
        return ExitStatus.FAILURE
    if args.json:
        print(receipt.model_dump_json(indent=2))
    else:
        print_receipt(receipt, Console())
    if args.receipt_dir is not None:
        print(f"receipt: {write_receipt(receipt, args.receipt_dir)}", file=sys.stderr)
    return ExitStatus.OK


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
