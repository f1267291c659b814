"""What every suite is given and gives back.

Not for the registry (__init__.py) nor for loading checkpoints and data (apps.eval.run).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from apps.eval.results import Excluded, LossByPosition, QuestionScores
from libs.model import HybridLM
from libs.model.inference.engine import Completion, Sampling, Scored
from libs.model.text.document import DocumentMeta
from libs.model.text.tokenizer import Tokenizer


class Documents(Protocol):
    """Documents of a split: `documents[i]` -> ids (n,) int32 with the end-of-document token."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> NDArray[np.int32]: ...


class Respondent(Protocol):
    """What suites use of `libs.model.inference.engine.Engine`."""

    @property
    def counters(self) -> Mapping[str, int]: ...

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sequence[Sampling]) -> list[Completion]: ...

    def score(self, items: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Scored]: ...

    def checkpoint(self, name: str, prompt: Sequence[int]) -> None: ...

    def close(self) -> None: ...


class Engines(NamedTuple):
    """open: a new engine, which knows no prefix, for requests of at most so many tokens. mode: of its prefix cache."""

    open: Callable[[int], Respondent]
    mode: str


class SuiteInput(NamedTuple):
    """The model, and the documents of the split. drawn: indices into `documents`, in seeded order.

    metadata: one entry per document of the split; empty when no suite that needs it is run.
    """

    model: HybridLM
    engines: Engines
    tokenizer: Tokenizer
    documents: Documents
    metadata: Sequence[DocumentMeta]
    drawn: Sequence[int]
    trained_window: int | None


class SuiteOptions(NamedTuple):
    """Settings of the scoring; see `apps.eval.config.EvalConfig` for each.

    strict_contexts: a length that cannot be had is an error; otherwise it is left out, and the result says so.
    """

    contexts: tuple[int, ...] | None
    span_tokens: int
    ablation_documents: int
    max_tokens: int
    batch_documents: int
    items: int | None
    seed: int
    strict_contexts: bool


class SuiteOutput(NamedTuple):
    """scored: of `available` documents or items, how many count. metrics: flat, finite, for the run log.

    items: one JSON object per scored document or item.
    """

    scored: int
    available: int
    excluded: tuple[Excluded, ...]
    prompt_sha256: str
    metrics: dict[str, float]
    items: tuple[dict[str, JsonValue], ...]
    details: LossByPosition | QuestionScores


# Called after each scored item with the name of its phase, items done, and items in all.
OnProgress = Callable[[str, int, int], None]
RunSuite = Callable[[SuiteInput, SuiteOptions, OnProgress], SuiteOutput]


class Suite(NamedTuple):
    """version rises when a change of the suite changes its scores."""

    name: str
    version: int
    summary: str
    run: RunSuite
