"""State of megatron-core's DistributedOptimizer as whole tensors under parameter names, and back again.

A rank of `dp_cp` updates flat ranges that begin and end anywhere inside a parameter; a checkpoint holds what any layout
and any engine can read. Not for files (apps.train), nor for Megatron's own checkpoints: see decision 0013.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from libs.flags.errors import UserError
from libs.parallel.mesh import Group

MOMENTS = ("exp_avg", "exp_avg_sq")


class Piece(NamedTuple):
    """Entries [start, stop) of a flattened parameter: `shard` is what the inner optimizer calls its parameter."""

    shard: Tensor
    start: int
    stop: int


def pieces(optimizer: Any, parameters: Mapping[str, Tensor]) -> dict[str, Piece]:
    """What this rank updates, by parameter name; a parameter that other ranks update alone is not in it.

    optimizer: megatron-core's DistributedOptimizer over fp32 `parameters`, whose shards are views of them.
    """
    found = {}
    for name, parameter in parameters.items():
        if parameter not in optimizer.model_param_group_index_map:
            continue
        group, order = optimizer.model_param_group_index_map[parameter]
        extent = optimizer._get_model_param_range_map(parameter)["param"]
        shard = optimizer.optimizer.param_groups[group]["params"][order]
        assert shard.numel() == extent.end - extent.start, f"{name}: the range and the shard differ"
        found[name] = Piece(shard, extent.start, extent.end)
    return found


def collect(
    parameters: Mapping[str, Tensor], held: Mapping[str, Piece], inner: torch.optim.Optimizer, step: int, group: Group
) -> dict[str, Tensor]:
    """State of this rank's share of the parameters: whole, on the host, as "<part>/<parameter name>"; a collective.

    Every parameter falls to exactly one rank of the group. One parameter at a time is whole on the device.

    Args:
        step: updates so far, of all parameters alike. group: the ranks whose pieces make up a parameter (`dp_cp`).
    """
    owners = _owners({name: parameter.numel() for name, parameter in parameters.items()}, group.size)
    mine: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        keep = owners[name] == group.rank
        if keep:
            mine[f"step/{name}"] = torch.tensor(float(step))
        for part in MOMENTS:
            whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
            if name in held:
                shard, start, stop = held[name]
                whole[start:stop] = inner.state[shard][part]
            # Bits and not values are added up: -0.0 + 0.0 is 0.0, and what is loaded must be what was.
            group.all_reduce_(whole.view(torch.int32))
            if keep:
                mine[f"{part}/{name}"] = whole.view(parameter.shape).cpu()
    return mine


def _owners(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Who keeps which parameter: about as much on each rank, and the same answer on all."""
    load, owners = [0] * ranks, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = load.index(min(load))
        load[owners[name]] += sizes[name]
    return owners


def restore(
    parameters: Mapping[str, Tensor],
    held: Mapping[str, Piece],
    inner: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
) -> int:
    """Give the inner optimizer its pieces of whole tensors of any origin; the number of updates so far. No collective.

    Not through DistributedOptimizer.load_state_dict: 0.16.1 cannot load into torch's AdamW.

    Args:
        tensors: as `collect` of all ranks together gives them; only what this rank holds a piece of is read.

    Raises:
        UserError: a tensor of another shape, or parameters that were not all updated equally often.
    """
    steps = {name: float(tensors[f"step/{name}"]) for name in parameters}
    step = next(iter(steps.values()))
    if odd := [name for name, count in steps.items() if count != step]:
        raise UserError(
            f"optimizer state: {odd[0]!r} was updated {steps[odd[0]]:g} times, others {step:g} times; the megatron "
            "engine counts for all alike: go on with parallel.engine = torch"
        )
    of_torch = isinstance(inner, torch.optim.AdamW)
    for name, (shard, start, stop) in held.items():
        state = inner.state[shard]
        for part in MOMENTS:
            whole = tensors[f"{part}/{name}"]
            if whole.shape != parameters[name].shape:
                shapes = f"{tuple(whole.shape)}, the parameter {tuple(parameters[name].shape)}"
                raise UserError(f"optimizer state '{part}/{name}' is {shapes}")
            state[part] = torch.empty_like(shard, dtype=torch.float32, requires_grad=False)
            state[part].copy_(whole.flatten()[start:stop])
        if of_torch:
            state["step"] = torch.tensor(step, device=shard.device)
    if not of_torch:  # transformer-engine's and apex's count for a whole group
        for group in inner.param_groups:
            if group["params"]:
                group["step"] = int(step)
    return int(step)
