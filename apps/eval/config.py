"""What `fathom eval` can be told: one frozen config, validated where the fields live.

Not for argument parsing (__main__.py) nor for training's config (apps.train).
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from apps.eval.suites import SUITES
from libs.flags.errors import UserError

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

    contexts: lengths of the ablation curve in tokens, ascending; None: chosen from the data, with the reason
    in the result. max_documents: a seeded draw from the split; None: all. detached: leave the run's log be.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint: Path
    suite: str
    data: Path | None = None
    split: Literal["valid", "train"] = "valid"
    contexts: tuple[int, ...] | None = None
    span_tokens: int = Field(default=256, ge=1)
    ablation_documents: int = Field(default=32, ge=2)
    max_documents: int | None = Field(default=None, ge=1)
    max_tokens: int = Field(default=65_536, ge=2)
    batch_documents: int = Field(default=1, ge=1)
    seed: int = Field(default=0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    out: Path | None = None
    detached: bool = False

    @field_validator("suite")
    @classmethod
    def _known(cls, suite: str) -> str:
        if suite not in SUITES:
            raise UserError.unknown("suite", suite, SUITES)
        return suite

    @field_validator("contexts")
    @classmethod
    def _ascending(cls, contexts: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if contexts is None:
            return None
        if len(contexts) < 2 or any(a >= b for a, b in itertools.pairwise(contexts)):
            raise ValueError(f"an ablation needs two or more rising lengths, got {list(contexts)}")
        return contexts

    @classmethod
    def parse(cls, values: dict[str, Any]) -> Self:
        """Validate. Raises UserError naming the option, its value and what is wrong with it."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            lines = [
                f"--{str(e['loc'][0]).replace('_', '-')}: {e['msg'].removeprefix('Value error, ')} "
                f"(given: {e['input']!r})"
                for e in error.errors()
            ]
            raise UserError("\n".join(lines)) from error
