"""What a run log can say: one model per event, every field typed, nothing extra.

Not for the envelope or for writing (see `runlog`). Payload fields lie flat beside the envelope in a log line.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, JsonValue, field_validator, model_validator

Level = Literal["debug", "info", "warning", "error"]
Status = Literal["completed", "requeue", "refused", "failed"]
ENVELOPE_FIELDS = ("schema", "ts", "mono_ns", "run_id", "attempt", "rank", "level", "event", "step")
LEVELS: tuple[str, ...] = get_args(Level)


class Event(BaseModel):
    """Base of all events. name: the event's name in the log. needs_step: it must be emitted with a step.

    Numbers are finite: a log line is strict JSON, and a NaN belongs into `anomaly.nonfinite` by name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    name: ClassVar[str]
    needs_step: ClassVar[bool] = False

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        if "name" not in cls.__dict__:
            return
        clash = set(cls.model_fields) & set(ENVELOPE_FIELDS)
        assert not clash, f"{cls.__name__}: {sorted(clash)} belong to the envelope"
        assert cls.name not in EVENTS, f"two models for event {cls.name}"
        EVENTS[cls.name] = cls


EVENTS: dict[str, type[Event]] = {}


class RunStart(Event):
    """The first event of an attempt. gates_hash is None when the gates were refused before a set existed."""

    name = "run.start"
    command: list[str]
    recipe: str | None
    config_hash: str
    gates_hash: str | None
    world_size: int


class ConfigResolved(Event):
    """config: nested values. origins: dotted key -> where its value came from (default, file, ...)."""

    name = "config.resolved"
    config: dict[str, JsonValue]
    origins: dict[str, str]


class GateRow(BaseModel):
    """One gate of a resolved set, as `GateSet.summary()` gives it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    gate: str
    variable: str
    value: bool | str
    default: bool | str
    stage: str
    outcome: Literal["off", "active"]
    reason: str
    source: str


class GatesResolved(Event):
    name = "gates.resolved"
    hash: str
    gates: list[GateRow]


class GateRefusedEvent(Event):
    """One refusal. gate is None when the variable names no gate."""

    name = "gate.refused"
    gate: str | None
    variable: str
    value: str
    failures: list[str]
    remedies: list[str]


class GateExposed(Event):
    """Written once per gate, the first time code branches on it."""

    name = "gate.exposed"
    gate: str
    value: bool | str
    stage: str


class GateChanged(Event):
    """A resumed run goes on with another value, accepted by --accept-gate-change."""

    name = "gate.changed"
    gate: str
    old: bool | str | None
    new: bool | str | None


class EnvSnapshot(Event):
    """`provenance.snapshot()`. extra: what only the caller knows (devices, driver, seeds, fingerprints)."""

    name = "env.snapshot"
    git_commit: str | None
    git_dirty: bool | None
    git_dirty_hash: str | None
    git_reason: str | None
    packages: dict[str, str]
    python: str
    platform: str
    cpu: str
    cpu_count: int
    cpu_affinity: int
    memory_bytes: int
    command: list[str]
    variables: dict[str, str]
    extra: dict[str, JsonValue]


class KernelCompiled(Event):
    """cached: the compiler found it on disk; None when it does not tell (few seconds are the sign then)."""

    name = "kernel.compiled"
    kernel: str
    seconds: float
    cached: bool | None = None
    details: dict[str, JsonValue] = {}


class KernelSelftest(Event):
    name = "kernel.selftest"
    kernel: str
    passed: bool
    details: dict[str, JsonValue] = {}


class BackendChosen(Event):
    """An operator's backend and why it was taken (`libs.kernels.backend.Choice`)."""

    name = "backend.chosen"
    op: str
    value: str
    reason: str


class DataFingerprint(Event):
    name = "data.fingerprint"
    fingerprint: str
    data_dir: str
    train_tokens: int
    valid_tokens: int
    tokenizer: str


class CursorRecord(BaseModel):
    """Where the data order stands after a step."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    epoch: int
    index: int
    token_offset: int


class TrainStep(Event):
    """One optimizer step. Losses in nats per token, bpb in bits per byte, times in seconds of this step."""

    name = "train.step"
    needs_step = True
    loss: float
    main_loss: float
    mtp_loss: float | None
    bpb: float
    lr: float
    grad_norm: float
    tokens: int
    tokens_total: int
    tokens_per_s: float
    time_s: float
    data_s: float
    forward_backward_s: float
    optimizer_s: float
    other_s: float
    mfu: float | None
    mfu_reason: str | None
    max_memory_bytes: int | None
    cursor: CursorRecord

    @model_validator(mode="after")
    def _mfu_or_reason(self) -> TrainStep:
        if (self.mfu is None) == (self.mfu_reason is None):
            raise ValueError("give mfu, or mfu_reason for its absence, and never both")
        return self


class EvalResult(Event):
    """metrics: name -> value. n: items scored. excluded: items left out (counted, never truncated)."""

    name = "eval.result"
    suite: str
    metrics: dict[str, float]
    path: str | None = None
    n: int
    excluded: int


class _Checkpoint(Event):
    needs_step = True
    path: str
    reason: str | None = None
    sha256: str | None = None
    seconds: float | None = None
    audit_anchor: str | None = None


class CheckpointBegin(_Checkpoint):
    name = "checkpoint.begin"


class CheckpointCommit(_Checkpoint):
    name = "checkpoint.commit"


class CheckpointAbort(_Checkpoint):
    name = "checkpoint.abort"


class CheckpointRestore(_Checkpoint):
    """The step of the envelope is the last finished step in the checkpoint."""

    name = "checkpoint.restore"


class AnomalyNonfinite(Event):
    """value: the number, or "nan", "inf", "-inf" (converted here). bundle: the diagnostic files, if any."""

    name = "anomaly.nonfinite"
    what: str
    value: float | str
    bundle: str | None
    action: str

    @field_validator("value", mode="before")
    @classmethod
    def _spell(cls, value: object) -> object:
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class AnomalyGeneric(Event):
    name = "anomaly.generic"
    what: str
    details: dict[str, JsonValue] = {}
    action: str | None = None


class SignalReceived(Event):
    name = "signal.received"
    signal: str
    phase: str


class RunStop(Event):
    """The last event of an attempt. audit_anchor: "HASH:LEN" of the audit chain at that moment."""

    name = "run.stop"
    status: Status
    exit_code: int
    reason: str
    audit_anchor: str | None
