"""The context-ablation curve: the same target spans, scored with less and less context before them.

Loss by position alone cannot tell a use of context from late code being different code; here the targets stay
the same and only the context is cut. Not for scoring whole documents (loss_by_position.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from apps.eval.results import Ablation, AblationPoint, Estimate, KeyTokenPoint, KeyTokens
from apps.eval.suites.suite import SuiteInput, SuiteOptions
from libs.flags.errors import UserError
from libs.model.score import score_documents

SHORTEST_CONTEXT = 64
# The automatic longest context is one that so many documents have: a curve over two documents says nothing.
DOCUMENTS_FOR_A_CURVE = 8
# Of LongPPL (arXiv 2410.23771, section 3.2), in nats: alpha and beta of the paper.
KEY_GAIN_NATS, KEY_FLOOR_NATS = 2.0, -2.0


class Contexts(NamedTuple):
    """Ascending lengths in tokens (empty: no curve) and why these."""

    lengths: tuple[int, ...]
    reason: str


def choose_contexts(lengths: Sequence[int], options: SuiteOptions) -> Contexts:
    """The lengths that were asked for, or powers of two up to the longest that enough documents have.

    Raises:
        UserError: fewer than two lengths were asked for, or one that no document has or `max_tokens` forbids; unless
            the contexts are not strict: then what cannot be had is left out, and the reason says so.
    """
    span = options.span_tokens
    if options.contexts is not None:
        longest = options.contexts[-1]
        have = max(lengths, default=0)
        if not options.strict_contexts:
            there = [n for n in options.contexts if n + span <= min(have, options.max_tokens)]
            left = [n for n in options.contexts if n not in there]
            rule = "requested" + (
                f"; left out, as no drawn document has them before a span of {span}: {left}" if left else ""
            )
            return Contexts(tuple(there), rule) if len(there) > 1 else Contexts((), f"{rule}; fewer than two")
        if len(options.contexts) < 2:
            raise UserError(f"--context {longest}: a curve needs two or more lengths")
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

    Every length is scored on the same documents; the first `ablation_documents` with room are taken, of those with a
    byte in the span: of special tokens alone there are no bits per byte.
    """
    span = options.span_tokens
    contexts = choose_contexts(list(scored.values()), options)
    if not contexts.lengths:
        return _no_curve(options, contexts, contexts.reason, too_short=sorted(scored))
    room = [document for document, n in scored.items() if n >= contexts.lengths[-1] + span]
    too_short = sorted(document for document in scored if document not in room)
    counted = [d for d in room if inputs.tokenizer.token_bytes[inputs.documents[d][-span:]].any()]
    no_bytes = sorted(set(room) - set(counted))
    used = sorted(counted[: options.ablation_documents])
    if not used:
        why = f"the last {span} tokens of no document stand for a byte"
        return _no_curve(options, contexts, why, too_short=too_short, no_bytes=no_bytes)
    shape = (len(contexts.lengths), len(used), span)
    bits_LDS, bytes_DS = np.zeros(shape), np.zeros(shape[1:])
    for column, document in enumerate(used):
        ids = inputs.documents[document]
        for row, length in enumerate(contexts.lengths):
            bits_LDS[row, column], bytes_DS[column] = _span_score(inputs, ids[-(length + span) :], options)
            on_progress(column * len(contexts.lengths) + row + 1, len(used) * len(contexts.lengths))
    bits_LDS[:, bytes_DS == 0] = 0.0  # special tokens count in neither sum
    bits = {length: bits_LDS[row].sum(1) for row, length in enumerate(contexts.lengths)}
    return Ablation(
        span_tokens=span,
        contexts_reason=contexts.reason,
        documents=used,
        too_short=too_short,
        not_used=sorted(counted[options.ablation_documents :]),
        no_bytes=no_bytes,
        points=_points(bits, bytes_DS.sum(1), options.seed),
        key_tokens=key_tokens(contexts.lengths, bits_LDS, bytes_DS, options.seed),
        reason=None,
    )


def _no_curve(
    options: SuiteOptions, contexts: Contexts, why: str, *, too_short: list[int], no_bytes: Sequence[int] = ()
) -> Ablation:
    return Ablation(
        span_tokens=options.span_tokens,
        contexts_reason=contexts.reason,
        documents=[],
        too_short=too_short,
        not_used=[],
        no_bytes=list(no_bytes),
        points=[],
        key_tokens=None,
        reason=f"no curve: {why}",
    )


def _span_score(
    inputs: SuiteInput, cut: NDArray[np.int32], options: SuiteOptions
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Bits and bytes of each of the last `span_tokens` targets of one cut document."""
    table = inputs.tokenizer.token_bytes
    (score,) = score_documents(inputs.model, [cut], table, max_tokens=options.max_tokens)
    assert score.excluded is None, score.excluded
    return score.nll_bits[-options.span_tokens :], score.n_bytes[-options.span_tokens :]


def key_tokens(
    lengths: Sequence[int], bits_LDS: NDArray[np.float64], bytes_DS: NDArray[np.float64], seed: int
) -> KeyTokens:
    """Bits per byte of the targets that the longest context helps most (LongPPL, arXiv 2410.23771, section 3.2).

    Args:
        bits_LDS: bits of each target: contexts in rising order, documents, targets. bytes_DS: 0 for special tokens.
    """
    nats_LDS = bits_LDS * math.log(2)
    gain_DS, floor_DS = nats_LDS[0] - nats_LDS[-1], -nats_LDS[-1]
    key_DS = (gain_DS > KEY_GAIN_NATS) & (floor_DS > KEY_FLOOR_NATS) & (bytes_DS > 0)
    here_D = key_DS.any(1)  # a document without a key token has no ratio to resample
    key_bytes_D = (bytes_DS * key_DS).sum(1)[here_D]
    points = [
        KeyTokenPoint(
            context=length,
            bpb=Estimate.of_ratio((bits_LDS[row] * key_DS).sum(1)[here_D], key_bytes_D, seed=seed),
        )
        for row, length in enumerate(lengths if here_D.any() else ())
    ]
    return KeyTokens(
        gain_nats=KEY_GAIN_NATS,
        floor_nats=KEY_FLOOR_NATS,
        tokens=int(key_DS.sum()),
        of_tokens=int((bytes_DS > 0).sum()),
        documents=int(here_D.sum()),
        points=points,
    )


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
