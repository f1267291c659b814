"""Data parallelism by megatron-core 0.16.1: its DistributedDataParallel and DistributedOptimizer around our model.

Gradients are reduce-scattered in fp32 while backward runs; each rank of `dp_cp` updates its part of the parameters, and
gathers the others' while the next forward runs: in fp32, or those of large linears in FP8 (`fp8`). CUDA only, since
megatron-core asks for the device by name; its logic is tested on gloo through a facade that lives with the tests. Not
for tensor parallelism (`tensor`) nor for what Megatron is told (`megatron_setup`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from libs.parallel.fp8 import Fp8Weights
from libs.parallel.fp8_built import FirstUpdate, expected, refuse_unless_built
from libs.parallel.megatron_buckets import complete_fp8, norm_of, wait_for_gather
from libs.parallel.megatron_setup import Adam, build_optimizer, collection_of, ddp_config, transformer_config
from libs.parallel.megatron_state import Whole, collect, collect_weights, pieces, restore, restore_weights
from libs.parallel.mesh import Groups

with warnings.catch_warnings():
    # As in `megatron_setup`.
    warnings.simplefilter("ignore", UserWarning)
    import megatron.core
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32


class MegatronEngine:
    """An `Engine` over a model, and the `PiecedState` of its optimizer. Parameters are fp32 and stay so, but for those
    that `fp8` names: of these the optimizer has the values in fp32, and checkpoints get and give those.

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
        fp8: Fp8Weights | None = None,
    ) -> None:
        """Moves parameters into Megatron's buffers; a collective of all ranks.

        Args:
            sharded: names (as checkpoints have them) of the parameters of which this rank holds a tensor-parallel
                shard.
            blocks: modules whose parameters nobody but their own `__call__` uses: forward waits for these at their door
                and for all others at its start.
            bucket_numel: entries of one exchange; None is Megatron's choice.
            fp8: of a model that has FP8 parameters.

        Raises:
            GateRefused: the model does not have the FP8 parameters that it should.
        """
        asked = None if fp8 is None else fp8.asked
        _check_dtypes(model, frozenset[str]() if fp8 is None else fp8.names)
        assert dist.is_initialized(), "megatron-core needs a process group, of one process too"
        named = dict(model.named_parameters())
        parts = {name: (name,) for name in named} if fp8 is None else fp8.parts
        self._wholes = {whole: Whole([named[name] for name in names]) for whole, names in parts.items()}
        for name, whole in self._wholes.items():
            for parameter in whole.parts:
                # Its gradient norm counts what is not marked on tensor-parallel rank 0 only.
                parameter.tensor_model_parallel = name in sharded  # type: ignore[attr-defined]
        self._model, self._parameters, self._fp8, collection = model, named, asked, collection_of(groups)
        config = ddp_config(asked, overlap=overlap, bucket_numel=bucket_numel)
        self._ddp = DistributedDataParallel(transformer_config(asked), config, model, pg_collection=collection)
        if fp8 is not None:
            wanted = expected(fp8.names, fp8.asked.recipe)
            refuse_unless_built(model, self._ddp.buffers, wanted, fp8.asked.word, before_optimizer=True)
        self._optimizer = build_optimizer(self._ddp, adam, asked, collection, overlap=overlap)
        (self._dense,) = self._optimizer.chained_optimizers
        self._inner: torch.optim.Optimizer = self._dense.optimizer
        self._pieces, self._dp_cp, self._step = pieces(self._dense, self._wholes), groups.dp_cp, 0
        self._overlap, self._norms = overlap, dict[Any, Tensor]()
        self._first: list[Any] = list(self._ddp.bucket_groups)
        if overlap:
            self._note_norms()
            self._gather_block_by_block(model, blocks)
        if fp8 is not None:
            self.restore_weights(fp8.initial)

    @property
    def describe(self) -> str:
        """Which code this is, for the log."""
        adam = type(self._inner)
        return f"megatron-core {megatron.core.__version__}, {adam.__module__.partition('.')[0]}'s {adam.__name__}"

    @property
    def names(self) -> Collection[str]:
        """Of the parameters, as checkpoints have them."""
        return self._wholes.keys()

    @property
    def owns_weights(self) -> bool:
        """Whether the model's parameters are less than what a checkpoint is to hold."""
        return self._fp8 is not None

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
                self._norms[group] = norm_of(group)

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
                wait_for_gather(waited)

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
        wait_for_gather(self._first)
        if last:
            yield
        else:
            with self._ddp.no_sync():
                yield

    def settle(self) -> None:
        wait_for_gather(self._ddp.bucket_groups)

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
        norms = [self._norms[g] if g in self._norms else norm_of(g) for g in self._ddp.bucket_groups]
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
        return collect(self._wholes, self._pieces, self._inner, self._step, self._dp_cp)

    def restore_state(self, tensors: Mapping[str, Tensor]) -> None:
        self._step = restore(self._wholes, self._pieces, self._inner, tensors)

    def collect_weights(self) -> dict[str, Tensor]:
        return collect_weights(self._wholes, self._pieces, self._dp_cp, keep=self._dp_cp.rank == 0)

    @torch.no_grad()
    def restore_weights(self, tensors: Mapping[str, Tensor]) -> None:
        restore_weights(self._wholes, self._pieces, tensors)
        # From here on as after an update: each rank quantises its pieces, and all gather them.
        self._dense._copy_main_params_to_model_params()
        for group in self._ddp.bucket_groups:
            group.start_param_sync(force_sync=True)
            complete_fp8(group)

    def first_update(self) -> FirstUpdate | None:
        """A look at the FP8 parameters before the first update of an attempt; None where there are none."""
        return None if self._fp8 is None else FirstUpdate(self._model, self._dp_cp, self._fp8)


def _check_dtypes(model: nn.Module, fp8: Collection[str]) -> None:
    dtypes = {parameter.dtype for name, parameter in model.named_parameters() if name not in fp8}
    assert dtypes == {torch.float32}, f"parameters must be fp32 (compute in bf16 is autocast), found {dtypes}"
