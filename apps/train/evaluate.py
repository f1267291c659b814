"""Validation during training: bits per byte of whole held-out documents, with `fathom eval`'s own scorer.

Not for suites (apps.eval), nor for when to validate (loop.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

from apps.train.config import DataSection
from apps.train.lane import Lane
from apps.train.signals import Interrupted, SignalGuard
from libs.flags.errors import UserError
from libs.model import HybridLM
from libs.model.score import BitsPerByte, DocumentScore, bits_per_byte, score_documents
from libs.model.text.shards import DataDir, seeded_permutation
from libs.parallel.exchange import gather_numbers, sum_numbers
from libs.parallel.mesh import Groups

# Short documents share a forward pass: equal up to rounding to one at a time, and several times faster.
BATCH_DOCUMENTS = 8
Watch: TypeAlias = Callable[[Iterator[DocumentScore]], Iterator[DocumentScore]]


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

    With several ranks each data-parallel one scores its share, all leave together a few documents after a signal to any
    of them, and all return the same.

    Raises:
        Interrupted: by a signal; there is no result.
    """
    if groups is not None and groups.world.size > 1:
        share = documents._replace(indices=documents.indices[groups.dp.rank :: groups.dp.size])
        rounds = -(-len(documents.indices) // (groups.dp.size * BATCH_DOCUMENTS))
        mine = _score(model, share, lane, lambda scores: _in_rounds(scores, rounds, guard, groups))
        sums = sum_numbers(groups.dp, [mine.nll_bits, mine.n_bytes, mine.n_documents, mine.n_excluded])
        n_bytes, n_documents, n_excluded = (round(number) for number in sums[1:])
        return BitsPerByte(sums[0] / n_bytes if n_bytes else math.nan, sums[0], n_bytes, n_documents, n_excluded)
    return _score(model, documents, lane, lambda scores: _until_signal(scores, guard))


def _score(model: HybridLM, documents: ValidationSet, lane: Lane, watched: Watch) -> BitsPerByte:
    reader = documents.data.documents("valid")
    with lane.autocast():
        scores = score_documents(
            model,
            (reader[index] for index in documents.indices),
            documents.data.tokenizer.token_bytes,
            max_tokens=documents.max_tokens,
            batch_documents=BATCH_DOCUMENTS,
        )
        return bits_per_byte(watched(scores))


def _in_rounds(
    scores: Iterator[DocumentScore], rounds: int, guard: SignalGuard, groups: Groups
) -> Iterator[DocumentScore]:
    """As many documents as one pass takes, then a look at everyone's signals; as many looks on every rank.

    Ranks that hold parts of one model score the same documents, so they stop at the same one.
    """
    for _ in range(rounds):
        told = gather_numbers(groups.world, [guard.received is not None])
        if ranks := [rank for rank, (came,) in enumerate(told) if came]:
            raise Interrupted(f"a signal to rank {ranks[0]}")
        yield from itertools.islice(scores, BATCH_DOCUMENTS)


def _until_signal(scores: Iterator[DocumentScore], guard: SignalGuard) -> Iterator[DocumentScore]:
    guard.check()
    for score in scores:
        guard.check()
        yield score
