"""Recompute what a cache hit saved, without any cache, and compare by bits: a difference stops the engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from libs.kernels.mimo import MimoState
from libs.model.attention import Attention
from libs.model.inference.lanes import PlainLane
from libs.model.inference.resources import EngineStopped
from libs.model.inference.runner import Runner, pieces
from libs.model.mixer import MambaMixer


class AuditFailed(EngineStopped):
    """A request that used the cache is not what it is without. The engine does nothing more."""


class Auditor:
    """Chooses a share of the hits, evenly and by count alone, and checks them.

    Attributes:
        audited: hits checked so far.
    """

    def __init__(self, share: float) -> None:
        self._share, self._hits, self.audited = share, 0, 0

    def chooses(self) -> bool:
        """Whether to check the hit that just happened."""
        self._hits += 1
        due = int(self._hits * self._share + 1e-9)
        if due <= self.audited:
            return False
        self.audited += 1
        return True


def recompute(runner: Runner, prompt: Sequence[int], grid: int) -> tuple[PlainLane, Tensor]:
    """The lane after the whole prompt, and the hidden states (S, D) of its last piece; in memory of its own."""
    model = runner.model
    lane = PlainLane(model.config, model.head_weight.dtype, runner.device)
    for start, end in pieces(0, len(prompt), grid):
        hidden_SD = runner.prefill(lane, prompt[start:end], start)
    return lane, hidden_SD


def compare(
    runner: Runner,
    number: int,
    plain: PlainLane,
    *,
    states: dict[int, MimoState],
    kv: dict[int, tuple[Tensor, Tensor]],
    hidden: tuple[Tensor, Tensor],
) -> None:
    """Raises AuditFailed naming the first layer and part that differ by a bit; `hidden`: used and recomputed."""
    advice = "a run without the prefix cache; set FATHOM_PREFIX_CACHE=off and report it"
    for index, block in enumerate(runner.model.trunk):
        if isinstance(block.layer, MambaMixer):
            parts = zip(MimoState._fields, states[index], plain.state(index), strict=True)
        elif isinstance(block.layer, Attention):
            parts = zip(("keys", "values"), kv[index], plain.kv[index], strict=True)
        else:
            continue
        for name, used, wanted in parts:
            if not torch.equal(used, wanted):
                raise AuditFailed(f"request {number}: {name} of block {index} differ from those of {advice}")
    if not torch.equal(*hidden):
        raise AuditFailed(f"request {number}: the last hidden states differ from those of {advice}")
