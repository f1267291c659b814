"""Options and output of `fathom bench ab`: the two arms, how often, table or JSON."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from apps.eval.bench.ab import AbPlan, run_ab
from apps.eval.bench.ab_arm import Arm, Steps
from apps.eval.bench.output import MAX_ROUNDS, check_place, deliver, in_range

MAX_STEPS = 10_000


def add_ab_options(parser: argparse.ArgumentParser) -> None:
    """The two arms, the samples, and where the receipt goes."""
    example = "'--recipe cpu_demo --train.activation_checkpointing block'"
    parser.add_argument("--a", required=True, metavar="TEXT", help="the base: gates, then options of `fathom train`")
    parser.add_argument("--b", required=True, metavar="TEXT", help=f"what is tried, such as {example}")
    parser.add_argument("--n", type=int, default=19, help="interleaved samples of each")
    parser.add_argument("--steps", type=int, default=8, help="steps that make one sample")
    parser.add_argument("--skip", type=int, default=3, help="steps before them that are left out")
    parser.add_argument(
        "--tolerance", type=float, default=1e-3, help="of loss and gradient norm, where gates differ only"
    )
    parser.add_argument("--launcher", default="", metavar="TEXT", help="such as 'torchrun --nproc-per-node 8'")
    parser.add_argument("--limit", type=float, default=1800, metavar="SECONDS", help="for one process")
    parser.add_argument("--seed", type=int, default=0, help="of the order within rounds")
    parser.add_argument("--json", action="store_true", help="the receipt on stdout as JSON")
    parser.add_argument("--receipt-dir", type=Path, help="also write <date>_<subject>_<hardware>/receipt.json there")
    parser.add_argument("--machine", help="name of the machine in the receipt (default: its CPU and threads, or GPU)")


def _plan(args: argparse.Namespace) -> AbPlan:
    for option, value, lowest, highest in (
        ("--n", args.n, 1, MAX_ROUNDS),
        ("--steps", args.steps, 1, MAX_STEPS),
        ("--skip", args.skip, 0, MAX_STEPS),
        ("--tolerance", args.tolerance, 0, 1),
        ("--limit", args.limit, 1, 86_400),
    ):
        in_range(option, value, lowest, highest)
    check_place(args.receipt_dir)
    return AbPlan(
        a=Arm.parse("a", args.a),
        b=Arm.parse("b", args.b),
        n=args.n,
        steps=Steps(args.skip, args.steps),
        tolerance=args.tolerance,
        seed=args.seed,
        launcher=tuple(shlex.split(args.launcher)),
        limit_s=args.limit,
    )


def run_ab_command(args: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Run the comparison; 1 when the correctness gate is red. The decision is the receipt's, not the exit status's.

    Raises:
        UserError: an option that is not allowed, or an arm that does not run. RunRefused: a gate of an arm.
    """
    plan, command = _plan(args), ["fathom", "bench", *arguments]
    return deliver(args, lambda: run_ab(plan, command=command, machine=args.machine))
