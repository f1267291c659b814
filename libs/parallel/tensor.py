"""Tensor parallelism: the four differentiable moves into and out of a layer whose weights are sharded.

A layer is column-parallel, then row-parallel: `enter` before its first matrix product, `leave` after its last. Every
rank computes the same loss, so what is whole in forward has its gradient summed in backward, and the reverse
(Shoeybi et al. 2019). Not for which weight is cut how (see `libs.model.sharding`).
"""
# B sequences  S tokens  s tokens of one rank  D hidden  V vocabulary  v vocabulary of one rank

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from libs.parallel.mesh import Group, Parallel
from libs.parallel.sequence import gather_tokens, reduce_scatter_tokens


class _Copy(torch.autograd.Function):
    """Forward: the tensor itself. Backward: the gradients of all ranks, summed in fp32 or better."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, wide: bool) -> Tensor:
        ctx.group, ctx.wide = group, wide
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        dtype = torch.promote_types(grad.dtype, torch.float32) if ctx.wide else grad.dtype
        summed = ctx.group.all_reduce_(grad.to(dtype, copy=True, memory_format=torch.contiguous_format))
        return summed.to(grad.dtype), None, None


class _Reduce(torch.autograd.Function):
    """Forward: the tensors of all ranks, summed. Backward: the gradient itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return group.all_reduce_(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherColumns(torch.autograd.Function):
    """Forward: last axes of all ranks, joined. Backward: this rank's part, for a gradient equal on all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.all_gather(x).movedim(0, -2).flatten(-2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.chunk(ctx.group.size, dim=-1)[ctx.group.rank], None


def copy_to(x: Tensor, group: Group) -> Tensor:
    """Hand a whole tensor to ranks that each use it for their own shard: its gradient is summed over the group."""
    out: Tensor = x if group.size == 1 else _Copy.apply(x, group, False)  # type: ignore[no-untyped-call]
    return out


def reduce_from(x: Tensor, group: Group) -> Tensor:
    """Sum partial results of all ranks into a whole tensor."""
    out: Tensor = x if group.size == 1 else _Reduce.apply(x, group)  # type: ignore[no-untyped-call]
    return out


def gather_columns(x: Tensor, group: Group) -> Tensor:
    """(..., n / size) -> (..., n), when every rank goes on to compute the same."""
    out: Tensor = x if group.size == 1 else _GatherColumns.apply(x, group)  # type: ignore[no-untyped-call]
    return out


def sum_gradient(parameter: Tensor, group: Group | None) -> Tensor:
    """A replicated parameter of which each rank sees a part of the gradient: the parts are summed in backward.

    Without it replicas drift apart, silently. Summed inside the graph, so that no engine has to know and none can
    forget; in fp32 or better, one collective per use. `None`: the gradient is whole on every rank already.
    """
    if group is None or group.size == 1:
        return parameter
    out: Tensor = _Copy.apply(parameter, group, True)  # type: ignore[no-untyped-call]
    return out


def enter(x: Tensor, parallel: Parallel | None, seq_len: int) -> Tensor:
    """Before a column-parallel product: (B, S or s, D) between layers -> (B, S, D) whole on every rank."""
    if parallel is None:
        return x
    return gather_tokens(x, parallel.tp, seq_len) if parallel.shards_tokens else copy_to(x, parallel.tp)


def leave(x_BSD: Tensor, parallel: Parallel | None) -> Tensor:
    """After a row-parallel product: this rank's partial (B, S, D) -> the sum, (B, S or s, D) as between layers."""
    if parallel is None:
        return x_BSD
    return reduce_scatter_tokens(x_BSD, parallel.tp) if parallel.shards_tokens else reduce_from(x_BSD, parallel.tp)


def whole_tokens(x: Tensor, parallel: Parallel | None, seq_len: int) -> Tensor:
    """(B, S or s, D) between layers -> (B, S, D), when every rank goes on to compute the same from it."""
    if parallel is None or not parallel.shards_tokens:
        return x
    return gather_tokens(x, parallel.tp, seq_len, same_use=True)


def vocab_parallel_embedding(tokens_BS: Tensor, weight_vD: Tensor, parallel: Parallel) -> Tensor:
    """Look up ids in a table of which every rank holds V / size consecutive rows; result as between layers."""
    tp = parallel.tp
    if tp.size == 1:
        return F.embedding(tokens_BS, weight_vD)
    local_BS = tokens_BS - tp.rank * weight_vD.shape[0]
    own_BS = (local_BS >= 0) & (local_BS < weight_vD.shape[0])
    found_BSD = F.embedding(torch.where(own_BS, local_BS, 0), weight_vD)
    return leave(torch.where(own_BS[..., None], found_BSD, 0), parallel)


def total_gradient_norm(gradients: Iterable[tuple[Tensor, bool]], group: Group) -> Tensor:
    """2-norm of the whole model's gradient, fp32 and equal on every rank.

    Args:
        gradients: (gradient, whether it is this rank's shard) of every parameter; a replicated one counts once.
    """
    sharded: list[Tensor] = []
    whole: list[Tensor] = []
    for gradient, is_shard in gradients:
        (sharded if is_shard else whole).append(gradient)
    of_shards = torch.nn.utils.get_total_norm(sharded).float().square()
    of_whole = torch.nn.utils.get_total_norm(whole).float().square()
    return (group.all_reduce_(of_shards.contiguous()) + of_whole.to(of_shards.device)).sqrt()
