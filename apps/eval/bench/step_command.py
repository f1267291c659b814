"""Options and output of `fathom bench step`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from apps.eval.bench.output import add_shared_options, checked_threads, deliver, in_range
from apps.eval.bench.train_step import StepPlan, StepReceipt, run_step

PRESET, SEQ_LEN = "cpu_demo", 2048  # as recipe cpu_demo: two windows of 1024
QUICK_ROUNDS = 5


def add_step_options(parser: argparse.ArgumentParser) -> None:
    """Which model and how long a row."""
    add_shared_options(parser, rounds=9)
    parser.add_argument("--preset", default=PRESET, help=f"the model ({PRESET})")
    parser.add_argument("--seq-len", type=int, default=SEQ_LEN, help=f"tokens of the row ({SEQ_LEN})")


def run_step_command(args: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Run and print; 1 when the correctness gate is red. Raises UserError for an option out of its range."""
    in_range("--seq-len", args.seq_len, 2, 1 << 20)
    rounds = min(args.n, QUICK_ROUNDS) if args.quick else args.n
    plan = StepPlan(args.preset, args.seq_len, rounds, checked_threads(args), args.seed)

    def run() -> StepReceipt:
        return run_step(plan, command=["fathom", "bench", *arguments], machine=args.machine)

    return deliver(args, run)
