"""Options and output of `fathom bench psiv`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.table import Table

from apps.eval.bench.operands import Shape
from apps.eval.bench.output import add_shared_options, checked_threads, deliver, in_range
from apps.eval.bench.psiv import PsivPlan, PsivReceipt, run_psiv
from apps.eval.bench.table import interval

SEQ_LEN = {"cpu": 2048, "cuda": 8192}
QUICK_SEQ_LEN = 512
CHUNK = 16


def add_psiv_options(parser: argparse.ArgumentParser) -> None:
    """Which device and how long a row."""
    add_shared_options(parser, rounds=7)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seq-len", type=int, help=f"tokens (cpu: {SEQ_LEN['cpu']}, cuda: {SEQ_LEN['cuda']})")


def run_psiv_command(args: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Run and print; 1 when the correctness gate is red. Raises UserError for an option out of its range."""
    seq_len = args.seq_len or (QUICK_SEQ_LEN if args.quick else SEQ_LEN[args.device])
    in_range("--seq-len", seq_len, 1, 1 << 20)
    plan = PsivPlan(args.device, Shape(seq_len), CHUNK, args.n, checked_threads(args), args.seed)

    def run() -> PsivReceipt:
        return run_psiv(plan, command=["fathom", "bench", *arguments], machine=args.machine)

    return deliver(args, run, _tables)


def _tables(receipt: PsivReceipt) -> list[Table]:
    offers = Table(title=f"stages by backend; here: {receipt.result.replace('_', ' ')}", title_justify="left")
    for heading in ("backend", "stages", "trains here"):
        offers.add_column(heading)
    for offer in receipt.offers:
        offers.add_row(offer.backend, ", ".join(offer.stages) or "none", offer.reason or "yes")
    times = Table(title=f"forward + backward; the product takes {receipt.product_bytes / 2**20:.0f} MiB",
                  title_justify="left")  # fmt: skip
    for heading in ("contender", "n", "mean ms", "what"):
        times.add_column(heading, justify="right" if heading in ("n", "mean ms") else "left")
    for one in receipt.contenders:
        times.add_row(one.name, str(one.n), f"{1e3 * one.mean_s:.4g}", one.what)
    ratios = Table(title="ratios of paired samples", title_justify="left")
    for heading in ("ratio", "value", "95 % interval"):
        ratios.add_column(heading, justify="left" if heading == "ratio" else "right")
    for ratio in receipt.ratios:
        ratios.add_row(ratio.name, f"{ratio.value:.4g}", interval(ratio))
    return [offers, times, ratios]
