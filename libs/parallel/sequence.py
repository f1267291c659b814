"""Sequence parallelism: between layers each tensor-parallel rank holds S / size tokens, so norms and residuals do too.

An all-reduce splits into a reduce-scatter and an all-gather of the same bytes (Korthikanti et al. 2022). A length that
does not divide is padded with zero rows at the end, which are dropped again before anything looks at them.
Not context parallelism: there the layers themselves work on slices.
"""
# B sequences  S tokens  s tokens of one rank (the last ranks' may be padding)  D hidden, one axis or several

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from libs.parallel.mesh import Group


def _rows(x_BSD: Tensor, size: int) -> Tensor:
    """(B, S, D) -> (size, B, s, D), zeros past the end."""
    per_rank = -(-x_BSD.shape[1] // size)
    padded = F.pad(x_BSD, (*(0, 0) * (x_BSD.dim() - 2), 0, per_rank * size - x_BSD.shape[1]))
    return padded.view(padded.shape[0], size, per_rank, *padded.shape[2:]).movedim(1, 0)


def _joined(rows: Tensor, seq_len: int) -> Tensor:
    """(size, B, s, D) -> (B, S, D), padding dropped."""
    return rows.movedim(0, 1).flatten(1, 2)[:, :seq_len].contiguous()


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x_BsD: Tensor, group: Group, seq_len: int, same_use: bool) -> Tensor:
        ctx.group, ctx.same_use = group, same_use
        return _joined(group.all_gather(x_BsD), seq_len)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSD: Tensor) -> tuple[Tensor, None, None, None]:
        rows = _rows(grad_BSD, ctx.group.size)
        grad = rows[ctx.group.rank].contiguous() if ctx.same_use else ctx.group.reduce_scatter(rows)
        return grad, None, None, None


class _ReduceScatter(Function):
    @staticmethod
    def forward(ctx: Any, x_BSD: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.seq_len = group, x_BSD.shape[1]
        return group.reduce_scatter(_rows(x_BSD, group.size))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BsD: Tensor) -> tuple[Tensor, None]:
        return _joined(ctx.group.all_gather(grad_BsD), ctx.seq_len), None


def gather_tokens(x_BsD: Tensor, group: Group, seq_len: int, *, same_use: bool = False) -> Tensor:
    """(B, s, D) of every rank -> (B, S, D).

    same_use: False when each rank uses the result for its own shard (gradients are summed: reduce-scatter), True when
    all ranks compute the same from it (gradients are equal: each takes its part).
    """
    if group.size == 1:
        return x_BsD
    out: Tensor = _Gather.apply(x_BsD, group, seq_len, same_use)  # type: ignore[no-untyped-call]
    return out


def reduce_scatter_tokens(x_BSD: Tensor, group: Group) -> Tensor:
    """Partial sums (B, S, D) of every rank -> this rank's tokens of their sum, (B, s, D)."""
    out: Tensor = x_BSD if group.size == 1 else _ReduceScatter.apply(x_BSD, group)  # type: ignore[no-untyped-call]
    return out
