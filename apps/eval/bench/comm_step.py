"""One optimizer step of a whole small model, on one process and shared by several: the speed-up in `fathom bench comm`.

Not for one layer's exchange (comm_layers.py). Losses and gradients of the three ways are compared before any is timed.
"""
# p processes, and rows of the batch  S tokens of a row

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from apps.eval.bench.correctness import GRADIENT_TOLERANCE, Outcome
from apps.eval.bench.model_step import CLIP_NORM, RATE, adamw
from libs.model import HybridLM, preset
from libs.model.hybrid import TargetCounts
from libs.parallel.data import TorchEngine
from libs.parallel.mesh import Groups, Parallel, single

STEP_METHODS = {
    "step_one_process": "one optimizer step on the whole batch by one process, the others idle",
    "step_dp": "the same step, every process takes one row (data parallelism)",
    "step_cp": "the same step, every process takes one slice of every row (context parallelism)",
}


class StepPlan(NamedTuple):
    """model: a preset. seq_len: tokens of a row; the batch has one row for each process."""

    model: str
    seq_len: int


class _Taker(NamedTuple):
    """Somebody who takes steps on rows of the batch: a model, its engine and its share."""

    model: HybridLM
    engine: TorchEngine
    tokens_BS: Tensor
    counts: TargetCounts

    def gradients(self) -> tuple[float, Tensor]:
        """This rank's share of the loss, and the whole gradient's norm; gradients are left in the model."""
        self.engine.zero_grad()
        out = self.model.loss(self.tokens_BS[:, :-1], self.tokens_BS[:, 1:], counts=self.counts)
        out.loss.backward()  # type: ignore[no-untyped-call]
        return float(out.loss.detach()), self.engine.reduce()

    def step(self) -> None:
        _, norm = self.gradients()
        self.engine.update(rate=RATE, clip_norm=CLIP_NORM, norm=norm)


def _taker(model: HybridLM, groups: Groups, rows_BS: Tensor, counts: TargetCounts) -> _Taker:
    return _Taker(model, TorchEngine(model, adamw(model), groups), rows_BS, counts)


def step_works(
    plan: StepPlan, replicas: Groups, sliced: Groups, *, seed: int
) -> tuple[dict[str, Callable[[], None]], list[Outcome]]:
    """What to time by method, and whether the ways agree: their loss and the norm of their gradient.

    replicas, sliced: the same processes as dp and as cp groups. All ranks call this together.
    """
    world, config = replicas.world, preset(plan.model)
    draw = torch.Generator().manual_seed(seed)
    rows_BS = torch.randint(0, config.vocab_size, (world.size, plan.seq_len + 1), generator=draw)
    model = HybridLM(config)
    counts = model.target_counts(rows_BS[:, :-1], rows_BS[:, 1:])
    alone = _taker(model, single(), rows_BS, counts)
    my_row = rows_BS[world.rank : world.rank + 1]
    shared = {
        name: _taker(HybridLM(config, parallel=Parallel(groups)), groups, rows, counts)
        for name, groups, rows in (("step_dp", replicas, my_row), ("step_cp", sliced, rows_BS))
    }
    loss, norm = alone.gradients()
    outcomes = []
    for name, taker in shared.items():
        share, found = taker.gradients()
        total = float(world.all_reduce_(torch.tensor([share], dtype=torch.float64)))
        errors = {"loss": abs(total - loss) / loss, "gradient norm": abs(float(found) - float(norm)) / float(norm)}
        outcomes += [
            Outcome(f"{name} {what} vs one process", error, GRADIENT_TOLERANCE) for what, error in errors.items()
        ]
    works: dict[str, Callable[[], None]] = {name: taker.step for name, taker in shared.items()}
    return {"step_one_process": alone.step if world.rank == 0 else _idle, **works}, outcomes


def _idle() -> None:
    """The other processes while one works alone."""
