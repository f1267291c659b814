"""Three steps by Megatron's engine and by ours from the same weights, on every rank of a layout."""

from __future__ import annotations

from typing import Any

import torch

from apps.train.config import OptimSection
from apps.train.data.loader import Batch, Cursor
from apps.train.lane import Lane
from apps.train.metrics import StepClock
from apps.train.optim import build_optimizer
from apps.train.step import StepResult, train_step
from libs.model import HybridLM, no_decay
from libs.model.sharding import shard_rules
from libs.parallel.data import TorchEngine
from libs.parallel.megatron_engine import Adam, MegatronEngine
from libs.parallel.mesh import Groups, Layout, Parallel, open_groups
from tests.support.megatron_facade import megatron_on_cpu
from tests.support.ranks import TIMEOUT
from tests.support.tensor_parallel import config, rough_model, shard_of

OPTIM = OptimSection(lr=1e-2, weight_decay=0.3)
LANE = Lane(torch.device("cpu"), "a CPU", "fp32", {})


def batches(rank: int, step: int) -> list[Batch]:
    """Two micro-batches of this replica, of unequal numbers of targets."""
    found = []
    for number in range(2):
        generator = torch.Generator().manual_seed(100 * step + 10 * number + rank)
        tokens = torch.randint(0, 64, (1, 24), generator=generator)
        labels = tokens.roll(-1, 1)
        labels[0, : 3 + 5 * rank] = -100
        bounds = torch.tensor([0, 10 + rank, 24], dtype=torch.int32)
        found.append(Batch(tokens, labels, bounds, 24, Cursor(), (number,)))
    return found


def steps(model: HybridLM, groups: Groups, engine: Any, clip: float | None) -> list[StepResult]:
    clock, dp = StepClock(LANE.device), groups.dp.rank
    dummy = torch.optim.SGD(model.parameters(), lr=0.0)
    return [
        train_step(
            model, dummy, batches(dp, step), rate=1e-2 / (step + 1), clip_norm=clip, lane=LANE, clock=clock,
            groups=groups, engine=engine,
        )
        for step in range(3)
    ]  # fmt: skip


def compare(groups: Groups, clip: float | None, *, overlap: bool) -> dict[str, Any]:
    full = rough_model(config())
    sharded = {name for name, rule in shard_rules(full.config).items() if rule.dim is not None}
    ours, theirs = (shard_of(full, Parallel(groups)) for _ in range(2))
    want = steps(ours, groups, TorchEngine(ours, build_optimizer(ours, OPTIM), groups, sharded), clip)
    with megatron_on_cpu():
        betas = (OPTIM.beta1, OPTIM.beta2)
        adam = Adam(OPTIM.lr, betas, OPTIM.eps, OPTIM.weight_decay, no_decay)
        engine = MegatronEngine(theirs, adam, groups, sharded, overlap=overlap)
        got = steps(theirs, groups, engine, clip)
        held = sum(p.numel() for group in engine.param_groups for p in group["params"])
    pairs = dict(theirs.named_parameters())
    off = {name: float((p - pairs[name]).abs().max()) for name, p in ours.named_parameters()}
    moved = {name: float((p - s).abs().max()) for (name, p), s in zip(
        ours.named_parameters(), shard_of(full, Parallel(groups)).parameters(), strict=True)}  # fmt: skip
    return {
        "loss": [(a.losses.loss, b.losses.loss) for a, b in zip(want, got, strict=True)],
        "norm": [(a.grad_norm, b.grad_norm) for a, b in zip(want, got, strict=True)],
        "off": off,
        "moved": moved,
        "held": held,
        "all": sum(p.numel() for p in theirs.parameters()),
        "dtypes": sorted({str(p.dtype) for p in theirs.parameters()}),
    }


def check(groups: Groups) -> dict[str, Any]:
    """dp 2, then the same two ranks as tp 2."""
    tp2 = open_groups(Layout(tp=2), "gloo", TIMEOUT, store=groups.store)
    return {
        "dp2": compare(groups, 0.5, overlap=False),
        "dp2 overlapped": compare(groups, None, overlap=True),
        "tp2": compare(tp2, 0.5, overlap=False),
    }
