"""Which receipts the README's table shows: the newest of each subject and machine, quick ones last, none hidden."""

from __future__ import annotations

from pathlib import Path

import pytest

from apps.eval.bench.receipt import Aim, Receipt, write_receipt
from apps.eval.report.receipts_table import receipts_table
from libs.flags.errors import UserError
from tests.apps.eval.report.test_pages import make_receipt


def _write(receipt: Receipt, root: Path, **changed: object) -> None:
    write_receipt(receipt.model_copy(update=changed), root / "receipts")


def test_newest_of_each_subject_and_quick_ones_last(tmp_path: Path) -> None:
    _write(make_receipt("ops", 0.9, day=2, what="old"), tmp_path)
    _write(make_receipt("ops", 0.9, day=3, what="new"), tmp_path)
    _write(make_receipt("ops", 0.9, day=4, what="quick one"), tmp_path, command=["fathom", "bench", "ops", "--quick"])
    _write(make_receipt("psiv", 0.9, day=4, what="only | quick"), tmp_path, command=["fathom", "--quick"])
    head, rule, *rows = receipts_table(tmp_path / "receipts", tmp_path).splitlines()
    assert head.startswith("| measured |")
    assert rule == "|---|---|---|---|"
    assert len(rows) == 2
    assert rows[0].startswith("| new | Box, 2026-01-03 | **kept**: B takes 0.90")
    assert rows[0].endswith("[receipt](receipts/2026-01-03_ops_box/receipt.json) |")
    assert rows[1].startswith("| only \\| quick (quick sizes) |")


def test_aims_are_shown_met_or_not(tmp_path: Path) -> None:
    aims = [Aim(name="share", measured=0.5, relation=">=", target=0.2, met=True),
            Aim(name="ratio", measured=4.2, relation="<=", target=4.0, met=False)]  # fmt: skip
    _write(make_receipt("ops", 1.0), tmp_path, aims=aims)
    (row,) = receipts_table(tmp_path / "receipts", tmp_path).splitlines()[2:]
    assert "share 0.5, aim >= 0.2; ratio 4.2, aim <= 4 **not met**" in row


def test_a_damaged_receipt_is_not_passed_over(tmp_path: Path) -> None:
    _write(make_receipt("ops", 1.0), tmp_path)
    bad = tmp_path / "receipts" / "2026-01-09_ops_box" / "receipt.json"
    bad.parent.mkdir()
    bad.write_text("{}")
    with pytest.raises(UserError, match="2026-01-09_ops_box"):
        receipts_table(tmp_path / "receipts", tmp_path)
