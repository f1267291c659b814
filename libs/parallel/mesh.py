"""The parallel layout (dp, cp, tp) and its process groups: made once here, handed out explicitly, never global.

Not for starting processes (see `launch`) nor for differentiable collectives (see `tensor` and `sequence`): the
methods of a `Group` are plain, and nothing at all in a group of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import product
from typing import Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from libs.flags.errors import UserError

ReduceName = Literal["sum", "max"]
_SHOWN_LAYOUTS = 12


class KeyValueStore(Protocol):
    """The part of torch's rendezvous store that ranks talk through outside collectives."""

    def add(self, key: str, amount: int) -> int:
        """Raise a counter; its new value."""

    def set(self, key: str, value: str) -> None:
        """Make a value visible to every rank."""

    def get(self, key: str) -> bytes:
        """A value, waiting for it."""

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        """Return when every key is there. Raises torch.distributed.DistStoreError when one is late."""


class Layout(NamedTuple):
    """How many ways each dimension is split. Rank order: tp fastest, then cp, then dp.

    Attributes:
        dp: replicas that read other data. cp: slices of one sequence. tp: shards of one layer.
    """

    dp: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def world_size(self) -> int:
        """Processes this layout needs."""
        return self.dp * self.cp * self.tp

    def __str__(self) -> str:
        return f"dp={self.dp} cp={self.cp} tp={self.tp}"


def legal_layouts(world_size: int) -> Iterator[Layout]:
    """Every layout of exactly `world_size` processes, small tp and cp first."""
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    for tp, cp in product(divisors, divisors):
        if world_size % (tp * cp) == 0:
            yield Layout(world_size // (tp * cp), cp, tp)


def check_layout(layout: Layout, world_size: int) -> None:
    """Refuse a layout whose product is not the number of processes.

    Raises:
        UserError: names the numbers, and the layouts that would be legal.
    """
    if min(layout) >= 1 and layout.world_size == world_size:
        return
    legal = [str(candidate) for candidate in legal_layouts(world_size)]
    more = f"; and {len(legal) - _SHOWN_LAYOUTS} more" if len(legal) > _SHOWN_LAYOUTS else ""
    why = (
        f"dp*cp*tp = {layout.dp}*{layout.cp}*{layout.tp} = {layout.world_size} processes, but there are {world_size}"
        if min(layout) >= 1
        else "dp, cp and tp must each be at least 1"
    )
    raise UserError(
        f"parallel layout {layout}: {why}; legal for {world_size}: {'; '.join(legal[:_SHOWN_LAYOUTS])}{more}"
    )


@dataclass(frozen=True, eq=False)
class Group:
    """Some ranks of the world that work together on one dimension of the layout.

    Attributes:
        process_group: torch's handle, None exactly when `size` is 1.
        rank, size: of this process inside the group.
        members: global ranks in group order.
    """

    process_group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1
    members: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        assert (self.process_group is None) == (self.size == 1), "a group of one has no process group"
        assert 0 <= self.rank < self.size == len(self.members), "rank and members must fit the size"

    def __deepcopy__(self, memo: dict[int, object]) -> Group:
        return self  # copying a model must not copy its connections

    def all_reduce_(self, tensor: Tensor, op: ReduceName = "sum") -> Tensor:
        """Combine `tensor` over the group in place (it must be contiguous); returns it."""
        if self.size > 1:
            kind = dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX
            dist.all_reduce(tensor, kind, group=self.process_group)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """(...) -> (size, ...): the tensor of every rank in group order; shapes must be equal."""
        if self.size == 1:
            return tensor[None]
        out = torch.empty((self.size, *tensor.shape), dtype=tensor.dtype, device=tensor.device)
        dist.all_gather_single(out.view(-1), tensor.contiguous().view(-1), group=self.process_group)
        return out

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        """(size, ...) -> (...): the sum over ranks of the row this rank owns."""
        assert tensor.shape[0] == self.size, f"one row per rank: {tuple(tensor.shape)} in a group of {self.size}"
        if self.size == 1:
            return tensor[0]
        out = torch.empty_like(tensor[0], memory_format=torch.contiguous_format)
        dist.reduce_scatter_single(out.view(-1), tensor.contiguous().view(-1), group=self.process_group)
        return out

    def barrier(self) -> None:
        """Wait until every rank of the group has come here."""
        if self.size > 1:
            dist.barrier(group=self.process_group)


@dataclass(frozen=True, eq=False)
class Groups:
    """This process's group in every dimension of one layout.

    Attributes:
        tp, cp, dp: ranks that differ from this one in that dimension only.
        dp_cp: ranks with this one's tp coordinate: those that hold the same parameters.
        world: all ranks.
        store: the rendezvous key-value store that `launch.agree` talks through; None in a single process.
    """

    layout: Layout
    tp: Group
    cp: Group
    dp: Group
    dp_cp: Group
    world: Group
    store: KeyValueStore | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> Groups:
        return self


@dataclass(frozen=True, eq=False)
class Parallel:
    """What a model needs to know: its groups, and whether tokens are sharded over tp between layers.

    sequence_parallel: norms and residuals work on S / tp tokens each (Korthikanti et al. 2022).
    """

    groups: Groups
    sequence_parallel: bool = False

    @property
    def tp(self) -> Group:
        """The tensor-parallel group."""
        return self.groups.tp

    @property
    def cp(self) -> Group:
        """The context-parallel group."""
        return self.groups.cp

    @property
    def shards_tokens(self) -> bool:
        """Whether hidden states between layers hold only this rank's tokens."""
        return self.sequence_parallel and self.groups.tp.size > 1


def single() -> Groups:
    """The groups of one process on its own; needs no torch.distributed."""
    alone = Group()
    return Groups(Layout(), alone, alone, alone, alone, alone)


def _partitions(layout: Layout) -> dict[str, list[list[int]]]:
    """For each kind of group, the global ranks of every group of that kind, in rank order."""
    ranks = torch.arange(layout.world_size).view(layout)
    kinds = {"tp": ranks.reshape(-1, layout.tp), "cp": ranks.movedim(1, -1).reshape(-1, layout.cp)}
    kinds["dp"] = ranks.movedim(0, -1).reshape(-1, layout.dp)
    kinds["dp_cp"] = ranks.movedim(-1, 0).reshape(layout.tp, -1)
    return {kind: rows.tolist() for kind, rows in kinds.items()}


def open_groups(layout: Layout, backend: str, timeout: timedelta, *, store: KeyValueStore | None = None) -> Groups:
    """Make every group of the layout. All ranks call this together, after `launch.connect`.

    Args:
        backend: torch's name: "gloo", "nccl", or "cpu:gloo,cuda:nccl" for both.
        timeout: of every collective; a peer that is gone shows after it.

    Raises:
        UserError: the layout does not fit the number of processes.
    """
    if not dist.is_initialized():
        check_layout(layout, 1)
        return single()
    world_size, me = dist.get_world_size(), dist.get_rank()
    check_layout(layout, world_size)
    mine: dict[str, Group] = {}
    for kind, rows in _partitions(layout).items():
        for row in rows:
            # new_group is a collective of the whole world: every rank makes every group, in one order.
            handle = dist.new_group(row, timeout=timeout, backend=backend) if len(row) > 1 else None
            if me in row:
                mine[kind] = Group(handle, row.index(me), len(row), tuple(row))
    everyone = tuple(range(world_size))
    world = Group(dist.group.WORLD if world_size > 1 else None, me, world_size, everyone)
    return Groups(layout, mine["tp"], mine["cp"], mine["dp"], mine["dp_cp"], world, store)
