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
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from apps.eval.bench.crossing import Crossing, LogRatio
from libs.flags.canonical import sha256_hex
from libs.flags.errors import UserError
from libs.model.presets import TWIN_TOLERANCE

LABEL: Literal["modelled"] = "modelled"
_MODEL_OF = {"_hybrid": "hybrid", "_dense": "twin"}  # by the end of a recipe's name


class Modelled(BaseModel):
    """One record. seconds, peak_bytes: of a step, on each chip; None with the reason in `note`.

    uncounted: calls of kernels that the compiler's estimate does not know, and so leaves out of `seconds`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    label: Literal["modelled"] = LABEL
    slice: str
    recipe: str
    model: Literal["hybrid", "twin"]
    seq_len: int = Field(ge=1)
    tokens_per_step: int = Field(ge=1)
    parameters: int
    flops_per_token: float
    seconds: float | None
    peak_bytes: int | None
    uncounted: int | None
    note: str | None
    source: str
    source_sha256: str

    @property
    def seconds_per_token(self) -> float | None:
        return None if self.seconds is None else self.seconds / self.tokens_per_step


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
    """Of each slice that has both models at two lengths: by modelled time per token. Without an interval."""
    found = []
    for name in dict.fromkeys(row.slice for row in rows):
        times = {(row.model, row.seq_len): row.seconds_per_token for row in rows if row.slice == name}
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
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--modelled {path} is no record of `fathom train --aot`: {error!r}") from error


def _row(record: dict[str, Any], source: str, sha256: str) -> Modelled:
    recipe = Path(record["recipe"]).stem
    model = next((name for end, name in _MODEL_OF.items() if recipe.endswith(end)), None)
    if model is None:
        ends = " nor ".join(_MODEL_OF)
        raise UserError(f"--modelled {source}: recipe {recipe!r} ends in neither {ends}: which of the two is it?")
    tokens, compiled, note = record["tokens_per_step"], record.get("compiled"), None
    seconds, peak = record.get("modelled_seconds"), record.get("peak_bytes_per_chip")
    if "does_not_fit" in record:
        note = f"does not fit: {record['does_not_fit'].splitlines()[0]}"
    elif record["effort"] != "full":
        seconds, note = None, f"compiled with {record['effort']} effort: its time is not to be compared"
    return Modelled(
        slice=record["slice"],
        recipe=recipe,
        model="hybrid" if model == "hybrid" else "twin",
        seq_len=record["window"],
        tokens_per_step=tokens,
        parameters=record["parameters"],
        flops_per_token=record["model_flops_per_step"] / tokens,
        seconds=seconds,
        peak_bytes=peak,
        uncounted=None if compiled is None else compiled["modelled"]["uncounted"],
        note=note,
        source=source,
        source_sha256=sha256,
    )
