"""Steps that were compiled for a TPU slice and never run: the records of `fathom train --aot`, beside what is measured.

Not for compiling. Nothing here is a measurement, and every row says so.
"""
# S tokens of a window

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from apps.eval.bench.crossing import Crossing, LogRatio
from libs.flags.canonical import sha256_hex
from libs.flags.errors import UserError
from libs.model.presets import TWIN_TOLERANCE

LABEL: Literal["modelled"] = "modelled"
_MODEL_OF = {"_hybrid": "hybrid", "_dense": "twin"}  # by the end of a recipe's name


class Modelled(BaseModel):
    """One record. seconds, peak_bytes: of a step, on each chip; None where it does not fit.

    uncounted: calls of kernels that the compiler's estimate does not know, and so leaves out of `seconds`;
    unestimated: other such operations; unknown_loops: loops of unknown length, counted as if run once.
    note: why the time is not compared with another's; None where it is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    label: Literal["modelled"] = LABEL
    slice: str
    recipe: str
    model: Literal["hybrid", "twin"]
    seq_len: int = Field(ge=1)
    tokens_per_step: int = Field(ge=1)
    parameters: int = Field(gt=0)
    flops_per_token: float = Field(gt=0)
    seconds: float | None = Field(gt=0)
    peak_bytes: int | None = Field(gt=0)
    uncounted: int | None = Field(ge=0)
    unestimated: int | None = Field(default=None, ge=0)
    unknown_loops: int | None = Field(default=None, ge=0)
    note: str | None
    source: str
    source_sha256: str

    @property
    def compared_s_per_token(self) -> float | None:
        """Seconds; None where they are not to be compared."""
        return None if self.seconds is None or self.note is not None else self.seconds / self.tokens_per_step

    @model_validator(mode="after")
    def _what_is_left_out_is_noted(self) -> Self:
        left_out = (self.uncounted, self.unestimated, self.unknown_loops)
        if self.seconds is not None and any(left_out) and self.note is None:
            raise ValueError(f"{self.recipe}: {_missing(*left_out)} not in its time, and no note says so")
        return self


class _Estimate(BaseModel):
    model_config = ConfigDict(strict=True)

    uncounted: int = Field(ge=0)
    unestimated: int = Field(ge=0)
    unknown: list[str]


class _Compiled(BaseModel):
    modelled: _Estimate


class _AotRecord(BaseModel):
    """What is read of a record of `fathom train --aot`: of a step that fits, or the reason why it does not."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    recipe: str
    slice: str
    effort: Literal["full", "quick"]
    window: int = Field(gt=0)
    tokens_per_step: int = Field(gt=0)
    parameters: int = Field(gt=0)
    model_flops_per_step: float = Field(gt=0)
    does_not_fit: Annotated[str, Field(pattern=r"\S")] = ""
    modelled_seconds: float | None = Field(default=None, gt=0)
    peak_bytes_per_chip: int | None = Field(default=None, gt=0)
    compiled: _Compiled | None = None

    @model_validator(mode="after")
    def _fits_or_says_why(self) -> Self:
        absent = [value is None for value in (self.modelled_seconds, self.peak_bytes_per_chip, self.compiled)]
        if set(absent) != {bool(self.does_not_fit)}:
            raise ValueError("has neither does_not_fit alone nor modelled_seconds, peak_bytes_per_chip and compiled")
        return self


def read_modelled(paths: Sequence[Path]) -> list[Modelled]:
    """Every file of `fathom train --aot` (one record each, or a list of them), by slice, length and model.

    Raises:
        UserError: not such a file, a recipe whose name does not say which of the two it is, two records of one step,
            or two models that are no twins.
    """
    rows = [row for path in paths for row in _read(path)]
    rows.sort(key=lambda row: (row.slice, row.seq_len, row.model))
    for one, other in itertools.pairwise(rows):
        if (one.slice, one.seq_len) != (other.slice, other.seq_len):
            continue
        if one.model == other.model:
            raise UserError(f"--modelled: {one.source} and {other.source} are of the same step: give one of them")
        if abs(one.parameters / other.parameters - 1) > TWIN_TOLERANCE:
            raise UserError(
                f"--modelled: {one.recipe} has {one.parameters:,} parameters, {other.recipe} {other.parameters:,}: "
                f"twins differ by {TWIN_TOLERANCE:.1%} at most"
            )
    return rows


