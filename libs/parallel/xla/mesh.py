"""The SPMD mesh of torch_xla, and cutting tensors over it. Imports torch_xla.

Which dimension is cut is `topology`'s and `libs.model.sharding`'s to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from torch import Tensor, nn

from libs.parallel.xla.topology import AXES, MeshShape, Partition, row_partition


class Mesh:
    """All XLA devices of the process as (data, fsdp, tensor)."""

    def __init__(self, shape: MeshShape) -> None:
        self.shape = shape
        self._mesh = xs.Mesh(np.arange(shape.chips), tuple(shape), AXES)
        # Where libs.kernels.chunk_loop finds it.
        xs.set_global_mesh(self._mesh)

    def cut(self, tensor: Tensor, partition: Partition) -> None:
        """Share a tensor out. One that is shared out already is left alone: it cannot be done twice."""
        if tensor.device.type == "xla" and not _is_cut(tensor):
            xs.mark_sharding(tensor, self._mesh, partition)

    def words(self, partition: Partition) -> xs.ShardingSpec:
        """torch_xla's words for a partition, for tensors that are cut as they are sent."""
        return xs.ShardingSpec(self._mesh, partition)

    def cut_parameters(self, model: nn.Module, partitions: Mapping[str, Partition]) -> None:
        """Share out every parameter."""
        for name, parameter in model.named_parameters():
            self.cut(parameter, partitions[name])

    def keep_rows(self, modules: Iterable[nn.Module]) -> None:
        """Tell XLA, at the entry of each module, that its first argument (rows, ...) and that one's gradient are cut by
        rows. Without it XLA is free to cut activations as the parameters are, and to move them at every step of a loop.
        """
        constrain = _RowConstraint(self._mesh, self.shape)
        for module in modules:
            module.register_forward_pre_hook(constrain)


class _RowConstraint:
    """The hook of `Mesh.keep_rows`. stateless: it may be traced once for many modules (`homogeneous`)."""

    stateless = True

    def __init__(self, mesh: xs.Mesh, shape: MeshShape) -> None:
        self._mesh, self._shape = mesh, shape

    def __call__(self, _module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = arguments
        partition = row_partition(x.dim(), x.shape[0], self._shape)
        if partition[0] is None or x.device.type != "xla":
            return arguments
        return (xs.mark_sharding_with_gradients(x, self._mesh, partition), *rest)


def open_mesh(shape: MeshShape) -> Mesh:
    """Switch the process to SPMD, before its first tensor, and lay a mesh over all devices."""
    xr.use_spmd()
    return Mesh(shape)


def _is_cut(tensor: Tensor) -> bool:
    return bool(sharding_of(tensor))


def sharding_of(tensor: Tensor) -> str:
    """HLO's words for how a tensor is cut; "" when it is not."""
    import torch_xla

    return str(torch_xla._XLAC._get_xla_sharding_spec(tensor))
