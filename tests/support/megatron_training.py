"""Steps by Megatron's engine and by ours from the same weights, on every rank of a layout; and its state, both ways.

Each check returns plain values; the tests decide what is good.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from apps.train.config import OptimSection
from apps.train.data.loader import Batch, Cursor
from apps.train.lane import Lane
from apps.train.metrics import StepClock
from apps.train.optim import build_optimizer, optimizer_tensors
from apps.train.step import StepResult, accumulate_gradients, train_step
from libs.model import HybridLM, no_decay
from libs.model.block import ResidualBlock
from libs.model.sharding import shard_rules
from libs.parallel.data import TorchEngine
from libs.parallel.megatron_engine import MegatronEngine
from libs.parallel.megatron_setup import Adam
from libs.parallel.mesh import Groups, Layout, Parallel, open_groups
from libs.parallel.together import everyones
from tests.support.megatron_facade import megatron_on_cpu
from tests.support.ranks import TIMEOUT
from tests.support.tensor_parallel import config, rough_model, shard_of

STEPS = 4
OPTIM = OptimSection(lr=1e-2, weight_decay=0.3)
LANE = Lane(torch.device("cpu"), "a CPU", "fp32", {})
# Small enough that the model is exchanged in many parts.
BUCKET_NUMEL = 3000


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
    found = [
        train_step(
            model, engine, batches(dp, step), rate=1e-2 / (step + 1), clip_norm=clip, lane=LANE, clock=clock,
            groups=groups,
        )
        for step in range(STEPS)
    ]  # fmt: skip
    engine.settle()
    return found


class Watch(TorchFunctionMode):
    """Counts uses of parameters whose gathering is under way: what such a use reads is nobody's guess."""

    def __init__(self, bucket_groups: Mapping[Tensor, Any]) -> None:
        super().__init__()
        self._bucket_groups, self.early, self.late = bucket_groups, 0, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in args:
            group = self._bucket_groups.get(value) if isinstance(value, nn.Parameter) else None
            if group is not None and "__get__" not in repr(func):
                self.early += group.param_gather_handle is not None
                self.late += group.param_gather_handle is None
        return func(*args, **(kwargs or {}))


def megatron_engine(model: HybridLM, groups: Groups, **options: Any) -> MegatronEngine:
    adam = Adam(OPTIM.lr, (OPTIM.beta1, OPTIM.beta2), OPTIM.eps, OPTIM.weight_decay, no_decay)
    sharded = {name for name, rule in shard_rules(model.config).items() if rule.dim is not None}
    blocks = [module for module in model.modules() if isinstance(module, ResidualBlock)]
    return MegatronEngine(model, adam, groups, sharded, **{"blocks": blocks, **options})


def gathered(groups: Groups, mine: dict[str, Tensor]) -> dict[str, Tensor]:
    """The shares of all ranks that hold the same parameters; no key twice."""
    shares = everyones(groups.dp_cp, mine)
    whole = {key: tensor for share in shares for key, tensor in share.items()}
    assert len(whole) == sum(len(share) for share in shares)
    return whole


