"""Data parallelism by megatron-core 0.16.1: its DistributedDataParallel and DistributedOptimizer around our model.

Gradients are reduce-scattered in fp32 while backward runs; each rank of `dp_cp` updates its part of the parameters, and
gathers the others' while the next forward runs. CUDA only, since megatron-core asks for the device by name; its logic
is tested on gloo through a facade that lives with the tests. Not for tensor parallelism (`tensor`) nor FP8 (`fp8`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from libs.parallel.megatron_state import collect, pieces, restore
from libs.parallel.mesh import Group, Groups

with warnings.catch_warnings():
    # Importing megatron.core warns about optional CUDA packages that are not used here.
    warnings.simplefilter("ignore", UserWarning)
    import megatron.core
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
    """An `Engine` over a model whose parameters are all fp32 and stay so, and the `PiecedState` of its optimizer.

    With `overlap`, gradients are exchanged while backward runs, and updated parameters are gathered while the next
    forward does: whoever reads parameters outside of `micro_batch` calls `settle` first.
    """

    def __init__(
        self,
        model: nn.Module,
        adam: Adam,
        groups: Groups,
        sharded: Collection[str] = (),
        *,
        blocks: Iterable[nn.Module] = (),
        overlap: bool = True,
        bucket_numel: int | None = None,
    ) -> None:
        """Moves parameters into Megatron's buffers; a collective of all ranks.

        Args:
            sharded: names of the parameters of which this rank holds a tensor-parallel shard.
            blocks: modules whose parameters nobody but their own `__call__` uses: forward waits for these at their door
                and for all others at its start.
            bucket_numel: entries of one exchange; None is Megatron's choice.
        """
        dtypes = {parameter.dtype for parameter in model.parameters()}
        assert dtypes == {torch.float32}, f"parameters must be fp32 (compute in bf16 is autocast), found {dtypes}"
        assert dist.is_initialized(), "megatron-core needs a process group, of one process too"
        self._parameters: dict[str, Tensor] = dict(model.named_parameters())
        for name, parameter in self._parameters.items():
            # Its gradient norm counts what is not marked on tensor-parallel rank 0 only.
            parameter.tensor_model_parallel = name in sharded  # type: ignore[attr-defined]
        collection = _collection(groups)
        # calculate_per_token_loss: gradients are summed and not averaged; losses are shares of the whole already.
        config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, calculate_per_token_loss=True)
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap,
            bucket_size=bucket_numel,
            check_for_nan_in_grad=overlap,  # has `check_grads` called before each exchange: see _note_norms
        )
        self._ddp = DistributedDataParallel(config, ddp, model, pg_collection=collection)
        self._optimizer = _optimizer(self._ddp, adam, collection, overlap=overlap)
        (dense,) = self._optimizer.chained_optimizers
        self._inner: torch.optim.Optimizer = dense.optimizer
        self._pieces, self._dp_cp, self._step = pieces(dense, self._parameters), groups.dp_cp, 0
        self._overlap, self._norms = overlap, dict[Any, Tensor]()
        self._first: list[Any] = list(self._ddp.bucket_groups)
        if overlap:
            self._note_norms()
            self._gather_block_by_block(model, blocks)

    @property
    def describe(self) -> str:
        """Which code this is, for the log."""
        adam = type(self._inner)
        return f"megatron-core {megatron.core.__version__}, {adam.__module__.partition('.')[0]}'s {adam.__name__}"

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """As of any torch optimizer: this rank's parts of the parameters."""
        groups: list[dict[str, Any]] = self._optimizer.param_groups
        return groups

    def _note_norms(self) -> None:
        """Put our own look at the gradients in the place of Megatron's, which ends the process it is in.

        It is called for each bucket before that is exchanged: afterwards nobody could tell whose number is not finite.
        """

        def look_at(group: Any) -> Callable[..., None]:
            def look(*, check_for_nan_or_inf: bool, check_for_large: bool) -> None:
                self._norms[group] = _norm(group)

            return look

        for group in self._ddp.bucket_groups:
            group.check_grads = look_at(group)

    def _gather_block_by_block(self, model: nn.Module, blocks: Iterable[nn.Module]) -> None:
        """Wait for gathered parameters where they are used.

        Megatron's own hooks wait in every module for its direct parameters, which misses those that are used without a
        call of their module: a tied head, a vocabulary-parallel embedding.
        """
        self._ddp.disable_forward_pre_hook(param_sync=False)
        inside: set[nn.Parameter] = set()

        def waits_for(waited: list[Any]) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any) -> None:
                _wait_for_gather(waited)

            return hook

        for block in blocks:
            parameters = set(block.parameters())
            block.register_forward_pre_hook(waits_for(self._bucket_groups_of(parameters)))
            inside |= parameters
        self._first = self._bucket_groups_of(set(model.parameters()) - inside)

    def _bucket_groups_of(self, parameters: set[nn.Parameter]) -> list[Any]:
        of_parameter = self._ddp.param_to_bucket_group
        return list(dict.fromkeys(of_parameter[parameter] for parameter in parameters))

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Forward and backward of one micro-batch; gradients are exchanged in that of the last."""
        _wait_for_gather(self._first)
        if last:
            yield
        else:
            with self._ddp.no_sync():
                yield

    def settle(self) -> None:
        _wait_for_gather(self._ddp.bucket_groups)

    def zero_grad(self) -> None:
        self._wait_for_sums()
        self._norms.clear()
        self._ddp.zero_grad_buffer()
        self._optimizer.zero_grad()

    def _wait_for_sums(self) -> None:
        """Let exchanges end that nobody will complete, since the step is left out."""
        for group in self._ddp.bucket_groups:
            if group.grad_reduce_handle is not None:
                group.grad_reduce_handle.wait()
                group.grad_reduce_handle = None

    def local_norm(self) -> float:
        """Of this rank's own gradients, noted before they were exchanged."""
        norms = [self._norms[g] if g in self._norms else _norm(g) for g in self._ddp.bucket_groups]
        return float(torch.linalg.vector_norm(torch.stack(norms)))

    def gradients(self) -> dict[str, Tensor]:
        self._wait_for_sums()
        return {name: parameter.main_grad for name, parameter in self._parameters.items()}  # type: ignore[attr-defined]

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
        self._step += 1
        if self._overlap:
            for group in reversed(self._ddp.bucket_groups):  # buckets begin at the model's end, forward at its start
                group.start_param_sync()

    def collect_state(self) -> dict[str, Tensor]:
        if self._step == 0:
            return {}
        return collect(self._parameters, self._pieces, self._inner, self._step, self._dp_cp)

    def restore_state(self, tensors: Mapping[str, Tensor]) -> None:
        self._step = restore(self._parameters, self._pieces, self._inner, tensors)


