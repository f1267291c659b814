"""What a mixer needs to be a layer of Megatron-core's `MambaModel`: its spec, its groups, its checkpoint entries.

Not the mixer itself, which this layer may not know: see `libs.model.megatron`. Written against megatron-core 0.16.1.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from libs.flags.errors import UserError
from libs.parallel.mesh import Group, Groups, Layout, Parallel

with warnings.catch_warnings():
    # Importing megatron.core warns about optional CUDA packages that a mixer of our own does not use.
    warnings.simplefilter("ignore", UserWarning)
    from megatron.core.ssm.mamba_mixer import _split_tensor_factory as split_tensor_factory
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint


class ShardedParameter(NamedTuple):
    """Axis along which a parameter is cut over tp, and its packed segments on this rank: (key, width)."""

    dim: int
    segments: tuple[tuple[str, int], ...]


def module_spec(module: type[nn.Module], params: Mapping[str, Any]) -> Any:
    """Megatron's `ModuleSpec` that builds `module(config, ..., **params)`."""
    return ModuleSpec(module=module, params=dict(params))


def _group(handle: dist.ProcessGroup) -> Group:
    if handle.size() == 1:
        return Group()
    return Group(handle, handle.rank(), handle.size(), tuple(dist.get_process_group_ranks(handle)))


def parallel_of(transformer_config: Any, pg_collection: Any) -> Parallel:
    """Our view of Megatron's groups: tp, and whether hidden states are sharded over it.

    Raises:
        UserError: context parallelism, whose slices Megatron cuts in another order than the scan can hand over.
    """
    cp = getattr(pg_collection, "cp", None)
    if cp is not None and cp.size() > 1:
        raise UserError(f"context_parallel_size={cp.size()}: inside MambaModel the mixer runs with 1 only")
    tp, alone = _group(pg_collection.tp), Group()
    groups = Groups(Layout(tp=tp.size), tp=tp, cp=alone, dp=alone, dp_cp=alone, world=alone)
    return Parallel(groups, sequence_parallel=bool(transformer_config.sequence_parallel))


def packed_boundaries(packed_seq_params: Any) -> Tensor | None:
    """(n + 1,) document boundaries of Megatron's packed sequences, None without packing."""
    if packed_seq_params is None:
        return None
    bounds: Tensor = packed_seq_params.cu_seqlens_q
    return bounds


def mark_parameters(module: nn.Module, sharded: Mapping[str, ShardedParameter]) -> None:
    """Set the attributes by which Megatron counts a sharded parameter once per rank in the gradient norm.

    Replicated parameters stay unmarked: their gradients are summed inside the graph already, and
    `sequence_parallel=True` would make Megatron sum them again.
    """
    for name, parameter in module.named_parameters():
        marked: Any = parameter
        marked.tensor_model_parallel = name in sharded
        if name in sharded:
            marked.partition_dim, marked.partition_stride = sharded[name].dim, 1


def sharded_entries(
    module: nn.Module,
    sharded: Mapping[str, ShardedParameter],
    prefix: str,
    sharded_offsets: Sequence[tuple[int, int, int]],
    metadata: dict[str, Any] | None,
    tp: Any,
) -> dict[str, Any]:
    """Megatron's sharded state dict: one entry per parameter, and one key per segment of a packed one."""
    axes = {name: parameter.dim for name, parameter in sharded.items()}
    entries: dict[str, Any] = make_sharded_tensors_for_checkpoint(
        module.state_dict(keep_vars=True),
        prefix,
        axes,
        sharded_offsets,
        tp_group=tp,
        dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
    )
    for name, parameter in sharded.items():
        if len(parameter.segments) > 1:
            keys, widths = zip(*parameter.segments, strict=True)
            key = f"{prefix}{name}"
            entries[key] = split_tensor_factory(entries[key], list(widths), list(keys), parameter.dim)
    return entries
