"""The table of measurements that `fathom docs` writes into README.md, made from the receipts.

Not for the page about them (receipts_page.py).
"""

from __future__ import annotations

from pathlib import Path

from apps.eval.bench.receipt import FILE_NAME, Receipt
from apps.eval.report.receipts_page import load_receipts
from libs.flags.errors import UserError

_QUICK = "--quick"


def receipts_table(folder: Path, root: Path) -> str:
    """Markdown with links from `root`: a row for the newest receipt of each subject on each machine; quick ones only
    where there is no other.

    Raises:
        UserError: no such folder, or a receipt that cannot be read: a table must not hide it.
    """
    found, problems = load_receipts(folder)
    if problems:
        raise UserError("the table would leave out what cannot be read:\n" + "\n".join(problems))
    newest: dict[tuple[str, str], str] = {}
    # Newest first, the quick ones after all others: what is there first stays.
    for name, receipt in sorted(found.items(), key=lambda item: _QUICK in item[1].command):
        newest.setdefault((receipt.subject, receipt.hardware.machine), name)
    rows = [_row((folder / name / FILE_NAME).relative_to(root), found[name]) for _, name in sorted(newest.items())]
    return "\n".join(["| measured | on | result | receipt |", "|---|---|---|---|", *rows])


def _row(path: Path, receipt: Receipt) -> str:
    what = receipt.what + (" (quick sizes)" if _QUICK in receipt.command else "")
    on = f"{receipt.hardware.machine}, {receipt.created[:10]}"
    aims = [
        f"{aim.name} {aim.measured:.3g}, aim {aim.relation} {aim.target:.3g}{'' if aim.met else ' **not met**'}"
        for aim in receipt.aims
    ]
    decided = "" if receipt.comparison is None else f"**{receipt.decision.value}**: "
    said = [f"{decided}{receipt.decision.reason}", *aims]
    link = f"[receipt]({path.as_posix()})"
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in (what, on, "; ".join(said), link)) + " |"
