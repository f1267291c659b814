"""A table of compiled kernels for a terminal. Not for machines: those read the JSON."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from apps.eval.bench.kernel_table import KernelTable


def print_kernels(found: KernelTable, console: Console) -> None:
    """Resources, then grids, aims, and problems."""
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    console.print(f"compiled for {found.target}, not run: {versions}", highlight=False, soft_wrap=True)
    console.print(_kernels(found))
    console.print(_grids(found))
    for aim in found.aims:
        verdict = "[green]met[/green]" if aim.met else "[red]not met[/red]"
        console.print(
            f"aim: {aim.name} {aim.relation} {aim.target:g}: {aim.measured:g}  {verdict}",
            highlight=False,
            soft_wrap=True,
        )
    for problem in found.problems:
        console.print(f"[red]problem:[/red] {problem}", highlight=False, soft_wrap=True)


def _kernels(found: KernelTable) -> Table:
    table = Table(title="kernels at P=64, R=4, C=16", title_justify="left")
    table.add_column("kernel")
    table.add_column("gates")
    for heading in ("N", "threads", "registers", "needed", "spills", "shared", "blocks", "TMA", "wgmma", "mma"):
        table.add_column(heading, justify="right")
    for row in found.kernels:
        numbers = (
            row.N, row.threads, row.registers, row.registers_needed, row.spill_bytes, row.shared_bytes,
            row.blocks_per_multiprocessor, row.tma_sites, row.wgmma, row.mma,
        )  # fmt: skip
        table.add_row(row.kernel, row.gates, *map(str, numbers))
    return table


def _grids(found: KernelTable) -> Table:
    table = Table(title=f"busy multiprocessors of {found.multiprocessors}", title_justify="left")
    table.add_column("kernel")
    for heading in ("B", "split", "grid", "blocks", "busy"):
        table.add_column(heading, justify="right")
    for row in found.grids:
        grid = " x ".join(map(str, row.grid))
        split = "off" if row.split == "off" else f"auto: {row.splits}"
        table.add_row(row.kernel, str(row.B), split, grid, str(row.blocks), str(row.busy_multiprocessors))
    return table
