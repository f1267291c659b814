"""The receipt: what a benchmark measured, on what, with how many samples, and what was decided.

Not for measuring (ops.py) or printing (table.py). A receipt with a red correctness check cannot be built.
"""

from __future__ import annotations

import os
import re
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from apps.eval.bench.follows import require_reason, require_same
from libs.flags.errors import UserError
from libs.flags.evidence import Scope, decide
from libs.flags.paired import Interval, paired_difference, paired_ratio

SCHEMA_VERSION: Literal[1] = 1
FILE_NAME = "receipt.json"
NO_CHANGE = "decides about no change"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Code(_Record):
    """Which code ran. The git fields are None when unknown, with the reason."""

    version: str
    git_commit: str | None
    git_dirty: bool | None
    git_dirty_hash: str | None
    git_reason: str | None

    @classmethod
    def of(cls, source: Mapping[str, Any]) -> Code:
        """From `libs.flags.provenance.snapshot`, taken before the measurement: it names what ran."""
        named = {key: source[key] for key in cls.model_fields if key != "version"}
        return cls(version=source["packages"]["fathom"], **named)


class Gpu(_Record):
    """The GPU and its state when the run began; null where nothing could be read."""

    name: str = Field(min_length=1)
    capability: str = Field(pattern=r"^\d+\.\d+$")
    multiprocessors: int = Field(ge=1)
    memory_bytes: int = Field(gt=0)
    cuda: str = Field(description="the CUDA that torch is built with")
    driver: str | None
    sm_clock_mhz: float | None
    memory_clock_mhz: float | None
    max_sm_clock_mhz: float | None
    power_limit_w: float | None
    temperature_c: float | None


class Hardware(_Record):
    """machine: the name a reader knows it by. threads: those that torch used. gpu: exactly when the device is one."""

    machine: str = Field(min_length=1)
    device: Literal["cpu", "cuda"]
    cpu: str
    cpu_count: int = Field(ge=1)
    cpu_affinity: int = Field(ge=1)
    threads: int = Field(ge=1)
    memory_bytes: int = Field(gt=0)
    load_before: float = Field(ge=0, description="1-minute load average just before: how alone the machine was")
    gpu: Gpu | None = None

    @model_validator(mode="after")
    def _a_gpu_is_named(self) -> Self:
        if (self.device == "cuda") != (self.gpu is not None):
            raise ValueError(f"device {self.device} with gpu {self.gpu}: a CUDA receipt names its GPU, no other does")
        return self


class Sampled(_Record):
    """One contender's samples in seconds, in round order: sample i of two contenders is a pair."""

    name: str
    what: str
    samples_s: list[float] = Field(min_length=1)
    n: int
    mean_s: float
    std_s: float | None = Field(description="sample standard deviation; null with one sample")
    min_s: float
    flops: float | None = None
    warm_up: bool

    @classmethod
    def of(cls, name: str, what: str, samples_s: Sequence[float], *, flops: float | None, warm_up: bool) -> Sampled:
        """The record of these samples with their mean, deviation and minimum."""
        return cls(
            name=name,
            what=what,
            samples_s=list(samples_s),
            n=len(samples_s),
            mean_s=statistics.fmean(samples_s),
            std_s=statistics.stdev(samples_s) if len(samples_s) > 1 else None,
            min_s=min(samples_s),
            flops=flops,
            warm_up=warm_up,
        )

    @model_validator(mode="after")
    def _summary_follows_from_samples(self) -> Self:
        if any(seconds <= 0 for seconds in self.samples_s):
            raise ValueError(f"{self.name}: a sample is not a positive time")
        seconds = self.samples_s
        actual = {"n": len(seconds), "mean_s": statistics.fmean(seconds), "min_s": min(seconds)}
        std_s = statistics.stdev(seconds) if len(seconds) > 1 else None
        require_same(self.name, self, self.model_copy(update={**actual, "std_s": std_s}))
        return self


