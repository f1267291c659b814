"""Which engine a run has: who owns gradients, update and optimizer state, chosen once with its reason.

Not for what engines do (libs.parallel.data, libs.parallel.megatron_engine).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, cast

import torch

from apps.train.config import ParallelSection, TrainConfig
from apps.train.lane import Lane
from apps.train.optim import AnyOptimizer, build_optimizer
from libs.flags.errors import UserError
from libs.flags.installed import value_of
from libs.kernels.backend import Choice
from libs.model import HybridLM, no_decay
from libs.model.block import ResidualBlock
from libs.model.fp8 import to_fp8
from libs.model.sharding import model_partitions, shard_rules
from libs.parallel.data import Engine, TorchEngine
from libs.parallel.fp8 import GATE, Fp8, Fp8Weights, Word
from libs.parallel.fp8_built import FirstUpdate
from libs.parallel.mesh import Groups

if TYPE_CHECKING:
    from libs.parallel.xla.device import XlaDevice


class Built(NamedTuple):
    """optimizer: what checkpoints save and restore; the engine updates with it. first_update: called when the weights
    are those that training begins with, watches what the first update makes of them; None: there is nothing to watch.
    """

    engine: Engine
    optimizer: AnyOptimizer
    choice: Choice
    first_update: Callable[[], FirstUpdate | None] | None = None


def refuse_engine(parallel: ParallelSection, lane: Lane) -> None:
    """Raises UserError: an engine that cannot run on this device."""
    if lane.xla is not None and (parallel.shard_optimizer or parallel.cp > 1 or parallel.tp > 1):
        raise UserError(
            "parallel.shard_optimizer, parallel.cp and parallel.tp are for several processes; on XLA one process "
            "drives every chip: use xla.data, xla.fsdp (which shards the optimizer too) and xla.tensor"
        )
    if parallel.engine == "megatron" and lane.device.type != "cuda":
        raise UserError(
            "parallel.engine = 'megatron' needs a CUDA device: megatron-core's DistributedDataParallel and optimizer "
            f"ask for one by name, this run is on {lane.device.type}; allowed here: auto, torch "
            "(or --dry-run to plan for a device that is elsewhere)"
        )


def wants_process_group(parallel: ParallelSection) -> bool:
    """Whether a job of one process needs a process group all the same."""
    return parallel.engine == "megatron"


def build_engine(config: TrainConfig, model: HybridLM, groups: Groups, xla: XlaDevice | None = None) -> Built:
    """The engine of `parallel.engine` around a model whose weights are in place. A collective of all ranks.

    xla: the open device of the XLA lane, which has an engine of its own.
    """
    sharded = {name for name, rule in shard_rules(model.config).items() if rule.dim is not None}
    if config.parallel.engine == "megatron":
        return _megatron(config, model, groups, sharded)
    shared_by = groups.dp_cp if config.parallel.shard_optimizer else None
    optimizer = build_optimizer(model, config.optim, shared_by=shared_by)
    if xla is not None:
        return _on_xla(model, optimizer, groups, xla)
    how = "requested by name" if config.parallel.engine == "torch" else "auto: megatron only when asked for"
    return Built(TorchEngine(model, optimizer, groups, sharded), optimizer, Choice("torch", how))


def _on_xla(model: HybridLM, optimizer: torch.optim.Optimizer, groups: Groups, xla: XlaDevice) -> Built:
    # torch_xla is not in the main environment.
    from libs.parallel.xla.engine import XlaEngine

    engine = XlaEngine(model, optimizer, groups, xla, model_partitions(model, xla.shape))
    return Built(engine, optimizer, Choice("xla", f"the device is {xla.name}, mesh {xla.shape._asdict()}"))


def _megatron(config: TrainConfig, model: HybridLM, groups: Groups, sharded: set[str]) -> Built:
    # Imports megatron.core, which takes seconds and nobody else needs.
    from libs.parallel.megatron_engine import MegatronEngine
    from libs.parallel.megatron_setup import Adam

    settings = config.optim
    adam = Adam(settings.lr, (settings.beta1, settings.beta2), settings.eps, settings.weight_decay, no_decay)
    blocks = [module for module in model.modules() if isinstance(module, ResidualBlock)]
    fp8 = _fp8_weights(config, model, groups)
    engine = MegatronEngine(model, adam, groups, sharded, blocks=blocks, fp8=fp8)
    how = "" if fp8 is None else f"; {len(fp8.names)} FP8 parameters, recipe {fp8.asked.recipe}"
    return Built(engine, engine, Choice("megatron", f"requested by name: {engine.describe}{how}"), engine.first_update)


def _fp8_weights(config: TrainConfig, model: HybridLM, groups: Groups) -> Fp8Weights | None:
    """Large linears replaced by FP8 ones, where the gate is in force."""
    word, recipe = value_of(GATE), config.parallel.fp8_recipe
    if word == "off":
        return None
    assert recipe is not None, "the gate needs a recipe"
    return to_fp8(model, model.config, groups.tp.size, Fp8(cast(Word, word), recipe))