def _norm(bucket_group: Any) -> Tensor:
    """Of the gradients in some buckets, padding included, which is zero; 0-d."""
    norms: list[Tensor] = [bucket.grad_data.norm() for bucket in bucket_group.buckets]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def _wait_for_gather(bucket_groups: Iterable[Any]) -> None:
    for group in bucket_groups:
        if group.param_gather_handle is not None:
            group.start_param_sync(force_sync=True)  # with a gather under way this waits for it and starts none


def _optimizer(ddp: DistributedDataParallel, adam: Adam, collection: ProcessGroupCollection, *, overlap: bool) -> Any:
    config = OptimizerConfig(
        optimizer="adam",
        lr=adam.lr,
        weight_decay=adam.weight_decay,
        adam_beta1=adam.betas[0],
        adam_beta2=adam.betas[1],
        adam_eps=adam.eps,
        use_distributed_optimizer=True,
        overlap_param_gather=overlap,
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
    (dense,) = optimizer.chained_optimizers
    for group in optimizer.param_groups:
        # Megatron's scheduler would apply the multiplier; without one all parameters would decay alike.
        group["weight_decay"] = adam.weight_decay * group["wd_mult"]
        if isinstance(dense.optimizer, torch.optim.AdamW):  # without transformer-engine; as the torch engine has it
            group["fused"] = True
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
