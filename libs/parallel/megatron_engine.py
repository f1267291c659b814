"""Data parallelism by megatron-core 0.16.1: its DistributedDataParallel and DistributedOptimizer around our model.

Gradients are reduce-scattered in fp32 while backward runs, each rank of `dp_cp` updates its part of the parameters and
gathers the others'. CUDA only, since megatron-core asks for the device by name; its logic is tested on gloo through a
facade that lives with the tests. Not for tensor parallelism (`tensor`) nor FP8 (`fp8`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from libs.parallel.mesh import Group, Groups

with warnings.catch_warnings():
    # Importing megatron.core warns about optional CUDA packages that are not used here.
    warnings.simplefilter("ignore", UserWarning)
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
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


class MegatronEngine:
    """An `Engine` (libs.parallel.data) over a model whose parameters are all fp32, and stay so."""

    def __init__(
        self, model: nn.Module, adam: Adam, groups: Groups, sharded: Collection[str] = (), *, overlap: bool = True
    ) -> None:
        """Moves parameters into Megatron's buffers: build it after the weights are in place.

        sharded: names of the parameters of which this rank holds a tensor-parallel shard. overlap: reduce during
        backward.
        """
        dtypes = {parameter.dtype for parameter in model.parameters()}
        assert dtypes == {torch.float32}, f"parameters must be fp32 (compute in bf16 is autocast), found {dtypes}"
        assert dist.is_initialized(), "megatron-core needs a process group, of one process too"
        for name, parameter in model.named_parameters():
            # Its gradient norm counts what is not marked on tensor-parallel rank 0 only.
            parameter.tensor_model_parallel = name in sharded  # type: ignore[attr-defined]
        collection = _collection(groups)
        # calculate_per_token_loss: gradients are summed and not averaged; losses are shares of the whole already.
        config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, calculate_per_token_loss=True)
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, overlap_grad_reduce=overlap, use_distributed_optimizer=True
        )
        self._ddp = DistributedDataParallel(config, ddp, model, pg_collection=collection)
        self._optimizer = _optimizer(self._ddp, adam, collection)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """As of any torch optimizer: this rank's parts of the parameters."""
        groups: list[dict[str, Any]] = self._optimizer.param_groups
        return groups

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Backward of one micro-batch; gradients are exchanged in that of the last."""
        if last:
            yield
        else:
            with self._ddp.no_sync():
                yield

    def zero_grad(self) -> None:
        self._ddp.zero_grad_buffer()
        self._optimizer.zero_grad()

    def local_norm(self) -> float:
        """Of the sums where backward has exchanged them already, else of this rank's own gradients."""
        return float(torch.nn.utils.get_total_norm(p.main_grad for p in self._ddp.module.parameters()))

    def reduce(self) -> Tensor:
        self._ddp.finish_grad_sync()
        self._optimizer.prepare_grads()
        return torch.as_tensor(self._optimizer.get_grad_norm(), dtype=torch.float32)

    def update(self, *, rate: float, clip_norm: float | None, norm: Tensor) -> None:
        if clip_norm is not None:
            clip_grad_by_total_norm_fp32(self._optimizer.get_parameters(), clip_norm, float(norm))
        for group in self.param_groups:
            group["lr"] = rate
        succeeded = self._optimizer.step_with_ready_grads()
        assert succeeded, "an fp32 optimizer has no reason to leave out a step"


def _optimizer(ddp: DistributedDataParallel, adam: Adam, collection: ProcessGroupCollection) -> Any:
    config = OptimizerConfig(
        optimizer="adam",
        lr=adam.lr,
        weight_decay=adam.weight_decay,
        adam_beta1=adam.betas[0],
        adam_beta2=adam.betas[1],
        adam_eps=adam.eps,
        use_distributed_optimizer=True,
        clip_grad=0.0,  # `update` clips, after the norm was seen to be finite
    )

    def takes_none(parameter: Tensor, name: str) -> bool:
        return adam.no_decay(name.removeprefix("module."), parameter)

    spared = ParamKey(with_name_predicate=ParamWithNamePredicate(name="no_decay", fn=takes_none))
    optimizer = get_megatron_optimizer(
        config,
        [ddp],
        config_overrides={spared: {"wd_mult": 0.0}},
        use_gloo_process_groups=False,
        pg_collection=collection,
    )
    # Megatron's scheduler would apply the multiplier; without one all parameters would decay alike.
    for group in optimizer.param_groups:
        group["weight_decay"] = adam.weight_decay * group["wd_mult"]
    return optimizer


def _collection(groups: Groups) -> ProcessGroupCollection:
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
