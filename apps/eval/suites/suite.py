"""What every suite is given and gives back.

Not for the registry (__init__.py) nor for loading checkpoints and data (apps.eval.run).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from apps.eval.results import Excluded, LossByPosition
from libs.model import HybridLM
from libs.model.text.tokenizer import Tokenizer


class Documents(Protocol):
    """Documents of a split: `documents[i]` -> ids (n,) int32 with the end-of-document token."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> NDArray[np.int32]: ...


class SuiteInput(NamedTuple):
    """The model and the drawn documents. drawn: indices into `documents`, in seeded order."""

    model: HybridLM
    tokenizer: Tokenizer
    documents: Documents
    drawn: Sequence[int]
    trained_window: int | None


class SuiteOptions(NamedTuple):
    """Settings of the scoring; see `apps.eval.config.EvalConfig` for each."""

    contexts: tuple[int, ...] | None
    span_tokens: int
    ablation_documents: int
    max_tokens: int
    batch_documents: int
    seed: int


class SuiteOutput(NamedTuple):
    """scored: indices of the documents that count, ascending. metrics: flat, finite, for the run log."""

    scored: tuple[int, ...]
    excluded: tuple[Excluded, ...]
    metrics: dict[str, float]
    details: LossByPosition


# Called after each scored item with the name of its phase, items done, and items in all.
OnProgress = Callable[[str, int, int], None]
RunSuite = Callable[[SuiteInput, SuiteOptions, OnProgress], SuiteOutput]


class Suite(NamedTuple):
    """version rises when a change of the suite changes its scores."""

    name: str
    version: int
    summary: str
    run: RunSuite
