"""One optimizer step: gradients over the micro-batches, the check that they are finite, clipping, the update.

Not for what happens when they are not finite (loop.py decides), nor for logging. Who owns gradients and the update is
the engine (libs.parallel.data).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from apps.train.data.loader import Batch
from apps.train.lane import Lane
from apps.train.metrics import StepClock
from libs.model import HybridLM
from libs.model.hybrid import TargetCounts
from libs.parallel.data import Engine
from libs.parallel.exchange import gather_numbers, sum_numbers
from libs.parallel.mesh import Groups, single

Bad = Literal["loss", "gradient"]
_BAD: tuple[Bad | None, ...] = (None, "loss", "gradient")


class Losses(NamedTuple):
    """Of all micro-batches of a step on all ranks: `loss` is what was differentiated, others are means per target
    (nats).

    main_nll_sum: nats over all main targets. tokens: positions computed, padding included.
    """

    loss: float
    main_loss: float
    mtp_loss: float | None
    main_nll_sum: float
    tokens: int
    n_bytes: int


class StepResult(NamedTuple):
    """`nonfinite` says what was not finite, and then the weights are as they were before. `rank`: where it was seen
    first, None where it is everywhere (one process, or after the exchange)."""

    losses: Losses
    grad_norm: float
    nonfinite: Bad | None
    rank: int | None = None


def accumulate_gradients(
    model: HybridLM, batches: Sequence[Batch], lane: Lane, groups: Groups | None = None, engine: Engine | None = None
) -> Losses:
    """Forward and backward of every micro-batch; a micro-batch weighs as many targets as it has.

    With groups, the parts of a micro-batch on all data-parallel ranks weigh as in one batch: gradients and losses are
    divided by global counts, so that their sum over ranks is the whole. The returned losses are summed already.
    """
    groups = groups or single()
    counts = _global_counts(model, batches, groups) if groups.dp.size > 1 else None
    targets = [int((batch.labels >= 0).sum()) for batch in batches] if counts is None else [c.main for c in counts]
    total = max(1, sum(targets))
    loss = torch.zeros((), device=lane.device)
    main_sum = torch.zeros((), device=lane.device)
    mtp_sums: list[Tensor] = []
    mtp_counts: list[Tensor] = []
    for number, (batch, n_targets) in enumerate(zip(batches, targets, strict=True)):
        with nullcontext() if engine is None else engine.micro_batch(last=number == len(batches) - 1):
            given = lane.place(batch)
            with lane.autocast():
                out = model.loss(
                    given.tokens,
                    given.labels,
                    cu_seqlens=given.cu_seqlens,
                    counts=None if counts is None else counts[number],
                )
            share = out.loss * (n_targets / total)
            share.backward()  # type: ignore[no-untyped-call]
        loss += share.detach()
        main_sum += out.main_nll_sum
        mtp_sums.extend(out.mtp_nll_sums)
        mtp_counts.extend(out.mtp_n_tokens)
    mine = Losses(
        loss=float(loss),
        main_loss=float(main_sum) / total,
        mtp_loss=None,
        main_nll_sum=float(main_sum),
        tokens=sum(batch.tokens.numel() for batch in batches),
        n_bytes=sum(batch.n_bytes for batch in batches),
    )
    mtp_nats, mtp_total = sum(float(value) for value in mtp_sums), sum(int(count) for count in mtp_counts)
    if groups.dp_cp.size > 1:
        mine, mtp_nats, mtp_total = _summed(mine, mtp_nats, mtp_total, total, groups)
    return mine._replace(mtp_loss=mtp_nats / max(1, mtp_total) if mtp_sums else None)


def _global_counts(model: HybridLM, batches: Sequence[Batch], groups: Groups) -> list[TargetCounts]:
    """Targets of each micro-batch on all data-parallel ranks, in one exchange."""
    mine = [model.target_counts(b.tokens, b.labels, cu_seqlens=b.cu_seqlens) for b in batches]
    flat = sum_numbers(groups.dp, [number for count in mine for number in (count.main, *count.mtp)])
    width = len(flat) // len(mine)
    rows = [[round(number) for number in flat[i : i + width]] for i in range(0, len(flat), width)]
    return [TargetCounts(row[0], tuple(row[1:])) for row in rows]


def _summed(mine: Losses, mtp_nats: float, mtp_total: int, n_targets: int, groups: Groups) -> tuple[Losses, float, int]:
    """Sums over dp and cp. Slices of one row hold shares of its losses, and each the whole row's tokens and bytes."""
    slices = groups.cp.size
    parts = [mine.loss, mine.main_nll_sum, mtp_nats, mtp_total, mine.tokens / slices, mine.n_bytes / slices]
    loss, nats, mtp, count, tokens, n_bytes = sum_numbers(groups.dp_cp, parts)
    summed = Losses(loss, nats / n_targets, None, nats, round(tokens), round(n_bytes))
    return summed, mtp, round(count)


def train_step(
    model: HybridLM,
    engine: Engine,
    batches: Sequence[Batch],
    *,
    rate: float,
    clip_norm: float | None,
    lane: Lane,
    clock: StepClock,
    groups: Groups | None = None,
) -> StepResult:
    """Update the weights once, unless loss or gradient is not finite on any rank; the gradients stay either way.

    groups: those of the engine, None in a single process.
    """
    groups = groups or single()
    with clock.phase("forward_backward"):
        engine.zero_grad()
        losses = accumulate_gradients(model, batches, lane, groups, engine)
    with clock.phase("optimizer"):
        if groups.world.size > 1:
            seen = _seen_on_a_rank(losses, engine.local_norm(), groups)
            if seen is not None:
                return seen
        norm = engine.reduce()
        grad_norm = float(norm)
        nonfinite = _what_is_not_finite(losses.loss, grad_norm)
        if nonfinite is None:
            engine.update(rate=rate, clip_norm=clip_norm, norm=norm)
    return StepResult(losses, grad_norm, nonfinite)


def _seen_on_a_rank(losses: Losses, local_norm: float, groups: Groups) -> StepResult | None:
    """Before gradients are added up and every rank has the same NaN: who has one. All ranks see the same answer."""
    mine = _what_is_not_finite(losses.loss, local_norm)
    rows = gather_numbers(groups.world, [_BAD.index(mine), losses.loss, local_norm])
    # A loss is summed and so bad on every rank at once; a gradient tells whose it is.
    bad = [rank for rank, row in enumerate(rows) if not math.isfinite(row[2])] or [
        rank for rank, row in enumerate(rows) if row[0]
    ]
    if not bad:
        return None
    code, loss, norm = rows[bad[0]]
    return StepResult(losses._replace(loss=loss), norm, _BAD[int(code)], bad[0])


def _what_is_not_finite(loss: float, grad_norm: float) -> Bad | None:
    if not math.isfinite(loss):
        return "loss"
    return None if math.isfinite(grad_norm) else "gradient"
