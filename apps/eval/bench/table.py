"""A receipt as tables for a terminal. Not for machines: those read the JSON."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from apps.eval.bench.receipt import Check, Hardware, Ratio, Receipt

_MANY_CHECKS = 12


def print_receipt(receipt: Receipt, console: Console, figures: Sequence[Table] | None = None) -> None:
    """Correctness first, then times, ratios and memory, aims, and what was left out.

    figures: other tables in place of those of times, ratios and memory.
    """
    hardware = receipt.hardware
    commit = (receipt.code.git_commit or receipt.code.git_reason or "unknown")[:12]
    dirty = " with uncommitted changes" if receipt.code.git_dirty else ""
    console.print(f"[bold]{receipt.what}[/bold]", highlight=False, soft_wrap=True)
    console.print(
        f"machine {hardware.machine}; {_device(hardware)}; load before {hardware.load_before:.2f}; "
        f"torch {receipt.versions['torch']}; commit {commit}{dirty}",
        highlight=False,
        soft_wrap=True,
    )
    for line in _checks(receipt.correctness):
        console.print(f"  green: {line}", highlight=False, soft_wrap=True)
    for table in _figures(receipt) if figures is None else figures:
        console.print(table)
    for aim in receipt.aims:
        verdict = "[green]met[/green]" if aim.met else "[red]not met[/red]"
        console.print(
            f"aim: {aim.name} {aim.relation} {aim.target:g}: {aim.measured:.3g}  {verdict}",
            highlight=False,
            soft_wrap=True,
        )
    for left_out in receipt.left_out:
        console.print(f"left out: {left_out.name}: {left_out.reason}", highlight=False, soft_wrap=True)
    for note in receipt.notes:
        console.print(f"[dim]{note}[/dim]", highlight=False, soft_wrap=True)


def _figures(receipt: Receipt) -> list[Table]:
    """What there is to show: a benchmark need not have ratios, nor measure memory."""
    tables = [_times(receipt)]
    if receipt.ratios:
        tables.append(_ratio_table(receipt))
    if receipt.memory:
        tables.append(_memory(receipt))
    return tables


def _device(hardware: Hardware) -> str:
    if hardware.gpu is None:
        return f"{hardware.threads} threads"
    clock = hardware.gpu.sm_clock_mhz
    at = "clock unknown" if clock is None else f"at {clock:.0f} MHz"
    return f"{hardware.gpu.name}, {hardware.gpu.multiprocessors} multiprocessors, {at}, driver {hardware.gpu.driver}"


def _checks(checks: Sequence[Check]) -> list[str]:
    """A line for each, or, when they are many, one for each tolerance with the check that came closest to it."""
    if len(checks) <= _MANY_CHECKS:
        return [f"{check.name}: {check.error:.2g} (tolerance {check.tolerance:.0e})" for check in checks]
    lines = []
    for tolerance in sorted({check.tolerance for check in checks}):
        group = [check for check in checks if check.tolerance == tolerance]
        worst = max(group, key=lambda check: check.error)
        lines.append(f"{len(group)} checks within {tolerance:g}; the worst: {worst.name}: {worst.error:.2g}")
    return lines


def _times(receipt: Receipt) -> Table:
    table = Table(title="seconds per call", title_justify="left")
    table.add_column("contender")
    for heading in ("n", "mean", "std", "min", "GFLOP/s"):
        table.add_column(heading, justify="right")
    for s in receipt.contenders:
        rate = "" if s.flops is None else f"{s.flops / s.mean_s / 1e9:.1f}"
        std = "" if s.std_s is None else f"{s.std_s:.3g}"
        table.add_row(s.name, str(s.n), f"{s.mean_s:.4g}", std, f"{s.min_s:.4g}", rate)
    return table


def _ratio_table(receipt: Receipt) -> Table:
    table = Table(title="ratios of paired samples", title_justify="left")
    table.add_column("ratio")
    for heading in ("value", "95 % interval", "n"):
        table.add_column(heading, justify="right")
    for ratio in receipt.ratios:
        table.add_row(ratio.name, f"{ratio.value:.3g}", interval(ratio), str(ratio.n))
    return table


def interval(ratio: Ratio) -> str:
    """The 95 % interval of a ratio."""
    return "one pair" if ratio.low is None or ratio.high is None else f"{ratio.low:.3g} - {ratio.high:.3g}"


def _memory(receipt: Receipt) -> Table:
    table = Table(title="peak extra memory of forward+backward, MiB", title_justify="left")
    table.add_column("contender")
    for heading in ("S", "inputs", "allocator", "resident", "larger / inputs"):
        table.add_column(heading, justify="right")
    for m in receipt.memory:
        mib = [
            "" if value is None else f"{value / 2**20:.0f}"
            for value in (m.input_bytes, m.allocator_bytes, m.resident_bytes)
        ]
        table.add_row(m.name, str(m.seq_len), *mib, f"{m.multiple:.2f}")
    return table
