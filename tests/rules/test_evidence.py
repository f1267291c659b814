"""No gate is `measured` or above without a receipt of the whole step whose decision is `kept`."""

from __future__ import annotations

from pathlib import Path

import pytest

from libs.flags import CATALOG, GateSpec, Stage, UserError
from libs.flags.canonical import sha256_hex
from libs.flags.evidence import read_evidence
from libs.flags.promotions import Promotion, raised, read_promotions
from libs.flags.registry import NEEDS_EVIDENCE
from tests.libs.flags.receipts import receipt, write

ROOT = Path(__file__).resolve().parents[2]


def unproven(spec: GateSpec, root: Path = ROOT) -> list[str]:
    """The values of a gate that stand higher than its receipts carry them, with why."""
    proven, why = set(), []
    for path in spec.evidence:
        try:
            proven.add(read_evidence(root / path, spec.name).value)
        except UserError as error:
            why.append(str(error))
    risen = [value for value in spec.values[1:] if spec.stage_of(value) in NEEDS_EVIDENCE]
    return [f"{spec.name}={value} is {spec.stage_of(value)}" for value in risen if value not in proven] + why


def test_every_gate_that_has_risen_is_proven() -> None:
    assert [line for spec in CATALOG.values() for line in unproven(spec)] == []


def test_no_receipt_was_changed_after_a_gate_rose_by_it() -> None:
    changed = [
        promotion.receipt
        for promotion in read_promotions()
        if sha256_hex((ROOT / promotion.receipt).read_bytes()) != promotion.sha256
    ]
    assert changed == []


@pytest.mark.parametrize("scope", ["step", "forward"])
def test_the_rule_sees_a_gate_that_rose_by_a_forward_gain(tmp_path: Path, scope: str) -> None:
    path = write(receipt(comparison={"scope": scope}), tmp_path)
    row = Promotion(
        gate="psiv_cache", value="gmem_pool", receipt=str(path.relative_to(tmp_path)), sha256="0" * 64
    )  # fmt: skip
    spec = CATALOG["psiv_cache"].model_copy(update={"stage": Stage.EXPERIMENTAL, "value_stages": {}, "evidence": ()})
    (risen,) = raised([spec], [row])
    found = unproven(risen, tmp_path)
    assert bool(found) == (scope == "forward")
    assert unproven(risen.model_copy(update={"evidence": ()}), tmp_path) == ["psiv_cache=gmem_pool is measured"]
