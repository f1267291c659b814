"""Options and output of `fathom bench crossover`: lengths, budget, table, plot."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from apps.eval.bench.crossover import CrossoverReceipt, run_crossover
from apps.eval.bench.crossover_job import MODELS, CrossoverPlan, configs
from apps.eval.bench.model_step import How, Precision
from apps.eval.bench.modelled import read_modelled
from apps.eval.bench.output import add_shared_options, checked_threads, deliver, in_range
from apps.eval.bench.table import interval
from apps.eval.config import parse_tokens
from libs.flags.errors import UserError

SEQ_LENS = "4k,6k,8k,12k,16k,24k,32k,48k,64k"
QUICK_SEQ_LENS, QUICK_ROUNDS, QUICK_MINUTES = "4k,6k,8k,12k,16k", 3, 6.0
PRESET = {"cpu": "cpu_demo", "cuda": "130m"}
PRECISION: Mapping[str, Precision] = {"cpu": "fp32", "cuda": "bf16"}


def add_crossover_options(parser: argparse.ArgumentParser) -> None:
    """Which models, at which lengths, for how long. None: the option was not given."""
    add_shared_options(parser, rounds=7)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--preset", help="the hybrid; its dense twin follows (cpu: cpu_demo, cuda: 130m)")
    parser.add_argument("--seq-lens", metavar="4k,8k,...", help=f"({SEQ_LENS}; --quick: {QUICK_SEQ_LENS})")
    parser.add_argument(
        "--max-minutes", type=float, help=f"leave out what would not fit (90; --quick: {QUICK_MINUTES:g})"
    )
    parser.add_argument("--checkpointing", default="none", choices=("none", "block"), help="of activations")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="(cpu: fp32, cuda: bf16)")
    parser.add_argument("--scan", default="auto", help="backend of the scan (auto)")
    parser.add_argument("--modelled", action="append", default=[], type=Path, metavar="FILE",
                        help="a record of `fathom train --aot`, shown as modelled (may be repeated)")  # fmt: skip
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also write the page with the curves there")


def run_crossover_command(args: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Run and print; 1 when the correctness gate is red.

    Raises:
        UserError: an option that is not allowed.
    """
    plan, modelled = _plan(args), read_modelled(args.modelled)
    if args.plot is not None and not args.plot.absolute().parent.is_dir():
        raise UserError(f"--plot {args.plot}: give the name of a file in a directory that exists")

    def run() -> CrossoverReceipt:
        command = ["fathom", "bench", *arguments]
        return run_crossover(plan, command=command, machine=args.machine, modelled=modelled)

    def draw(receipt: CrossoverReceipt, path: Path | None) -> None:
        if args.plot is None:
            return
        # jinja2 is of the extra 'eval'.
        from apps.eval.report.crossover_page import crossover_page
        from apps.eval.report.page import write_page

        write_page(crossover_page(receipt), args.plot)

    return deliver(args, run, _tables, draw)


def _plan(args: argparse.Namespace) -> CrossoverPlan:
    threads = checked_threads(args)
    minutes = args.max_minutes if args.max_minutes is not None else QUICK_MINUTES if args.quick else 90.0
    in_range("--max-minutes", minutes, 0.01, 24 * 60)
    lengths = sorted(
        {parse_tokens(part) for part in (args.seq_lens or (QUICK_SEQ_LENS if args.quick else SEQ_LENS)).split(",")}
    )
    in_range("--seq-lens", lengths[0], 4, lengths[0])
    precision: Precision = args.precision or PRECISION[args.device]
    plan = CrossoverPlan(
        preset=args.preset or PRESET[args.device],
        seq_lens=tuple(lengths),
        rounds=min(args.n, QUICK_ROUNDS) if args.quick else args.n,
        how=How(args.device, precision, args.checkpointing, args.scan, args.seed),
        seconds=60 * minutes,
        threads=threads,
    )
    configs(plan)  # refuses an unknown preset, or one without a twin
    return plan


def _tables(receipt: CrossoverReceipt) -> list[Table]:
    table = Table(title="one training step on one row", title_justify="left")
    for heading in ("S", "hybrid s", "twin s", "hybrid / twin", "95 %", "n", "tokens/s", "twin's", "MiB", "twin's"):
        table.add_column(heading, justify="right")
    by = {(point.model, point.seq_len): point for point in receipt.points}
    for ratio in receipt.ratios:
        seq_len = int(ratio.name.rsplit("_S", 1)[1])
        hybrid, twin = (by[model, seq_len] for model in MODELS)
        peaks = ["" if p.peak_bytes is None else f"{p.peak_bytes / 2**20:.0f}" for p in (hybrid, twin)]
        table.add_row(
            *(f"{seq_len:,}", f"{hybrid.seconds:.4g}", f"{twin.seconds:.4g}", f"{ratio.value:.3f}", interval(ratio)),
            *(str(ratio.n), f"{hybrid.tokens_per_s:,.0f}", f"{twin.tokens_per_s:,.0f}", *peaks),
        )
    crossings = Table(title="where the hybrid begins to need less", title_justify="left", show_header=False)
    for crossing in receipt.crossings:
        crossings.add_row(crossing.quantity, crossing.sentence())
    return [table, crossings, *([_modelled(receipt)] if receipt.modelled else [])]


def _modelled(receipt: CrossoverReceipt) -> Table:
    table = Table(title="MODELLED: compiled for a slice that is not here, never run", title_justify="left")
    for heading in ("slice", "recipe", "S", "ms", "tokens/s", "GiB per chip", "note"):
        table.add_column(heading, justify="left" if heading in ("slice", "recipe", "note") else "right")
    for row in receipt.modelled:
        milliseconds = "" if row.seconds is None else f"{1e3 * row.seconds:.1f}"
        rate = "" if row.seconds is None else f"{row.tokens_per_step / row.seconds:,.0f}"
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f}"
        table.add_row(row.slice, row.recipe, f"{row.seq_len:,}", milliseconds, rate, peak, row.note or "")
    return table
