"""Options and output of `fathom bench loss-side`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from apps.eval.bench.loss_side import LossSideReceipt, run_loss_side
from apps.eval.bench.loss_side_runs import LossSidePlan
from apps.eval.bench.output import add_shared_options, checked_threads, deliver, in_range
from apps.eval.config import parse_tokens

RECIPE, HYBRID, WINDOW, STEPS = "cpu_demo", "cpu_demo", "4k", 200
QUICK_STEPS = 40
WORK = Path("runs") / "loss-side"


def add_loss_side_options(parser: argparse.ArgumentParser) -> None:
    """The budget, the seeds, and where the runs are kept. No --n: samples are seeds."""
    add_shared_options(parser, rounds=None)
    parser.add_argument("--seeds", type=int, default=3, help="of weights and data order, for each model (3)")
    parser.add_argument("--steps", type=int, help=f"of each run ({STEPS}; --quick: {QUICK_STEPS})")
    parser.add_argument("--window", default=WINDOW, help=f"tokens of a step ({WINDOW})")
    parser.add_argument("--documents", type=int, default=64, help="held-out documents that are scored (64)")
    parser.add_argument("--max-tokens", default="16k", help="longer documents are not scored, and counted (16k)")
    parser.add_argument("--recipe", default=RECIPE, help=f"everything else ({RECIPE})")
    parser.add_argument("--preset", default=HYBRID, help=f"the hybrid; its dense twin follows ({HYBRID})")
    parser.add_argument("--work", type=Path, default=WORK, help=f"where runs are kept, to go on from ({WORK})")
    parser.add_argument("settings", nargs="*", metavar="-- --section.key VALUE", help="more settings, for both models")


def run_loss_side_command(args: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Run and print; 1 when the two did not get the same. Raises UserError for an option out of its range."""
    steps = args.steps or (QUICK_STEPS if args.quick else STEPS)
    in_range("--seeds", args.seeds, 1, 100)
    in_range("--steps", steps, 2, 10**9)
    in_range("--documents", args.documents, 2, 10**6)
    plan = LossSidePlan(
        recipe=args.recipe,
        hybrid=args.preset,
        window=parse_tokens(args.window),
        steps=steps,
        seeds=tuple(range(args.seed, args.seed + args.seeds)),
        documents=args.documents,
        max_tokens=parse_tokens(args.max_tokens),
        threads=checked_threads(args),
        words=tuple(args.settings),
    )

    def run() -> LossSideReceipt:
        return run_loss_side(plan, args.work, command=["fathom", "bench", *arguments], machine=args.machine)

    return deliver(args, run, _tables)


def _tables(receipt: LossSideReceipt) -> list[Table]:
    table = Table(title="held-out bits per byte", title_justify="left")
    for heading in ("model", "seed", "bits per byte", "95 % over documents", "tokens"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for one in receipt.scores:
        bounds = "" if one.bpb.low is None else f"{one.bpb.low:.4f} - {one.bpb.high:.4f}"
        table.add_row(one.model, str(one.seed), f"{one.bpb.value:.4f}", bounds, f"{one.tokens:,}")
    table.add_section()
    for name in ("hybrid", "twin", "difference"):
        spread = getattr(receipt, name)
        bounds = "one seed" if spread.low is None else f"{spread.low:.4f} - {spread.high:.4f} over seeds"
        table.add_row(name, "all", f"{spread.mean:.4f}", bounds, "")
    return [table]
