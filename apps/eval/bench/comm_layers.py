"""One layer's scan on a row that is cut over ranks, in two ways: state hand-over, and all-to-all over heads.

All-to-all is what Megatron-core does for its Mamba layers under context parallelism: tokens are traded for heads, every
rank scans the whole row for its heads, and the outputs are traded back. It is here to be measured against, no more.
"""
# B sequences  S tokens of the whole row  s tokens of one rank  H heads  h heads of one rank  G groups  R rank  N state
# P head width  A rotary angles

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from apps.eval.bench.contenders import op_call
from apps.eval.bench.operands import Operands, Shape, make_operands
from libs.parallel.context import ContextShard, gather_row, mamba3_mimo_context
from libs.parallel.mesh import Group

TOKEN_AXIS = {
    "q_BSRGN": 1, "k_BSRGN": 1, "v_BSHP": 1, "adt_BHS": 2, "dt_BHS": 2, "trap_BHS": 2, "angles_BSHA": 1, "z_BSHP": 1,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class CountingGroup(Group):
    """A group that adds up the bytes this rank hands to other ranks, as if nothing were relayed in rings."""

    sent: list[int] = field(default_factory=list)

    def take(self) -> int:
        """The bytes since the last call."""
        total = sum(self.sent)
        self.sent.clear()
        return total

    def all_gather(self, tensor: Tensor) -> Tensor:
        self.sent.append((self.size - 1) * tensor.numel() * tensor.element_size())
        return super().all_gather(tensor)

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        self.sent.append((self.size - 1) * tensor[0].numel() * tensor.element_size())
        return super().reduce_scatter(tensor)

    def all_to_all(self, rows: Tensor) -> Tensor:
        """(size, ...): row i goes to rank i, and what comes back is row i from rank i."""
        self.sent.append((self.size - 1) * rows[0].numel() * rows.element_size())
        out = torch.empty_like(rows, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, rows.contiguous(), group=self.process_group)
        return out


_Exchange = Callable[[Tensor, CountingGroup], Tensor]


class _Traded(torch.autograd.Function):
    """`there` and `back` undo each other and only move numbers: the gradient of either is the other."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, group: CountingGroup, there: _Exchange, back: _Exchange) -> Tensor:
        ctx.group, ctx.back = group, back
        return there(u, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back(grad, ctx.group), None, None, None


def _to_heads(u_BsHx: Tensor, group: CountingGroup) -> Tensor:
    """(B,s,H,x) of my tokens -> (B,S,h,x) of my heads."""
    B, s, H, x = u_BsHx.shape
    rows = group.all_to_all(u_BsHx.reshape(B, s, group.size, H // group.size, x).movedim(2, 0))
    return rows.movedim(0, 1).flatten(1, 2)


def _to_tokens(u_BShx: Tensor, group: CountingGroup) -> Tensor:
    """(B,S,h,x) of my heads -> (B,s,H,x) of my tokens."""
    B, S, h, x = u_BShx.shape
    rows = group.all_to_all(u_BShx.reshape(B, group.size, S // group.size, h, x).movedim(1, 0))
    return rows.movedim(0, 2).flatten(2, 3)


def layer_operands(shape: Shape, *, seed: int, dtype: torch.dtype = torch.float32) -> Operands:
    """Seeded operands in which all heads share the angles, as a mixer's angle projection makes them."""
    whole = make_operands(shape, seed=seed, dtype=dtype)
    return whole._replace(angles_BSHA=whole.angles_BSHA[:, :, :1].expand(-1, -1, shape.H, -1))


def slice_of(whole: Operands, shard: ContextShard) -> Operands:
    """A rank's tokens, as leaves of their own memory; parameters are whole."""
    parts = {name: shard.cut(getattr(whole, name), dim).clone() for name, dim in TOKEN_AXIS.items()}
    return whole._replace(**parts)


def hand_over_call(mine: Operands, shape: Shape, shard: ContextShard, *, chunk_size: int) -> Tensor:
    """(B,s,H,P): every rank scans its tokens."""
    return mamba3_mimo_context(*mine, chunk_size, shape.divisor, mine.v_BSHP.dtype, shard=shard)


def exchange_in(mine: Operands, shape: Shape, shard: ContextShard) -> Operands:
    """Whole rows of this rank's heads. What all heads share (q, k with one group; angles) is gathered instead."""
    group = shard.group
    assert isinstance(group, CountingGroup)
    assert shape.G == 1, "operands of one group are shared by all heads"
    assert shape.H % group.size == 0, "every rank takes as many heads"
    heads = shape.H // group.size
    by_head = [mine.v_BSHP, mine.z_BSHP]
    by_head += [u.transpose(1, 2).unsqueeze(-1) for u in (mine.adt_BHS, mine.dt_BHS, mine.trap_BHS)]
    widths = [u.shape[-1] for u in by_head]
    traded: Tensor = _Traded.apply(torch.cat(by_head, dim=-1), group, _to_heads, _to_tokens)  # type: ignore[no-untyped-call]
    v, z, adt, dt, trap = torch.split(traded, widths, dim=-1)
    shared = [mine.q_BSRGN.flatten(2), mine.k_BSRGN.flatten(2), mine.angles_BSHA[:, :, 0]]
    q, k, angles = torch.split(gather_row(torch.cat(shared, dim=-1), shard), [u.shape[-1] for u in shared], dim=-1)
    mine_only = slice(group.rank * heads, (group.rank + 1) * heads)
    params = {name: getattr(mine, name)[mine_only] for name in Operands._fields if name not in TOKEN_AXIS}
    ranks = (shape.R, shape.G, shape.N)
    return Operands(
        q_BSRGN=q.reshape(*q.shape[:2], *ranks), k_BSRGN=k.reshape(*k.shape[:2], *ranks), v_BSHP=v, z_BSHP=z,
        adt_BHS=adt[..., 0].transpose(1, 2), dt_BHS=dt[..., 0].transpose(1, 2), trap_BHS=trap[..., 0].transpose(1, 2),
        angles_BSHA=angles.unsqueeze(2).expand(-1, -1, heads, -1), **params,
    )  # fmt: skip


def exchange_out(y_BShP: Tensor, group: Group) -> Tensor:
    """Outputs of this rank's heads -> of its tokens."""
    out: Tensor = _Traded.apply(y_BShP, group, _to_tokens, _to_heads)  # type: ignore[no-untyped-call]
    return out


def all_to_all_call(mine: Operands, shape: Shape, shard: ContextShard, *, chunk_size: int) -> Tensor:
    """(B,s,H,P): every rank scans its heads over the whole row."""
    local = exchange_in(mine, shape, shard)
    return exchange_out(op_call(local, shape, chunk_size=chunk_size), shard.group)
