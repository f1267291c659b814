"""`fathom report kernels`: what the compilers say of each Hopper kernel under each gate setting.

Not for compiling (`fathom bench kernels --json` makes the table that is read here); needs no compiler.
"""
# N state  P head width  R rank  C tokens of a chunk  B sequences  S tokens  H heads

from __future__ import annotations

from pathlib import Path

from apps.eval.bench.kernel_table import KernelTable
from apps.eval.reading import read_record
from apps.eval.report.page import ALONE, Links, render_page

_MADE_BY = "`fathom bench kernels --json > FILE` makes one"


def read_kernels(path: Path) -> KernelTable:
    """The table in a file.

    Raises:
        UserError: not there, or not what `fathom bench kernels --json` writes.
    """
    return read_record(path, KernelTable, "table of kernels", hint=_MADE_BY)


def kernels_page(table: KernelTable, links: Links = ALONE) -> str:
    """The page as text."""
    return render_page("kernels.html.j2", links=links, table=table)
