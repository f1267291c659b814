"""Options and output of `fathom bench prefix` and `fathom bench decode`: sizes, table or JSON."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.table import Table

from apps.eval.bench.decode import DecodeReceipt, run_decode
from apps.eval.bench.decode_job import DecodePlan
from apps.eval.bench.output import add_shared_options, checked_threads, deliver
from apps.eval.bench.prefix import PUBLISHED, PrefixPlan, PrefixReceipt, run_prefix
from apps.eval.bench.receipt import Receipt

BLOCKS = (256, 64, 16)
CONTEXTS = (1024, 4096, 16384, 65536)


def add_inference_options(parser: argparse.ArgumentParser) -> None:
    """Samples, sizes, and where the receipt goes: the same for both."""
    add_shared_options(parser, rounds=3)


def run_prefix_command(args: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Run and print; 1 when tokens differ between modes. Raises UserError for an option out of its range."""
    threads = checked_threads(args)
    plan = PrefixPlan("cpu_demo", *PUBLISHED, BLOCKS, args.n, threads, args.seed)
    if args.quick:
        plan = plan._replace(preset="cpu_tiny", requests=3, prompt_tokens=200, new_tokens=4, blocks=(64, 16))

    def run() -> Receipt:
        return run_prefix(plan, command=["fathom", "bench", *arguments], machine=args.machine)

    return deliver(args, run, _tables)


def run_decode_command(args: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Run and print; 1 when drafts change a token. Raises UserError for an option out of its range."""
    quick = args.quick
    plan = DecodePlan(
        preset="cpu_tiny" if quick else "cpu_demo",
        contexts=(128, 512) if quick else CONTEXTS,
        rounds=args.n,
        prefill_tokens=256 if quick else 4096,
        speculation_preset="cpu_tiny" if quick else "cpu_demo",
        train_steps=10 if quick else 150,
        draft_length=2,
        requests=1,
        new_tokens=12 if quick else 64,
        block_size=64,
        threads=checked_threads(args),
        seed=args.seed,
    )

    def run() -> Receipt:
        return run_decode(plan, command=["fathom", "bench", *arguments], machine=args.machine)

    return deliver(args, run, _tables)


def _tables(receipt: Receipt) -> list[Table]:
    if isinstance(receipt, PrefixReceipt):
        table = Table(title="blocks in use per step, without the dummy", title_justify="left")
        for heading in ("mode", "block", "peak", "mean", "prefill tokens", "skipped of a repeat", "s"):
            table.add_column(heading, justify="left" if heading == "mode" else "right")
        for row in receipt.accounts:
            seconds = receipt.contender(f"{row.mode}_block{row.block_size}").mean_s
            cells = (row.block_size, row.peak_blocks, f"{row.mean_blocks:.1f}", row.prefill_tokens)
            table.add_row(row.mode, *map(str, cells), f"{row.repeat_skipped:.1%}", f"{seconds:.3g}")
        return [table]
    assert isinstance(receipt, DecodeReceipt), "one of the two"
    contexts = Table(title="one request", title_justify="left")
    for heading in ("model", "context", "ms per token", "KV MiB", "state MiB", "prefill tokens/s"):
        contexts.add_column(heading, justify="left" if heading == "model" else "right")
    for at in receipt.contexts:
        sizes = (f"{at.kv_bytes / 2**20:.2f}", f"{at.state_bytes / 2**20:.2f}")
        rate = f"{receipt.prefill_tokens_per_s[at.model]:.0f}"
        contexts.add_row(at.model, str(at.tokens), f"{1e3 * at.seconds_per_token:.2f}", *sizes, rate)
    drafts = Table(title="speculation against plain decode", title_justify="left")
    for heading in ("rollback", "drafted", "accepted", "acceptance", "times faster", "bytes per token and layer"):
        drafts.add_column(heading, justify="left" if heading == "rollback" else "right")
    for one in receipt.speculation:
        rate = f"{one.acceptance:.1%}"
        drafts.add_row(
            one.rollback, str(one.drafted), str(one.accepted), rate, f"{one.speed_up:.2f}", f"{one.rollback_bytes:.0f}"
        )
    return [contexts, drafts]
