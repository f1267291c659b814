"""One optimizer step: gradients over the micro-batches, the check that they are finite, clipping, AdamW.

Not for what happens when they are not finite (loop.py decides), nor for logging.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from apps.train.data.loader import Batch
from apps.train.lane import Lane
from apps.train.metrics import StepClock
from apps.train.optim import set_learning_rate
from libs.model import HybridLM


class Losses(NamedTuple):
    """Of all micro-batches of a step: `loss` is what was differentiated, others are means per target (nats).

    main_nll_sum: nats over all main targets. tokens: positions computed, padding included.
    """

    loss: float
    main_loss: float
    mtp_loss: float | None
    main_nll_sum: float
    tokens: int
    n_bytes: int


class StepResult(NamedTuple):
    """`nonfinite` says what was not finite, and then the weights are as they were before."""

    losses: Losses
    grad_norm: float
    nonfinite: str | None


def accumulate_gradients(model: HybridLM, batches: Sequence[Batch], lane: Lane) -> Losses:
    """Forward and backward of every micro-batch; a micro-batch weighs as many targets as it has."""
    targets = [int((batch.labels >= 0).sum()) for batch in batches]
    total = max(1, sum(targets))
    loss = torch.zeros((), device=lane.device)
    main_sum = torch.zeros((), device=lane.device)
    mtp_sums: list[Tensor] = []
    mtp_counts: list[Tensor] = []
    for batch, n_targets in zip(batches, targets, strict=True):
        with lane.autocast():
            out = model.loss(
                batch.tokens.to(lane.device),
                batch.labels.to(lane.device),
                cu_seqlens=batch.cu_seqlens.to(lane.device),
            )
        share = out.loss * (n_targets / total)
        share.backward()  # type: ignore[no-untyped-call]
        loss += share.detach()
        main_sum += out.main_nll_sum
        mtp_sums.extend(out.mtp_nll_sums)
        mtp_counts.extend(out.mtp_n_tokens)
    mtp_total = sum(int(count) for count in mtp_counts)
    return Losses(
        loss=float(loss),
        main_loss=float(main_sum) / total,
        mtp_loss=sum(float(value) for value in mtp_sums) / max(1, mtp_total) if mtp_sums else None,
        main_nll_sum=float(main_sum),
        tokens=sum(batch.tokens.numel() for batch in batches),
        n_bytes=sum(batch.n_bytes for batch in batches),
    )


def train_step(
    model: HybridLM,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    *,
    rate: float,
    clip_norm: float | None,
    lane: Lane,
    clock: StepClock,
) -> StepResult:
    """Update the weights once, unless loss or gradient is not finite; the gradients stay either way."""
    with clock.phase("forward_backward"):
        optimizer.zero_grad(set_to_none=True)
        losses = accumulate_gradients(model, batches, lane)
    with clock.phase("optimizer"):
        parameters = [p for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(p.grad for p in parameters if p.grad is not None)
        grad_norm = float(norm)
        nonfinite = _what_is_not_finite(losses, grad_norm)
        if nonfinite is None:
            if clip_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
            set_learning_rate(optimizer, rate)
            optimizer.step()
    return StepResult(losses, grad_norm, nonfinite)


def _what_is_not_finite(losses: Losses, grad_norm: float) -> str | None:
    if not math.isfinite(losses.loss):
        return "loss"
    return None if math.isfinite(grad_norm) else "gradient"
