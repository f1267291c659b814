"""What an evaluation leaves behind: one JSON file with the scores and everything that identifies them.

Not for computing scores (suites/) nor for showing them (report/).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from apps.eval.intervals import bootstrap_ratio
from libs.flags.errors import UserError

SCHEMA_VERSION: Literal[1] = 1


class Record(BaseModel):
    """Frozen, closed, finite: what every part of a result is."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Estimate(Record):
    """A value with its 95 % document-bootstrap interval; null bounds with fewer than two documents."""

    value: float
    low: float | None
    high: float | None

    @classmethod
    def of_ratio(cls, numerators_D: NDArray[np.float64], denominators_D: NDArray[np.float64], *, seed: int) -> Estimate:
        """sum(numerators) / sum(denominators) over documents, with its interval (apps.eval.intervals)."""
        interval = bootstrap_ratio(numerators_D, denominators_D, seed=seed)
        return cls(
            value=float(numerators_D.sum() / denominators_D.sum()),
            low=None if interval is None else interval.low,
            high=None if interval is None else interval.high,
        )


class Bucket(Record):
    """Targets whose byte offset in their document lies in [start, end)."""

    start: int
    end: int
    documents: int
    tokens: int
    bytes: int
    bpb: Estimate


class AblationPoint(Record):
    """The same target spans, scored with `context` tokens before them. gain: bpb(context) - bpb(longest)."""

    context: int
    bpb: Estimate
    gain: Estimate


class Ablation(Record):
    """The context-ablation curve. points is empty exactly when `reason` says why there is no curve.

    too_short: selected documents without room for the longest context and the span. not_used: documents with
    room, beyond the number that was asked for.
    """

    span_tokens: int
    contexts_reason: str
    documents: list[int]
    too_short: list[int]
    not_used: list[int]
    points: list[AblationPoint]
    reason: str | None


class Compressor(Record):
    """bits per byte of a general compressor over the documents that the model scored."""

    name: str
    what: str
    per_document_bpb: float
    one_stream_bpb: float


class Compression(Record):
    """bytes: in the documents. unscored_bytes: those that no target stands for (a document's first token)."""

    bytes: int
    unscored_bytes: int
    compressors: list[Compressor]


class LossByPosition(Record):
    """Details of the suite `loss_by_position`."""

    kind: Literal["loss_by_position"] = "loss_by_position"
    bpb: Estimate
    scored_tokens: int
    scored_bytes: int
    buckets: list[Bucket]
    ablation: Ablation
    compression: Compression
    trained_window: int | None = Field(description="tokens of a training window, where the run's config says it")


class Excluded(Record):
    """A document that was not scored, and why."""

    document: int
    tokens: int
    reason: str


class CheckpointIdentity(Record):
    """sha256: of the checkpoint's manifest, which names every byte in it."""

    path: str
    sha256: str
    step: int | None
    model: str
    parameters: int


class DataIdentity(Record):
    """prompt_sha256: over the ids of every scored document, in document order."""

    directory: str
    split: str
    fingerprint: str
    prompt_sha256: str
    tokenizer_fingerprint: str


class GateValues(Record):
    hash: str
    values: dict[str, bool | str]


class BackendChoice(Record):
    value: str
    reason: str


class EvalReport(Record):
    """The content of RUN/eval/<suite>.json.

    n: documents scored. available: documents of the split; those neither scored nor excluded were not drawn.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    suite: str
    suite_version: int
    created: str
    seconds: float
    checkpoint: CheckpointIdentity
    data: DataIdentity
    seed: int
    available: int
    n: int
    excluded: list[Excluded]
    excluded_by_reason: dict[str, int]
    gates: GateValues
    backends: dict[str, BackendChoice]
    config: dict[str, JsonValue]
    environment: dict[str, JsonValue]
    metrics: dict[str, float]
    details: LossByPosition


def write_result(result: EvalReport, path: Path) -> None:
    """Write `path`, whole or not at all. An older result of that name is kept beside it under its own time.

    Raises:
        UserError: the place cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.partial")
        aside.write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
        if path.exists():
            created = read_result(path).created.replace(":", "").replace("-", "")
            path.rename(path.with_name(f"{path.stem}.{created}{path.suffix}"))
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"cannot write the result {path}: {error.strerror}") from error


def read_result(path: Path) -> EvalReport:
    """Read and validate a result.

    Raises:
        UserError: unreadable, or not of this schema.
    """
    try:
        return EvalReport.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read the result {path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(f"{path} is not an evaluation result of this version: {where}: {first['msg']}") from error
