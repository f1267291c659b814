"""`fathom report receipts`: every measurement of a folder on one page, with its decision.

Not for one receipt in a terminal (`apps.eval.bench.table`).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from pydantic import ConfigDict

from apps.eval.bench.receipt import FILE_NAME, Receipt
from apps.eval.reading import read_record
from apps.eval.report.page import ALONE, Links, render_page
from libs.flags.errors import UserError
from libs.flags.evidence import RULE


class Receipts(NamedTuple):
    """found: folder name -> receipt, newest first. problems: those that could not be read."""

    found: dict[str, Receipt]
    problems: list[str]


def load_receipts(folder: Path) -> Receipts:
    """Every FOLDER/*/receipt.json. One that cannot be read is a problem on the page and hides no other.

    Raises:
        UserError: no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a directory of receipts; `fathom bench ... --receipt-dir {folder}` makes one")
    found: dict[str, Receipt] = {}
    problems: list[str] = []
    for path in sorted(folder.glob(f"*/{FILE_NAME}")):
        try:
            found[path.parent.name] = read_record(path, _CommonPart, "receipt")
        except UserError as error:
            problems.append(str(error))
    newest_first = sorted(found.items(), key=lambda item: item[1].created, reverse=True)
    return Receipts(dict(newest_first), problems)


class _CommonPart(Receipt):
    """Some subjects say more than the common schema; this page shows what all have."""

    model_config = ConfigDict(extra="ignore")


def receipts_page(folder: Path, links: Links = ALONE) -> str:
    """The page as text."""
    found, problems = load_receipts(folder)
    rows = [_Row(name, receipt) for name, receipt in found.items()]
    return render_page("receipts.html.j2", links=links, folder=folder, receipts=rows, problems=problems, rule=RULE)


class _Row:
    """A receipt as its template sees it: its own fields, its folder's name, and two counts."""

    def __init__(self, name: str, receipt: Receipt) -> None:
        self.name = name
        self.n = max(sampled.n for sampled in receipt.contenders)
        self.aims_met = sum(aim.met for aim in receipt.aims)
        for field in Receipt.model_fields:
            setattr(self, field, getattr(receipt, field))
