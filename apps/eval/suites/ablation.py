"""The context-ablation curve: the same target spans, scored with less and less context before them.

Loss by position alone cannot tell a use of context from late code being different code; here the targets stay
the same and only the context is cut. Not for scoring whole documents (loss_by_position.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from apps.eval.results import Ablation, AblationPoint, Estimate
from apps.eval.suites.suite import SuiteInput, SuiteOptions
from libs.flags.errors import UserError
from libs.model.score import score_documents

SHORTEST_CONTEXT = 64
# The automatic longest context is one that so many documents have: a curve over two documents says nothing.
DOCUMENTS_FOR_A_CURVE = 8


class Contexts(NamedTuple):
    """Ascending lengths in tokens (empty: no curve) and why these."""

    lengths: tuple[int, ...]
    reason: str


def choose_contexts(lengths: Sequence[int], options: SuiteOptions) -> Contexts:
    """The lengths that were asked for, or powers of two up to the longest that enough documents have.

    Raises:
        UserError: lengths were asked for that no document has, or that `max_tokens` forbids.
    """
    span = options.span_tokens
    if options.contexts is not None:
        longest = options.contexts[-1]
        have = max(lengths, default=0)
        if longest + span > options.max_tokens:
            raise UserError(f"--context {longest} and --span-tokens {span} exceed --max-tokens {options.max_tokens}")
        if longest + span > have:
            raise UserError(
                f"--context {longest}: no drawn document has {longest} tokens before a span of {span}; the "
                f"longest has {have} tokens, so the longest context is {max(0, have - span)}"
            )
        return Contexts(options.contexts, "requested")
    found: list[int] = []
    context = SHORTEST_CONTEXT
    while sum(n >= context + span for n in lengths) >= DOCUMENTS_FOR_A_CURVE:
        found.append(context)
        context *= 2
    rule = f"auto: powers of two that {DOCUMENTS_FOR_A_CURVE} or more documents have before a span of {span}"
    if len(found) < 2:
        return Contexts((), f"{rule}; fewer than two")
    return Contexts(tuple(found), rule)


def run_ablation(
    inputs: SuiteInput,
    scored: Mapping[int, int],
    options: SuiteOptions,
    on_progress: Callable[[int, int], None],
) -> Ablation:
    """Score the last `span_tokens` tokens of each document that has room for the longest context.

    Args:
        scored: document -> number of tokens, of the documents that count, in drawing order.

    Every length is scored on the same documents; the first `ablation_documents` with room are taken.
    """
    span = options.span_tokens
    contexts = choose_contexts(list(scored.values()), options)
    if not contexts.lengths:
        return Ablation(
            span_tokens=span,
            contexts_reason=contexts.reason,
            documents=[],
            too_short=sorted(scored),
            not_used=[],
            points=[],
            reason=f"no curve: {contexts.reason}",
        )
    room = [document for document, n in scored.items() if n >= contexts.lengths[-1] + span]
    used = sorted(room[: options.ablation_documents])
    bits = {length: np.zeros(len(used)) for length in contexts.lengths}
    n_bytes = np.zeros(len(used))
    total = len(used) * len(contexts.lengths)
    for column, document in enumerate(used):
        ids = inputs.documents[document]
        for row, length in enumerate(contexts.lengths):
            cut_bits, n_bytes[column] = _span_score(inputs, ids[-(length + span) :], options)
            bits[length][column] = cut_bits
            on_progress(column * len(contexts.lengths) + row + 1, total)
    return Ablation(
        span_tokens=span,
        contexts_reason=contexts.reason,
        documents=used,
        too_short=sorted(document for document in scored if document not in room),
        not_used=sorted(room[options.ablation_documents :]),
        points=_points(bits, n_bytes, options.seed),
        reason=None,
    )


def _span_score(inputs: SuiteInput, cut: NDArray[np.int32], options: SuiteOptions) -> tuple[float, float]:
    """Bits and bytes of the last `span_tokens` targets of one cut document."""
    table = inputs.tokenizer.token_bytes
    (score,) = score_documents(inputs.model, [cut], table, max_tokens=options.max_tokens)
    assert score.excluded is None, score.excluded
    nll, size = score.nll_bits[-options.span_tokens :], score.n_bytes[-options.span_tokens :]
    return float(nll[size > 0].sum()), float(size.sum())


def _points(bits: Mapping[int, NDArray[np.float64]], n_bytes: NDArray[np.float64], seed: int) -> list[AblationPoint]:
    """One point per length; the gain is paired, document by document, so its interval is the narrow one."""
    longest = bits[max(bits)]
    return [
        AblationPoint(
            context=length,
            bpb=Estimate.of_ratio(row, n_bytes, seed=seed),
            gain=Estimate.of_ratio(row - longest, n_bytes, seed=seed),
        )
        for length, row in bits.items()
    ]