class Ratio(_Record):
    """scale * numerator time / denominator time: geometric mean over pairs with its 95 % t-interval."""

    name: str
    numerator: str
    denominator: str
    scale: float
    value: float
    low: float | None
    high: float | None
    n: int

    @classmethod
    def of(cls, name: str, numerator: Sampled, denominator: Sampled, *, scale: float = 1.0) -> Ratio:
        """The ratio of two contenders' paired samples; the interval is null for one pair."""
        value, interval = paired_ratio(numerator.samples_s, denominator.samples_s)
        return cls(
            name=name,
            numerator=numerator.name,
            denominator=denominator.name,
            scale=scale,
            value=scale * value,
            low=None if interval is None else scale * interval.low,
            high=None if interval is None else scale * interval.high,
            n=min(numerator.n, denominator.n),
        )


class Memory(_Record):
    """Peak extra bytes of forward+backward; see bench/memory.py for the two methods. On a GPU: torch's allocator."""

    name: str
    seq_len: int
    input_bytes: int
    allocator_bytes: int
    resident_bytes: int | None = Field(description="null where the system does not tell")
    extra_bytes: int = Field(description="the larger of the two readings")
    multiple: float = Field(description="extra_bytes / input_bytes")


class Check(_Record):
    """One correctness comparison, made in the same process just before the timing."""

    name: str
    error: float
    tolerance: float
    passed: bool


class Aim(_Record):
    """A figure to reach, the one measured, and whether it is met (by the value, not by its interval)."""

    name: str
    measured: float
    relation: Literal[">=", "<=", "<"]
    target: float
    met: bool

    @model_validator(mode="after")
    def _met_follows(self) -> Self:
        measured, target = self.measured, self.target
        met = {">=": measured >= target, "<=": measured <= target, "<": measured < target}[self.relation]
        if self.met != met:
            raise ValueError(f"aim {self.name}: {measured} {self.relation} {target} is {met}, it says {self.met}")
        return self


class LeftOut(_Record):
    name: str
    reason: str


class Comparison(_Record):
    """B against A: what the decision rests on.

    scope: what a sample times. gate: the one gate in which B differs from A when nothing else does, with the value it
    has in A (baseline) and in B (value); None when more differs. difference_s: mean of B - A over pairs.
    """

    a: str
    b: str
    scope: Scope
    gate: str | None
    baseline: str | None
    value: str | None
    ratio: Ratio
    difference_s: float
    difference_low_s: float | None
    difference_high_s: float | None

    @classmethod
    def of(cls, a: Sampled, b: Sampled, *, scope: Scope, gate: tuple[str, str, str] | None) -> Comparison:
        """Of two contenders' paired samples. gate: its name, value in A, value in B."""
        mean, interval = paired_difference(b.samples_s, a.samples_s)
        name, baseline, value = gate or (None, None, None)
        return cls(
            a=a.name, b=b.name, scope=scope, gate=name, baseline=baseline, value=value,
            ratio=Ratio.of(f"{b.name}_over_{a.name}", b, a), difference_s=mean,
            difference_low_s=None if interval is None else interval.low,
            difference_high_s=None if interval is None else interval.high,
        )  # fmt: skip

    def decision(self) -> Decision:
        """What the rule says of it (`libs.flags.evidence.RULE`)."""
        ratio = self.ratio
        interval = None if ratio.low is None or ratio.high is None else Interval(ratio.low, ratio.high)
        verdict = decide(ratio.value, interval, self.scope, ratio.n)
        return Decision(value=verdict.value, reason=verdict.reason)


class Decision(_Record):
    """record: a baseline measurement that decides about no change. The others: see `libs.flags.evidence.RULE`."""

    value: Literal["record", "kept", "noise", "rejected"]
    reason: str = Field(min_length=1)

    @classmethod
    def of_aims(cls, aims: Sequence[Aim]) -> Decision:
        """Of a measurement that compares nothing: how many of its aims are met."""
        return cls(value="record", reason=f"{sum(aim.met for aim in aims)} of {len(aims)} aims met; {NO_CHANGE}")


