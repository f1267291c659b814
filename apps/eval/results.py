"""What an evaluation leaves behind: one JSON file with the scores and everything that identifies them.

Not for computing scores (suites/) nor for showing them (report/).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from apps.eval.intervals import bootstrap_ratio
from apps.eval.reading import read_record
from libs.flags.errors import UserError
from libs.flags.whole_file import try_folder

SCHEMA_VERSION: Literal[2] = 2
AxisValue: TypeAlias = str | int | float


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


class KeyTokenPoint(Record):
    """bits per byte of the key tokens alone, with `context` tokens before the span."""

    context: int
    bpb: Estimate


class KeyTokens(Record):
    """Targets that long context helps: log p(long) - log p(short) > gain_nats and log p(long) > floor_nats, where
    short and long are the curve's first and last context (arXiv 2410.23771, equations 4 and 5, defaults of its code).

    tokens: how many of the `of_tokens` targets that stand for bytes. points is empty exactly when there are none.
    """

    gain_nats: float
    floor_nats: float
    tokens: int
    of_tokens: int
    documents: int
    points: list[KeyTokenPoint]


class Ablation(Record):
    """The context-ablation curve. points is empty exactly when `reason` says why there is no curve.

    too_short: selected documents without room for the longest context and the span. not_used: documents with
    room, beyond the number that was asked for. no_bytes: documents with room whose span is special tokens alone.
    """

    span_tokens: int
    contexts_reason: str
    documents: list[int]
    too_short: list[int]
    not_used: list[int]
    points: list[AblationPoint]
    key_tokens: KeyTokens | None
    no_bytes: list[int] = []
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


class Score(Record):
    """One cell of a table: the mean of `metric` over the `n` items that share `axes`, from `units` contexts.

    chance: what guessing scores, where that is known. The interval resamples contexts, not items.
    """

    axes: dict[str, AxisValue]
    metric: str
    n: int
    units: int
    estimate: Estimate
    chance: float | None


class PrefixUse(Record):
    """What the prefix cache did (counts in tokens). verified: items asked again of engines that knew no prefix, with
    the same bits; zero when the cache was off, as there is nothing to compare."""

    mode: str
    prompt_tokens: int
    matched_tokens: int
    skipped_tokens: int
    computed_tokens: int
    verified: int
    note: str


class QuestionScores(Record):
    """Details of the suites that put questions to the model. metrics: what each one means, by name.

    cells: one per combination of axes; totals: over coarser combinations; control: where nothing can be known.
    """

    kind: Literal["needle", "scope", "callgraph", "completion"]
    metrics: dict[str, str]
    cells: list[Score]
    totals: list[Score]
    control: list[Score]
    prefix: PrefixUse
    trained_window: int | None


class Excluded(Record):
    """A document or an item that was not scored, and why. One of the two is named."""

    document: int | None = None
    item: str | None = None
    tokens: int
    reason: str


class ItemsFile(Record):
    """The file beside the result with one JSON line per scored item."""

    name: str
    sha256: str
    lines: int


class CheckpointIdentity(Record):
    """sha256: of the checkpoint's manifest, which names every byte in it."""

    path: str
    sha256: str
    step: int | None
    model: str
    parameters: int


class DataIdentity(Record):
    """prompt_sha256: over the ids of everything that was scored, in the order of documents or items."""

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

    n: documents or items scored. available: documents of the split, or items that were made; those neither scored
    nor excluded were not drawn.
    """

    schema_version: Literal[2] = SCHEMA_VERSION
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
    items: ItemsFile
    details: Annotated[LossByPosition | QuestionScores, Field(discriminator="kind")]


def items_path(path: Path) -> Path:
    """Where the items of the result `path` lie."""
    return path.with_name(f"{path.stem}.items.jsonl")


def item_lines(items: Iterable[Mapping[str, JsonValue]]) -> str:
    """One JSON object per line."""
    return "".join(json.dumps(item, sort_keys=True, allow_nan=False) + "\n" for item in items)


def check_place(path: Path) -> None:
    """Refuse what `write_result` would refuse, before there is a result that could be lost. Leaves nothing behind.

    Raises:
        UserError: the place cannot be written, or holds a file that is no result.
    """
    try:
        if path.is_dir():
            raise UserError(f"{path} is a directory: give the name of a JSON file")
        if path.exists():
            _created(path)
        try_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write the result {path}: {error.strerror}") from error


def write_result(result: EvalReport, items: str, path: Path) -> None:
    """Write `path` and its items, each whole or not at all. Older files of these names are kept under their own time.

    Raises:
        UserError: the place cannot be written, or holds a file that is no result; a result that lies beside it
            instead is named.
    """
    beside = items_path(path)
    texts = {beside: items, path: result.model_dump_json(indent=1) + "\n"}  # the result last: it names the items
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for place, text in texts.items():
            _aside(place).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the result {path}: {error.strerror}") from error
    try:
        if path.exists():
            created = _created(path).replace(":", "").replace("-", "")
            for place in (path, beside):
                if place.exists():
                    kept = path.with_name(f"{path.stem}.{created}{path.suffix}")
                    place.rename(kept if place == path else items_path(kept))
        for place in texts:
            os.replace(_aside(place), place)
    except (OSError, UserError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot write the result {path}: {why}; what was scored lies in {_aside(path)}") from error


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


class _Dated(BaseModel):
    """What a result of any version says of itself."""

    suite: str
    created: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z$")


def _created(path: Path) -> str:
    """When the result at `path` was made, whatever version of the schema it has."""
    return read_record(path, _Dated, "evaluation result", hint="move it, or give --out FILE").created


def read_result(path: Path) -> EvalReport:
    """Read and validate a result.

    Raises:
        UserError: unreadable, or not of this schema.
    """
    hint = f"make it again: fathom eval --checkpoint RUN --suite {path.stem}"
    return read_record(path, EvalReport, "evaluation result of this version", hint=hint)
