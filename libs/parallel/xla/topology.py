"""TPU slices by name and what is known of their chips; how a mesh of three axes lies on them. No torch_xla here.

Sources: docs.cloud.google.com/tpu/docs/v6e (peak, memory, bandwidth); what libtpu says when a program does not fit (the
bytes it hands out); the clock is inferred from the peak and the cycles libtpu states for a large matrix product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from libs.flags.errors import UserError


class Chip(NamedTuple):
    """usable_bytes: what a program can have of its HBM. peak: bf16 FLOP/s; clock: Hz, inferred."""

    name: str
    usable_bytes: int
    peak_bf16: float
    bandwidth: float
    clock: float


class Topology(NamedTuple):
    """libtpu_name: what libtpu calls the smallest slice that has these chips."""

    name: str
    chips: int
    libtpu_name: str
    chip: Chip


V6E = Chip("TPU v6e", 33_822_867_456, 918e12, 1638e9, 1.75e9)
TOPOLOGIES: Mapping[str, Topology] = {
    # libtpu knows no slice of one chip: one device of four is used.
    "v6e-1": Topology("v6e-1", 1, "v6e:2x2", V6E),
    "v6e-4": Topology("v6e-4", 4, "v6e:2x2", V6E),
    "v6e-8": Topology("v6e-8", 8, "v6e:2x4", V6E),
}
AXES = ("data", "fsdp", "tensor")
# An entry of a partition: one axis, several axes (major first), or None where a dimension is not cut.
Partition = tuple[str | tuple[str, ...] | None, ...]


def topology(name: str) -> Topology:
    """The slice of that name. Raises UserError listing the known ones."""
    if name not in TOPOLOGIES:
        raise UserError.unknown("TPU topology", name, TOPOLOGIES)
    return TOPOLOGIES[name]


def slice_of(chips: int) -> Topology:
    """The slice of so many chips. Raises UserError listing the known ones."""
    for found in TOPOLOGIES.values():
        if found.chips == chips:
            return found
    known = ", ".join(f"{one.name} ({one.chips})" for one in TOPOLOGIES.values())
    raise UserError(f"no TPU slice of {chips} chips is known: xla.data * xla.fsdp * xla.tensor must be one of {known}")


class MeshShape(NamedTuple):
    """How many ways each axis cuts: data (whole parameters on every chip), fsdp (parameters and rows), tensor."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    @property
    def chips(self) -> int:
        return self.data * self.fsdp * self.tensor

    def size(self, entry: str | tuple[str, ...] | None) -> int:
        """Into how many parts an entry of a partition cuts its dimension."""
        if entry is None:
            return 1
        total = 1
        for axis in (entry,) if isinstance(entry, str) else entry:
            total *= int(getattr(self, axis))
        return total


def parameter_partition(shape: Sequence[int], tensor_dim: int | None, mesh: MeshShape) -> Partition:
    """How one parameter is cut: `tensor_dim` over tensor, the longest other dimension that divides over fsdp.

    tensor_dim: the axis that `libs.model.sharding` cuts, None for a replicated parameter. A dimension that an axis does
    not divide stays whole: every program remains right, it only holds more.
    """
    partition: list[str | tuple[str, ...] | None] = [None] * len(shape)
    if tensor_dim is not None and mesh.tensor > 1 and shape[tensor_dim] % mesh.tensor == 0:
        partition[tensor_dim] = "tensor"
    free = [dim for dim in range(len(shape)) if partition[dim] is None and shape[dim] % mesh.fsdp == 0]
    if mesh.fsdp > 1 and free:
        partition[max(free, key=lambda dim: (shape[dim], -dim))] = "fsdp"
    return tuple(partition)


def row_partition(dims: int, rows: int, mesh: MeshShape) -> Partition:
    """How a batch (rows, ...) is cut: rows over data and fsdp, if they divide."""
    cut = rows % (mesh.data * mesh.fsdp) == 0 and mesh.data * mesh.fsdp > 1
    return (("data", "fsdp") if cut else None, *(None,) * (dims - 1))


def op_sharding(partition: Partition, mesh: MeshShape) -> str:
    """The same in HLO's words, over devices 0 .. chips-1 in the order of AXES: "{devices=[4,1]<=[4]}" and the like."""
    cuts = [mesh.size(entry) for entry in partition]
    if all(cut == 1 for cut in cuts):
        return "{replicated}"
    used = [axis for entry in partition if entry for axis in ((entry,) if isinstance(entry, str) else entry)]
    left = [axis for axis in AXES if axis not in used]
    rest = mesh.size(tuple(left))
    order = [AXES.index(axis) for axis in (*used, *left)]
    source = ",".join(str(size) for size in mesh)
    devices = f"[{source}]" if order == [0, 1, 2] else f"[{source}]T({','.join(map(str, order))})"
    dims = ",".join(str(cut) for cut in (*cuts, *((rest,) if rest > 1 else ())))
    tail = " last_tile_dim_replicate" if rest > 1 else ""
    return f"{{devices=[{dims}]<={devices}{tail}}}"
