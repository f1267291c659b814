"""`fathom report kernels`: what the compilers say of each Hopper kernel under each gate setting.

Not for compiling (`fathom bench kernels --json` makes the table that is read here); needs no compiler.
"""
# N state  P head width  R rank  C tokens of a chunk  B sequences  S tokens  H heads

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from apps.eval.bench.kernel_table import KernelTable
from apps.eval.report.page import ALONE, Links, render_page
from libs.flags.errors import UserError

_MADE_BY = "`fathom bench kernels --json > FILE` makes one"


def read_kernels(path: Path) -> KernelTable:
    """The table in a file.

    Raises:
        UserError: not there, or not what `fathom bench kernels --json` writes.
    """
    try:
        return KernelTable.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read the table of kernels {path}: {error.strerror}; {_MADE_BY}") from error
    except ValidationError as error:
        what = error.errors()[0]
        where = ".".join(map(str, what["loc"])) or "the file"
        raise UserError(f"{path} is no table of kernels: {where}: {what['msg']}; {_MADE_BY}") from error


def kernels_page(table: KernelTable, links: Links = ALONE) -> str:
    """The page as text."""
    return render_page("kernels.html.j2", links=links, table=table)
