"""When a measurement counts: the decision rule, and whether a receipt is evidence for a gate.

Not the receipt's own schema, which says much more (`apps.eval.bench.receipt`): this reads what a decision rests on, and
works the interval out again from the samples rather than believe what is stated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from libs.flags.canonical import sha256_hex
from libs.flags.errors import UserError
from libs.flags.paired import Interval, paired_ratio
from libs.flags.registry import OFF

Scope = Literal["step", "forward_backward", "forward"]
Word = Literal["kept", "noise", "rejected"]
WHOLE_STEP: Scope = "step"
# Fewer pairs make an interval that says more about luck than about the change.
MIN_PAIRS = 7
RULE = (
    "kept: the 95 % interval of the time of B over A, whole training step, lies below 1; "
    "rejected: it lies above 1; noise: it holds 1, or it is not of the whole step and not above 1, or it comes of "
    f"fewer than {MIN_PAIRS} pairs"
)


class Verdict(NamedTuple):
    """What a comparison of B with A decides, and why."""

    value: Word
    reason: str


def decide(ratio: float, interval: Interval | None, scope: Scope, pairs: int) -> Verdict:
    """The decision rule (`RULE`). ratio: time of B over time of A, of so many pairs."""
    if interval is None:
        return Verdict("noise", f"B takes {ratio:.4f} of A's time, from one pair: no interval")
    said = f"B takes {ratio:.4f} of A's time ({interval.low:.4f} to {interval.high:.4f})"
    if not all(map(math.isfinite, (ratio, *interval))):
        return Verdict("noise", f"{said}: not finite")
    if pairs < MIN_PAIRS:
        return Verdict("noise", f"{said}, from {pairs} pairs: {MIN_PAIRS} are the fewest that count")
    if interval.low > 1:
        return Verdict("rejected", f"{said}: slower beyond noise")
    if not interval.high < 1:
        return Verdict("noise", f"{said}: the interval holds 1")
    if scope != WHOLE_STEP:
        return Verdict("noise", f"{said}, but of {scope} alone: only the whole step decides")
    return Verdict("kept", f"{said}: faster beyond noise, whole step")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class _Code(_Part):
    git_commit: str | None
    git_dirty: bool | None


class _Hardware(_Part):
    machine: str
    device: str


class _Check(_Part):
    name: str
    error: float
    tolerance: float


class _Samples(_Part):
    name: str
    samples_s: list[float] = Field(min_length=1)


class _Comparison(_Part):
    a: str
    b: str
    scope: Scope
    gate: str | None
    baseline: str | None
    value: str | None


class _Decision(_Part):
    value: Literal["record", "kept", "noise", "rejected"]


class _Measured(_Part):
    schema_version: Literal[1]
    created: str
    code: _Code
    hardware: _Hardware
    correctness: list[_Check] = Field(min_length=1)
    contenders: list[_Samples]
    comparison: _Comparison | None = None
    decision: _Decision


class Evidence(NamedTuple):
    """What a receipt shows for a gate: this value, on this machine, so much faster. sha256: of the file."""

    gate: str
    value: str
    ratio: float
    interval: Interval
    pairs: int
    machine: str
    device: str
    created: str
    sha256: str

    def __str__(self) -> str:
        gain = f"{self.ratio:.4f} of the step's time ({self.interval.low:.4f} to {self.interval.high:.4f})"
        return f"{self.gate}={self.value} on {self.machine}: {gain}, {self.pairs} pairs, {self.created[:10]}"


def read_evidence(path: Path, gate: str, value: str | None = None) -> Evidence:
    """What the receipt at `path` shows for `gate` (and `value`, where one is given).

    Raises:
        UserError: it is not evidence; every reason.
    """
    try:
        content = path.read_bytes()
        measured = _Measured.model_validate_json(content)
    except OSError as error:
        raise UserError(f"cannot read the receipt {path}: {error.strerror}") from error
    except ValidationError as error:
        what = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
        raise UserError(f"{path} is not a receipt: {what}") from error
    reasons = list(_objections(measured, gate, value))
    if reasons:
        listed = "\n".join(f"  - {reason}" for reason in reasons)
        raise UserError(
            f"{path} is no evidence for {gate}{f'={value}' if value else ''}:\n{listed}\n  the rule: {RULE}"
        )
    comparison = measured.comparison
    assert comparison is not None
    assert comparison.value is not None
    a, b = _arms(measured, comparison)
    ratio, interval = paired_ratio(b.samples_s, a.samples_s)
    assert interval is not None
    return Evidence(
        gate, comparison.value, ratio, interval, len(a.samples_s), measured.hardware.machine, measured.hardware.device,
        measured.created, sha256_hex(content),
    )  # fmt: skip


def _objections(measured: _Measured, gate: str, value: str | None) -> Iterator[str]:
    comparison = measured.comparison
    for check in measured.correctness:
        if not check.error <= check.tolerance:
            yield f"its correctness gate is red: {check.name}: error {check.error:g}, tolerance {check.tolerance:g}"
    if measured.code.git_commit is None or measured.code.git_dirty is not False:
        yield "the code that ran cannot be had again: no commit, or uncommitted changes"
    if comparison is None:
        yield f"it compares no two configurations (decision {measured.decision.value}); see `fathom bench ab`"
        return
    if comparison.gate != gate:
        yield f"it compares {f'gate {comparison.gate}' if comparison.gate else 'no single gate'}"
    elif comparison.baseline != OFF:
        yield f"A had {comparison.gate}={comparison.baseline}: the gain is shown over {OFF}"
    if comparison.value is None:
        yield "it does not say which value B had"
    elif value is not None and comparison.value != value:
        yield f"B had the value {comparison.value}"
    if comparison.scope != WHOLE_STEP:
        yield f"it times {comparison.scope} alone: a gain that does not move the whole step is no gain"
    if measured.decision.value != "kept":
        yield f"its decision is {measured.decision.value}, not kept"
    yield from _doubts(measured, comparison)


def _doubts(measured: _Measured, comparison: _Comparison) -> Iterator[str]:
    """What the samples themselves say against it."""
    if not {comparison.a, comparison.b} <= {sampled.name for sampled in measured.contenders}:
        yield f"it has no samples of {comparison.a} and {comparison.b}"
        return
    a, b = _arms(measured, comparison)
    if len(a.samples_s) != len(b.samples_s) or min(a.samples_s + b.samples_s) <= 0:
        yield "its samples are not pairs of positive times"
        return
    try:
        ratio, interval = paired_ratio(b.samples_s, a.samples_s)
    except UserError as error:
        yield str(error)
        return
    verdict = decide(ratio, interval, comparison.scope, len(a.samples_s))
    if verdict.value != "kept" and measured.decision.value == "kept":
        yield f"its own samples say {verdict.value}: {verdict.reason}"


def _arms(measured: _Measured, comparison: _Comparison) -> tuple[_Samples, _Samples]:
    by_name = {sampled.name: sampled for sampled in measured.contenders}
    return by_name[comparison.a], by_name[comparison.b]