class Receipt(_Record):
    """Everything needed to judge and to repeat one benchmark."""

    schema_version: Literal[1] = SCHEMA_VERSION
    what: str
    subject: str = Field(pattern=r"^[a-z0-9_]+$")
    created: str = Field(pattern=r"^\d{4}-\d\d-\d\dT")
    command: list[str]
    code: Code
    config: dict[str, JsonValue]
    config_hash: str
    gates_hash: str
    gates: dict[str, JsonValue]
    hardware: Hardware
    versions: dict[str, str]
    correctness: list[Check] = Field(min_length=1)
    contenders: list[Sampled] = Field(min_length=1)
    ratios: list[Ratio]
    memory: list[Memory]
    aims: list[Aim]
    left_out: list[LeftOut]
    notes: list[str]
    comparison: Comparison | None = None
    decision: Decision

    @field_validator("correctness")
    @classmethod
    def _green(cls, checks: list[Check]) -> list[Check]:
        red = [check.name for check in checks if not check.passed or check.error > check.tolerance]
        if red:
            raise ValueError(f"no receipt without a green correctness gate; red: {', '.join(red)}")
        return checks

    @model_validator(mode="after")
    def _ratios_follow_from_samples(self) -> Self:
        for stated in self.ratios:
            pair = self.contender(stated.numerator), self.contender(stated.denominator)
            require_same(f"ratio {stated.name}", stated, Ratio.of(stated.name, *pair, scale=stated.scale))
        return self

    @model_validator(mode="after")
    def _decision_follows_from_samples(self) -> Self:
        stated = self.comparison
        if stated is None:
            if self.decision.value != "record":
                raise ValueError(f"decision {self.decision.value} without a comparison: nothing was decided")
            if self.aims or "aims met" in self.decision.reason:
                require_reason(self.decision.reason, Decision.of_aims(self.aims).reason)
            return self
        gate = None
        if stated.gate is not None and stated.baseline is not None and stated.value is not None:
            gate = (stated.gate, stated.baseline, stated.value)
        actual = Comparison.of(self.contender(stated.a), self.contender(stated.b), scope=stated.scope, gate=gate)
        require_same("comparison", stated, actual)
        if self.decision.value != actual.decision().value:
            raise ValueError(f"decision {self.decision.value}, but the rule says {actual.decision().reason}")
        require_reason(self.decision.reason, actual.decision().reason)
        return self

    def contender(self, name: str) -> Sampled:
        """The contender of that name. Raises ValueError when it did not run."""
        for sampled in self.contenders:
            if sampled.name == name:
                return sampled
        raise ValueError(f"{name}: there is no sample of it")

    def ratio(self, name: str) -> Ratio:
        """The ratio of that name. Raises ValueError when there is none."""
        for ratio in self.ratios:
            if ratio.name == name:
                return ratio
        raise ValueError(f"{name}: there is no such ratio")

    def directory_name(self) -> str:
        """<date>_<subject>_<hardware>, as infra/receipts names its folders."""
        hardware = re.sub(r"[^a-z0-9]+", "-", self.hardware.machine.lower()).strip("-")
        return f"{self.created[:10]}_{self.subject}_{hardware}"


def write_receipt(receipt: Receipt, parent: Path) -> Path:
    """Write PARENT/<date>_<subject>_<hardware>/receipt.json and return its path.

    A second receipt of that day and subject gets a running number: a receipt is never overwritten. The folder appears
    with its file or not at all.

    Raises:
        UserError: the place cannot be written.
    """
    directory = parent / receipt.directory_name()
    number = 2
    try:
        while directory.exists():
            directory = parent / f"{receipt.directory_name()}_{number}"
            number += 1
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".receipt-", dir=parent) as place:
            aside = Path(place) / directory.name
            aside.mkdir()
            (aside / FILE_NAME).write_text(receipt.model_dump_json(indent=2) + "\n", encoding="utf-8")
            os.rename(aside, directory)
    except OSError as error:
        raise UserError(f"cannot write the receipt into {parent}: {error.strerror}") from error
    return directory / FILE_NAME
