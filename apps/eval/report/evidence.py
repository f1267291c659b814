"""What stands behind a gate's stage, for the pages: its receipts as the rule reads them, or a decision record.

Not for the rule (`libs.flags.evidence`).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from libs.flags.errors import UserError
from libs.flags.evidence import read_evidence
from libs.flags.provenance import ROOT
from libs.flags.registry import GateSpec


class Proof(NamedTuple):
    """receipt: name of its folder, which is its place on the page of receipts; None for a decision record."""

    text: str
    receipt: str | None


def proofs(spec: GateSpec) -> list[Proof]:
    """What a gate's stage rests on; empty where nothing was shown yet."""
    found = [Proof(_receipt(path, spec), Path(path).parent.name) for path in spec.evidence]
    return found + ([] if spec.decision is None else [Proof(spec.decision, None)])


def _receipt(path: str, spec: GateSpec) -> str:
    """What the receipt shows, or that it is not to be had here: a page must not fail for want of a file."""
    try:
        return str(read_evidence(ROOT / path, spec.name))
    except UserError as error:
        return f"{path}: {str(error).splitlines()[0]}"
