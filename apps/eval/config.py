"""What `fathom eval` can be told: one frozen config, validated where the fields live.

Not for argument parsing (__main__.py) nor for training's config (apps.train).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from apps.eval.suites import SUITES
from libs.flags.errors import UserError

ALL = "all"
_OPTIONS = {"suites": "suite", "contexts": "context"}  # where the command line has another name than the field
_LENGTH = re.compile(r"(\d{1,9})(k?)")


def parse_tokens(text: str) -> int:
    """A number of tokens: "512", or "4k" for 4096.

    Raises:
        UserError: not of that form, or zero.
    """
    match = _LENGTH.fullmatch(text.strip().lower())
    if match is None or int(match[1]) == 0:
        raise UserError(f"{text!r} is not a number of tokens; write 512, 4k or 64k (k = 1024), at least 1")
    return int(match[1]) * (1024 if match[2] else 1)


class EvalConfig(BaseModel):
    """The settings of one evaluation.

    contexts: lengths in tokens, ascending, of the ablation curve and of the questions; None: each suite's own.
    max_documents: a seeded draw from the split; None: all. items: how many contexts or items a suite makes per cell;
    None: its own number. max_batch: requests that the engine runs at a time; the scores have the same bits for any.
    detached: leave the run's log be.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint: Path
    suites: tuple[str, ...]
    data: Path | None = None
    split: Literal["valid", "train"] = "valid"
    contexts: tuple[int, ...] | None = None
    span_tokens: int = Field(default=256, ge=1)
    ablation_documents: int = Field(default=32, ge=2)
    max_documents: int | None = Field(default=None, ge=1)
    max_tokens: int = Field(default=65_536, ge=2)
    batch_documents: int = Field(default=1, ge=1)
    items: int | None = Field(default=None, ge=1)
    max_batch: int = Field(default=8, ge=1)
    seed: int = Field(default=0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    out: Path | None = None
    detached: bool = False

    @field_validator("suites", mode="before")
    @classmethod
    def _known(cls, given: object) -> object:
        names = [name.strip() for name in given.split(",")] if isinstance(given, str) else given
        if names == [ALL]:
            return tuple(SUITES)
        for name in names if isinstance(names, list | tuple) else ():
            if name not in SUITES:
                raise UserError.unknown("suite", str(name), [*SUITES, ALL])
        return names

    @field_validator("contexts")
    @classmethod
    def _ascending(cls, contexts: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if contexts is not None and (not contexts or any(a >= b for a, b in itertools.pairwise(contexts))):
            raise ValueError(f"need rising lengths, got {list(contexts)}")
        return contexts

    @classmethod
    def parse(cls, values: dict[str, Any]) -> Self:
        """Validate. Raises UserError naming the option, its value and what is wrong with it."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UserError("\n".join(_line(item) for item in error.errors())) from error


def _line(error: Mapping[str, Any]) -> str:
    field = str(error["loc"][0])
    option = _OPTIONS.get(field, field).replace("_", "-")
    return f"--{option}: {error['msg'].removeprefix('Value error, ')} (given: {error['input']!r})"
