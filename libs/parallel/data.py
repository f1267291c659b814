"""Data parallelism in plain torch: gradients summed over the ranks that hold the same parameters, and one global norm.

Sums, not means: the loss of each rank is already its share of the whole batch's (divided by global counts of targets).
Not for Megatron's engine (`megatron_engine`), nor for gradients of replicated parameters over tp, which the graph sums.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from libs.parallel.mesh import Group, Groups
from libs.parallel.tensor import total_gradient_norm

# Large enough that latency does not count, small enough that the copy is not noticed beside the gradients.
BUCKET_BYTES = 25 * 2**20


class Engine(Protocol):
    """Who owns gradients and the update; the loop is the same for all."""

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of each micro-batch."""

    def local_norm(self) -> float:
        """2-norm of what this rank holds before anything is exchanged: not finite where something broke here."""

    def reduce(self) -> Tensor:
        """Complete the gradients over all ranks; the norm of the whole model's gradient, equal on every rank."""

    def gradients(self) -> Mapping[str, Tensor]:
        """This rank's gradients by parameter name, for a report of a step that is left out."""

    def update(self, *, rate: float, clip_norm: float | None, norm: Tensor) -> None:
        """Clip to `clip_norm` and let the optimizer move the weights. `norm`: what `reduce` returned."""

    def settle(self) -> None:
        """Complete what the last update left under way: before weights are read outside of a micro-batch."""


class PiecedState(Protocol):
    """Optimizer state of which the ranks of `dp_cp` hold pieces of parameters that no other layout could read.

    Keys are "<part>/<parameter name>" with the parts "step", "exp_avg" and "exp_avg_sq"; tensors are of whole
    parameters, those of one tensor-parallel rank.
    """

    def collect_state(self) -> dict[str, Tensor]:
        """This rank's share of all parameters' state, on the host; empty before the first update. A collective."""

    def restore_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the pieces this rank holds out of all parameters' state. No collective."""

    @property
    def names(self) -> Collection[str]:
        """Of all parameters, as checkpoints have them: those of `HybridLM`, whatever the model's own are."""

    @property
    def owns_weights(self) -> bool:
        """Whether the weights of a checkpoint are to be had here, in fp32, and not from the model's parameters."""

    def collect_weights(self) -> dict[str, Tensor]:
        """All parameters in fp32, on the host of the first rank that holds them, empty on others. A collective."""

    def restore_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Take weights of a checkpoint: the pieces held here, and the model's parameters. A collective."""


def buckets(tensors: Sequence[Tensor], limit: int = BUCKET_BYTES) -> Iterator[list[Tensor]]:
    """Consecutive tensors of one dtype and device, at most `limit` bytes together (or one larger tensor)."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        alike = not bucket or (bucket[0].dtype, bucket[0].device) == (tensor.dtype, tensor.device)
        if bucket and (not alike or size + nbytes > limit):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += nbytes
    if bucket:
        yield bucket


def sum_gradients(parameters: Sequence[Tensor], group: Group) -> None:
    """Add up `.grad` over the group in place; the same order of additions, and so the same bits, on every rank.

    A parameter without a gradient on this rank takes part with zeros: whether one has a gradient may depend on data.
    """
    if group.size == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for bucket in buckets(gradients):
        flat = group.all_reduce_(torch.cat([gradient.flatten() for gradient in bucket]))
        parts = torch.split(flat, [gradient.numel() for gradient in bucket])
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


class TorchEngine:
    """Any torch optimizer over parameters that every rank of `dp_cp` holds alike. In one process: plain PyTorch."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, groups: Groups, sharded: Collection[str] = ()
    ) -> None:
        """sharded: names of the parameters of which this rank holds a tensor-parallel shard."""
        self._named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._optimizer, self._groups, self._sharded = optimizer, groups, frozenset(sharded)

    def zero_grad(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def local_norm(self) -> float:
        return float(torch.nn.utils.get_total_norm(p.grad for _, p in self._named if p.grad is not None))

    def reduce(self) -> Tensor:
        sum_gradients([p for _, p in self._named], self._groups.dp_cp)
        if self._groups.tp.size == 1:
            return torch.nn.utils.get_total_norm(p.grad for _, p in self._named if p.grad is not None)
        pairs = [(p.grad, name in self._sharded) for name, p in self._named if p.grad is not None]
        return total_gradient_norm(pairs, self._groups.tp)

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self._named if p.grad is not None}

    def update(self, *, rate: float, clip_norm: float | None, norm: Tensor) -> None:
        if clip_norm is not None:
            with_gradient = [p for _, p in self._named if p.grad is not None]
            torch.nn.utils.clip_grads_with_norm_(with_gradient, clip_norm, norm)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()

    def settle(self) -> None:
        """Nothing: an update is complete when it returns."""