def modelled_crossings(rows: Sequence[Modelled], *, seed: int) -> list[Crossing]:
    """Of each slice that has both models at two lengths, with times to compare: by modelled time per token. Without an
    interval."""
    found = []
    for name in dict.fromkeys(row.slice for row in rows):
        times = {(row.model, row.seq_len): row.compared_s_per_token for row in rows if row.slice == name}
        points = []
        for seq_len in sorted({length for _, length in times}):
            hybrid, twin = times.get(("hybrid", seq_len)), times.get(("twin", seq_len))
            if hybrid is not None and twin is not None:
                points.append(LogRatio(seq_len, math.log(hybrid / twin), None, 1))
        if len(points) > 1:
            found.append(Crossing.of(f"modelled time per token on {name}", points, seed=seed))
    return found


def _read(path: Path) -> list[Modelled]:
    try:
        content = path.read_bytes()
        records: Any = json.loads(content)
        if isinstance(records, dict):
            records = [records]
        return [_row(record, path.name, sha256_hex(content)) for record in records]
    except OSError as error:
        raise UserError(f"--modelled {path}: {error.strerror}") from error
    except UserError:
        raise
    except ValidationError as error:
        what = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:5])
        raise UserError(f"--modelled {path} is no record of `fathom train --aot`: {what}") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"--modelled {path} is no record of `fathom train --aot`: {error!r}") from error


def _row(content: object, source: str, sha256: str) -> Modelled:
    record = _AotRecord.model_validate(content)
    recipe = Path(record.recipe).stem
    model = next((name for end, name in _MODEL_OF.items() if recipe.endswith(end)), None)
    if model is None:
        ends = " nor ".join(_MODEL_OF)
        raise UserError(f"--modelled {source}: recipe {recipe!r} ends in neither {ends}: which of the two is it?")
    estimate = None if record.compiled is None else record.compiled.modelled
    left_out: tuple[int | None, int | None, int | None] = (None, None, None)
    if estimate is not None:
        left_out = (estimate.uncounted, estimate.unestimated, len(estimate.unknown))
    note = None
    if record.does_not_fit:
        note = f"does not fit: {record.does_not_fit.strip().splitlines()[0]}"
    elif record.effort != "full":
        note = f"compiled with {record.effort} effort: its time is not to be compared"
    elif any(left_out):
        note = f"its time is a lower bound, and not compared: {_missing(*left_out)} not in it"
    return Modelled(
        slice=record.slice,
        recipe=recipe,
        model="hybrid" if model == "hybrid" else "twin",
        seq_len=record.window,
        tokens_per_step=record.tokens_per_step,
        parameters=record.parameters,
        flops_per_token=record.model_flops_per_step / record.tokens_per_step,
        seconds=record.modelled_seconds if record.effort == "full" else None,
        peak_bytes=record.peak_bytes_per_chip,
        uncounted=left_out[0],
        unestimated=left_out[1],
        unknown_loops=left_out[2],
        note=note,
        source=source,
        source_sha256=sha256,
    )


def _missing(*counts: int | None) -> str:
    """What a modelled time leaves out, in words: of uncounted, unestimated, unknown_loops."""
    names = ("calls of kernels", "operations without an estimate", "further turns of loops of unknown length")
    said = ", ".join(f"{name} ({count})" for name, count in zip(names, counts, strict=True) if count)
    return f"{said} are"
