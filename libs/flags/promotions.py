"""Which values of gates have been raised to `measured`, by which receipt: `promotions.json` beside this file.

A data file and not an edit of `catalog.py`, because a program that rewrites Python source is one more thing to trust,
while a list of rows is written whole, reads well in a review, and holds the hash of the receipt it rests on.
Not for `default_on` and `locked`: those change a default, which is an edit of the catalogue made by a person.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from libs.flags.errors import UserError
from libs.flags.evidence import read_evidence
from libs.flags.provenance import ROOT
from libs.flags.registry import NEEDS_EVIDENCE, RISE, GateSpec, Stage
from libs.flags.whole_file import write_whole

FILE = Path(__file__).with_name("promotions.json")
RECEIPTS = Path("infra/receipts")
RECEIPT = "receipt.json"


class Promotion(BaseModel):
    """One value of a gate at `measured`. receipt: path below the repository's root; sha256: of that file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gate: str
    value: str
    receipt: str = Field(pattern=r"^infra/receipts/[^/]+/receipt\.json$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Promotions(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    promotions: tuple[Promotion, ...] = ()


def read_promotions(path: Path = FILE) -> tuple[Promotion, ...]:
    """Every promotion, in the order they were made.

    Raises:
        UserError: the file is missing or damaged: a gate must not look less tried, or more, than it is.
    """
    try:
        return Promotions.model_validate_json(path.read_bytes()).promotions
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; it is part of the program") from error
    except ValidationError as error:
        what = "; ".join(e["msg"] for e in error.errors())
        raise UserError(f"{path} is damaged: {what}; settle the merge, or restore what is committed") from error


def raised(specs: Iterable[GateSpec], promotions: Sequence[Promotion]) -> list[GateSpec]:
    """The gates with their promoted values at `measured` and the receipts among their evidence.

    Raises:
        UserError: a promotion of a gate or value that is not there, or that is not `experimental`.
    """
    by_gate: dict[str, list[Promotion]] = {}
    for promotion in promotions:
        by_gate.setdefault(promotion.gate, []).append(promotion)
    found = [_raised(spec, by_gate.pop(spec.name, [])) for spec in specs]
    if by_gate:
        raise UserError(f"promotions of gates that are not in the catalogue: {', '.join(by_gate)}")
    return found


def _raised(spec: GateSpec, promotions: Sequence[Promotion]) -> GateSpec:
    if not promotions:
        return spec
    stages = {word: spec.stage_of(word) for word in spec.values[1:]}
    for promotion in promotions:
        stage = stages.get(promotion.value)
        if stage is None or stage not in (Stage.EXPERIMENTAL, *NEEDS_EVIDENCE):
            raise UserError(
                f"promoted {spec.name}={promotion.value} is {stage or 'no value'}: only experimental ones rise"
            )
        if stage is Stage.EXPERIMENTAL:
            stages[promotion.value] = Stage.MEASURED
    highest = max(stages.values(), key=RISE.index)
    evidence = dict.fromkeys([*spec.evidence, *(promotion.receipt for promotion in promotions)])
    changed = {
        "stage": highest,
        "value_stages": {word: stage for word, stage in stages.items() if stage is not highest},
        "evidence": tuple(evidence),
    }
    return GateSpec(**{**dict(spec), **changed})


def promote(spec: GateSpec, value: str | None, receipt: Path, *, root: Path = ROOT, file: Path = FILE) -> Promotion:
    """Raise a value of `spec` to `measured` on the strength of a receipt, and write that down.

    Raises:
        UserError: the gate cannot rise by a receipt, the receipt lies outside infra/receipts, or it is no evidence.
    """
    try:
        path = receipt.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: links that go round
        raise UserError(f"cannot read the receipt {receipt}: {error}") from error
    folder = (root / RECEIPTS).resolve()
    if path.parent.parent != folder:
        raise UserError(f"{receipt} is not in {RECEIPTS}: evidence is kept with the code; move its folder there first")
    if path.name != RECEIPT:
        raise UserError(f"{receipt} is not named {RECEIPT}: name the file that `fathom bench` wrote")
    evidence = read_evidence(path, spec.name, value)
    _refuse_stage(spec, evidence.value)
    promotion = Promotion(
        gate=spec.name,
        value=evidence.value,
        receipt=path.relative_to(root.resolve()).as_posix(),
        sha256=evidence.sha256,
    )
    with _alone(file):
        _write([*read_promotions(file), promotion], file)
    return promotion


def _refuse_stage(spec: GateSpec, value: str) -> None:
    if value not in spec.values[1:]:
        raise UserError.unknown(f"value of {spec.name}", value, spec.values[1:])
    stage = spec.stage_of(value)
    if stage is Stage.EXPERIMENTAL:
        return
    why = {
        Stage.SCAFFOLD: "it is not built: what cannot run was not measured either",
        Stage.RETIRED: f"it was tried and rejected: {spec.decision}",
    }.get(stage, "it has risen already; a default is changed in libs/flags/catalog.py, which asks for this evidence")
    raise UserError(f"{spec.name}={value} is {stage} and does not rise by a receipt: {why}")


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """No other process promotes meanwhile. The folder is locked, because the file itself is replaced."""
    try:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)
    except OSError as error:
        raise UserError(f"cannot lock {path.parent}: {error.strerror}; use a file system with locks") from error


def _write(promotions: Sequence[Promotion], path: Path) -> None:
    """Whole or not at all."""
    content = Promotions(promotions=tuple(promotions)).model_dump_json(indent=2) + "\n"
    try:
        write_whole(path, content.encode("utf-8"))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; promote in a checkout of the repository") from error
