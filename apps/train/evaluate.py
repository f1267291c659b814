"""Validation during training: bits per byte of whole held-out documents, with `fathom eval`'s own scorer.

Not for suites (apps.eval), nor for when to validate (loop.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from apps.train.config import DataSection
from apps.train.lane import Lane
from apps.train.signals import SignalGuard
from libs.flags.errors import UserError
from libs.model import HybridLM
from libs.model.score import BitsPerByte, DocumentScore, bits_per_byte, score_documents
from libs.model.text.shards import DataDir, seeded_permutation
from libs.parallel.exchange import sum_numbers
from libs.parallel.mesh import Groups

# Short documents share a forward pass: equal up to rounding to one at a time, and several times faster.
BATCH_DOCUMENTS = 8


class ValidationSet(NamedTuple):
    """Which held-out documents are scored, and how many were left out because they are too long."""

    data: DataDir
    indices: tuple[int, ...]
    max_tokens: int
    excluded: int


def choose_documents(data: DataDir, settings: DataSection) -> ValidationSet:
    """Held-out documents in a seeded order until `valid_tokens` are reached; the same ones at every step.

    Raises:
        UserError: no held-out document is short enough.
    """
    lengths = data.documents("valid").lengths
    chosen: list[int] = []
    total = excluded = 0
    for index in seeded_permutation(len(lengths), settings.seed).tolist():
        if total >= settings.valid_tokens:
            break
        if lengths[index] > settings.valid_document_tokens:
            excluded += 1
        elif lengths[index] >= 2:
            chosen.append(index)
            total += int(lengths[index])
    if not chosen:
        raise UserError(
            f"data.valid_document_tokens = {settings.valid_document_tokens}: none of the {len(lengths)} "
            f"held-out documents of {data.path} is that short (shortest: {min(lengths, default=0)})"
        )
    return ValidationSet(data, tuple(chosen), settings.valid_document_tokens, excluded)


def validate(
    model: HybridLM, documents: ValidationSet, lane: Lane, guard: SignalGuard, groups: Groups | None = None
) -> BitsPerByte:
    """Score the documents; leaves at once when a signal has come.

    With several ranks each data-parallel one scores its share, a signal waits for the end, and all return the same.

    Raises:
        Interrupted: by a signal; there is no result.
    """
    if groups is not None and groups.world.size > 1:
        share = documents._replace(indices=documents.indices[groups.dp.rank :: groups.dp.size])
        mine = _score(model, share, lane, None)
        sums = sum_numbers(groups.dp, [mine.nll_bits, mine.n_bytes, mine.n_documents, mine.n_excluded])
        n_bytes, n_documents, n_excluded = (round(number) for number in sums[1:])
        return BitsPerByte(sums[0] / n_bytes if n_bytes else math.nan, sums[0], n_bytes, n_documents, n_excluded)
    return _score(model, documents, lane, guard)


def _score(model: HybridLM, documents: ValidationSet, lane: Lane, guard: SignalGuard | None) -> BitsPerByte:
    reader = documents.data.documents("valid")
    with lane.autocast():
        scores = score_documents(
            model,
            (reader[index] for index in documents.indices),
            documents.data.tokenizer.token_bytes,
            max_tokens=documents.max_tokens,
            batch_documents=BATCH_DOCUMENTS,
        )
        return bits_per_byte(_until_signal(scores, guard))


def _until_signal(scores: Iterator[DocumentScore], guard: SignalGuard | None) -> Iterator[DocumentScore]:
    if guard is None:
        yield from scores
        return
    guard.check()
    for score in scores:
        guard.check()
        yield score
