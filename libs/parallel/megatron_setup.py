"""What Megatron's engine tells megatron-core 0.16.1: its configs, its optimizer, and our groups under its names.

In one place, so that the check before a run (`fp8_ready`) sees the very configs the engine will be built from.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from libs.parallel.fp8 import Fp8, Linear
from libs.parallel.fp8_ready import Plan
from libs.parallel.mesh import Group, Groups, Layout

with warnings.catch_warnings():
    # Importing megatron.core warns about optional CUDA packages that are not used here.
    warnings.simplefilter("ignore", UserWarning)
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig


class Adam(NamedTuple):
    """AdamW as `apps.train` sets it; `no_decay` says of a parameter's name and value whether it takes no decay."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    no_decay: Callable[[str, Tensor], bool]


def transformer_config(asked: Fp8 | None) -> TransformerConfig:
    """Of Megatron's DDP, which has no model of Megatron's around it: the shape is nobody's."""
    shape = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1}
    fp8: dict[str, Any] = {}
    if asked is not None:
        low = {"bf16": True, "params_dtype": torch.bfloat16}
        fp8 = {"fp8": asked.format, "fp8_recipe": asked.recipe, "fp8_param": True, **low}
    # calculate_per_token_loss: gradients are summed and not averaged; losses are shares of the whole already.
    return TransformerConfig(**shape, calculate_per_token_loss=True, **fp8)


def ddp_config(asked: Fp8 | None, *, overlap: bool, bucket_numel: int | None = None) -> DistributedDataParallelConfig:
    """Gradients in fp32, reduce-scattered in buckets; check_for_nan_in_grad has the engine's own look called."""
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        bucket_size=bucket_numel,
        check_for_nan_in_grad=overlap,
        fp8_param_gather=asked is not None,
    )


def optimizer_config(adam: Adam | None, asked: Fp8 | None, *, overlap: bool) -> OptimizerConfig:
    """adam: None where only a plan is made. clip_grad 0: the engine clips, after the norm was seen to be finite."""
    numbers: dict[str, Any] = {}
    if adam is not None:
        numbers = {"lr": adam.lr, "weight_decay": adam.weight_decay, "adam_eps": adam.eps}
        numbers |= {"adam_beta1": adam.betas[0], "adam_beta2": adam.betas[1]}
    fp8 = {} if asked is None else {"bf16": True, "params_dtype": torch.bfloat16, "fp8_recipe": asked.recipe}
    sharded = {"use_distributed_optimizer": True, "overlap_param_gather": overlap, "clip_grad": 0.0}
    return OptimizerConfig(optimizer="adam", **numbers, **sharded, **fp8)


def fp8_plan(asked: Fp8, linears: Sequence[Linear], tokens: int, layout: Layout) -> Plan:
    """What an engine of `megatron_engine` would train. tokens: of a micro-batch, on one rank."""
    configs = (transformer_config(asked), ddp_config(asked, overlap=True), optimizer_config(None, asked, overlap=True))
    return Plan(asked.word, *configs, linears, tokens, layout.tp, layout.cp)


def build_optimizer(
    ddp: DistributedDataParallel, adam: Adam, asked: Fp8 | None, collection: ProcessGroupCollection, *, overlap: bool
) -> Any:
    """Megatron's DistributedOptimizer over the buckets of `ddp`."""

    def takes_none(parameter: Tensor, name: str) -> bool:
        return adam.no_decay(name.removeprefix("module."), parameter)

    spared = ParamKey(with_name_predicate=ParamWithNamePredicate(name="no_decay", fn=takes_none))
    optimizer = get_megatron_optimizer(
        optimizer_config(adam, asked, overlap=overlap),
        [ddp],
        config_overrides={spared: {"wd_mult": 0.0}},
        use_gloo_process_groups=False,
        pg_collection=collection,
    )
    (dense,) = optimizer.chained_optimizers
    for group in optimizer.param_groups:
        # Megatron's scheduler would apply the multiplier; without one all parameters would decay alike.
        group["weight_decay"] = adam.weight_decay * group["wd_mult"]
        if isinstance(dense.optimizer, torch.optim.AdamW):  # without transformer-engine; as the torch engine has it
            group["fused"] = True
    return optimizer


def collection_of(groups: Groups) -> ProcessGroupCollection:
    """Our groups under Megatron's names; no pipeline and no experts."""
    alone = _alone(groups.world)
    tp, cp, dp, dp_cp, world = (
        alone if group.process_group is None else group.process_group
        for group in (groups.tp, groups.cp, groups.dp, groups.dp_cp, groups.world)
    )
    return ProcessGroupCollection(
        tp=tp,
        cp=cp,
        dp=dp,
        dp_cp=dp_cp,
        mp=tp,
        pp=alone,
        ep=alone,
        embd=alone,
        pos_embd=alone,
        expt_dp=dp,
        intra_dp_cp=dp_cp,
        intra_expt_dp=dp,
        expt_tp=alone,
        tp_ep_pp=tp,
        intra_dist_opt=world,
    )


def _alone(world: Group) -> dist.ProcessGroup:
    """A real group of this process only: Megatron asks every group for its size and rank."""
    handles: list[Any] = [dist.new_group([rank]) for rank in world.members]  # a collective: every rank makes all
    own: dist.ProcessGroup = handles[world.rank]
    return own
