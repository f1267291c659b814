"""The table of decisions in infra/decisions/README.md, and that of measurements in README.md, from the files there."""

from __future__ import annotations

import re
from pathlib import Path

from apps.docs.blocks import read_text, table
from apps.eval.report.receipts_table import receipts_table
from libs.flags.errors import UserError

DECISIONS = "infra/decisions"
RECEIPTS = "infra/receipts"
_FILE = re.compile(r"(\d{4})-[a-z0-9-]+\.md")
_TITLE = re.compile(r"# (\d{4}): (\S.*)")


def decision_table(root: Path) -> str:
    """A row for every record, in the order of their numbers.

    Raises:
        UserError: a file that is not named NNNN-title.md or does not begin with "# NNNN: Title", or a number that two
            records have.
    """
    rows: dict[str, tuple[str, str]] = {}
    for path in sorted((root / DECISIONS).glob("*.md")):
        if path.name == "README.md":
            continue
        named = _FILE.fullmatch(path.name)
        titled = _TITLE.fullmatch(read_text(path).partition("\n")[0])
        if named is None or titled is None or named[1] != titled[1]:
            raise UserError(f"{path}: a record is named NNNN-title.md and begins with '# NNNN: Title', the same number")
        if named[1] in rows:
            raise UserError(f"{path}: number {named[1]} is taken by another record; take the next free one")
        rows[named[1]] = (f"[{named[1]}]({path.name})", titled[2])
    return table(("record", "decision"), rows.values())


def measurement_table(root: Path) -> str:
    """A row for the newest receipt of each subject on each machine.

    Raises:
        UserError: a receipt that cannot be read.
    """
    return receipts_table(root / RECEIPTS, root)