def apart(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> float:
    assert got.keys() == want.keys(), sorted(got.keys() ^ want.keys())
    return max(float((got[key] - want[key]).abs().max()) for key in want)


def compare(groups: Groups, clip: float | None, **options: Any) -> dict[str, Any]:
    """Both engines from the same weights."""
    full = rough_model(config())
    sharded = {name for name, rule in shard_rules(full.config).items() if rule.dim is not None}
    ours, theirs = (shard_of(full, Parallel(groups)) for _ in range(2))
    optimizer = build_optimizer(ours, OPTIM)
    want = steps(ours, groups, TorchEngine(ours, optimizer, groups, sharded), clip)
    with megatron_on_cpu():
        engine = megatron_engine(theirs, groups, **options)
        with Watch(engine._ddp.param_to_bucket_group) as watch:
            got = steps(theirs, groups, engine, clip)
        state = gathered(groups, engine.collect_state())
        held = sum(p.numel() for group in engine.param_groups for p in group["params"])
    now = {name: p.detach() for name, p in theirs.named_parameters()}
    begun = {name: p.detach() for name, p in shard_of(full, Parallel(groups)).named_parameters()}
    moved = {name: float((p - begun[name]).abs().max()) for name, p in now.items()}
    return {
        "loss": [(a.losses.loss, b.losses.loss) for a, b in zip(want, got, strict=True)],
        "norm": [(a.grad_norm, b.grad_norm) for a, b in zip(want, got, strict=True)],
        "weights apart": apart(now, {name: p.detach() for name, p in ours.named_parameters()}),
        "state apart": apart(state, optimizer_tensors(ours, optimizer)),
        "moved": moved,
        "held": held,
        "all": sum(p.numel() for p in theirs.parameters()),
        "buckets": len(engine._ddp.bucket_groups),
        "uses": (watch.early, watch.late),
        "dtypes": sorted({str(p.dtype) for p in theirs.parameters()}),
    }


def early_uses(groups: Groups) -> int:
    """Uses of parameters under way when nothing waits for them: the model is a block that nobody calls."""
    model = shard_of(rough_model(config()), Parallel(groups))
    with megatron_on_cpu():
        engine = megatron_engine(model, groups, blocks=[model], bucket_numel=BUCKET_NUMEL)
        clock = StepClock(LANE.device)
        first, second = (batches(groups.dp.rank, step) for step in (0, 1))
        train_step(model, engine, first, rate=1e-2, clip_norm=None, lane=LANE, clock=clock, groups=groups)
        with Watch(engine._ddp.param_to_bucket_group) as watch:
            accumulate_gradients(model, second, LANE, groups, engine)
        engine.settle()
        engine.zero_grad()
    return watch.early


def state_there_and_back(groups: Groups) -> dict[str, Any]:
    """State that no step made, with zeros of both signs: loaded, collected, loaded into another engine, stepped."""
    full, generator = rough_model(config()), torch.Generator().manual_seed(3)
    first, second = (shard_of(full, Parallel(groups)) for _ in range(2))
    want: dict[str, Tensor] = {}
    for name, parameter in first.named_parameters():
        for part in ("exp_avg", "exp_avg_sq"):
            drawn = torch.randn(parameter.shape, generator=generator)
            want[f"{part}/{name}"] = (drawn.square() if part == "exp_avg_sq" else drawn) * (drawn.abs() > 0.3)
        want[f"exp_avg/{name}"].flatten()[::3] = -0.0
        want[f"step/{name}"] = torch.tensor(7.0)
    with megatron_on_cpu():
        engines = [megatron_engine(model, groups, bucket_numel=BUCKET_NUMEL) for model in (first, second)]
        before = engines[0].collect_state()
        engines[0].restore_state(want)
        found = gathered(groups, engines[0].collect_state())
        steps(first, groups, engines[0], 0.5)
        engines[1].restore_state(found)
        steps(second, groups, engines[1], 0.5)
    bits = {key: tensor.view(torch.int32) for key, tensor in want.items()}
    return {
        "before": len(before),
        "other bits": [key for key in want if not torch.equal(found[key].view(torch.int32), bits[key])],
        "keys": sorted(found) == sorted(want),
        "same after": all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)),
    }


def left_out_step(groups: Groups) -> dict[str, Any]:
    """A step that one rank's NaN spoils, the next two good: as if the spoilt one had not been."""
    models = [shard_of(rough_model(config()), Parallel(groups)) for _ in range(2)]
    clock, seen = StepClock(LANE.device), []
    with megatron_on_cpu():
        for model, spoils in zip(models, (True, False), strict=True):
            engine = megatron_engine(model, groups, bucket_numel=BUCKET_NUMEL)
            for step in (0, 1, 2):
                hook = None
                if step == 1:
                    if not spoils:
                        continue
                    weight = model.blocks[0].norm.weight
                    if groups.world.rank == 1:
                        hook = weight.register_hook(lambda grad: grad * float("nan"))
                result = train_step(
                    model, engine, batches(groups.dp.rank, step), rate=1e-2, clip_norm=0.5, lane=LANE, clock=clock,
                    groups=groups,
                )  # fmt: skip
                if hook is not None:
                    hook.remove()
                if step == 1:
                    bad = [name for name, grad in engine.gradients().items() if not bool(grad.isfinite().all())]
                    seen.append((result.nonfinite, result.rank, bad))
                    engine.zero_grad()
            engine.settle()
    return {
        "seen": seen,
        "same": all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True)),
    }


def check(groups: Groups) -> dict[str, Any]:
    """dp 2, then the same two ranks as tp 2 and as cp 2."""
    tp2 = open_groups(Layout(tp=2), "gloo", TIMEOUT, store=groups.store)
    cp2 = open_groups(Layout(cp=2), "gloo", TIMEOUT, store=groups.store)
    return {
        "dp2": compare(groups, 0.5, overlap=False),
        "dp2 overlapped": compare(groups, None, bucket_numel=BUCKET_NUMEL),
        "tp2": compare(tp2, 0.5, bucket_numel=BUCKET_NUMEL),
        "cp2": compare(cp2, 0.5, bucket_numel=BUCKET_NUMEL),
        "early uses": early_uses(groups),
        "state": [state_there_and_back(groups), state_there_and_back(tp2)],
        "left out": left_out_step(groups),
    }


def check_alone(groups: Groups) -> dict[str, Any]:
    return {
        "alone": compare(groups, 0.5, bucket_numel=BUCKET_NUMEL),
        "alone, one exchange": compare(groups, None, overlap=False),
        "state": [state_there_and_back(groups)],
    }


def check_four(groups: Groups) -> dict[str, Any]:
    dp2_tp2 = open_groups(Layout(dp=2, tp=2), "gloo", TIMEOUT, store=groups.store)
    return {
        "dp4": compare(groups, 0.5, bucket_numel=BUCKET_NUMEL),
        "dp2 tp2": compare(dp2_tp2, 0.5, bucket_numel=BUCKET_NUMEL),
        "state": [state_there_and_back(groups), state_there_and_back(dp2_tp2)],
    }
