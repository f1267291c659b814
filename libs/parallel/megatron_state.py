"""State of megatron-core's DistributedOptimizer as whole tensors under parameter names, and back again.

A rank of `dp_cp` updates flat ranges that begin and end anywhere inside a parameter; a checkpoint holds what any layout
and any engine can read. Not for files (apps.train), nor for Megatron's own checkpoints: see decision 0013.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from libs.flags.errors import UserError
from libs.parallel.mesh import Group

MOMENTS = ("exp_avg", "exp_avg_sq")


class Whole(NamedTuple):
    """A parameter as checkpoints know it: the model's own, laid one after the other along their first axis."""

    parts: Sequence[Tensor]

    @property
    def shape(self) -> torch.Size:
        """Of the parts together."""
        rows = sum(part.shape[0] for part in self.parts)
        return self.parts[0].shape if len(self.parts) == 1 else torch.Size((rows, *self.parts[0].shape[1:]))

    @property
    def device(self) -> torch.device:
        return self.parts[0].device


class Piece(NamedTuple):
    """Entries [start, stop) of a flattened whole: `shard`, fp32, is what the inner optimizer calls its parameter."""

    shard: Tensor
    start: int
    stop: int


Wholes = Mapping[str, Whole]
Held = Mapping[str, Sequence[Piece]]


def pieces(optimizer: Any, wholes: Wholes) -> dict[str, list[Piece]]:
    """What this rank updates, by parameter name; a parameter that other ranks update alone has none.

    optimizer: megatron-core's DistributedOptimizer. The shard of an fp32 parameter is a view of it; that of one in FP8
    is a copy in fp32, its main values. Not by the optimizer's own index: it counts the parameters of a group in the
    order of the buffers, and the inner optimizer holds those in fp32 first.
    """
    shards: dict[Tensor, Tensor] = {}
    for ours, theirs in (
        (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
        (optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups),
    ):
        for parameters, of_group in zip(ours, theirs, strict=True):
            shards |= dict(zip(parameters, of_group, strict=True))
    found: dict[str, list[Piece]] = {}
    for name, whole in wholes.items():
        found[name], offset = [], 0
        for part in whole.parts:
            if part in shards:
                extent, shard = optimizer._get_model_param_range_map(part)["param"], shards[part]
                assert shard.numel() == extent.end - extent.start, f"{name}: the range and the shard differ"
                found[name].append(Piece(shard, offset + extent.start, offset + extent.end))
            offset += part.numel()
    return found


def collect(wholes: Wholes, held: Held, inner: torch.optim.Optimizer, step: int, group: Group) -> dict[str, Tensor]:
    """State of this rank's share of the parameters: whole, on the host, as "<part>/<parameter name>"; a collective.

    Every parameter falls to exactly one rank of the group. One parameter at a time is whole on the device.

    Args:
        step: updates so far, of all parameters alike. group: the ranks whose pieces make up a parameter (`dp_cp`).
    """
    owners = _owners({name: whole.shape.numel() for name, whole in wholes.items()}, group.size)
    mine: dict[str, Tensor] = {}
    for name, whole in wholes.items():
        keep = owners[name] == group.rank
        if keep:
            mine[f"step/{name}"] = torch.tensor(float(step))
        for part in MOMENTS:
            gathered = _gathered(whole, [(piece, inner.state[piece.shard][part]) for piece in held[name]], group)
            if keep:
                mine[f"{part}/{name}"] = gathered.cpu()
    return mine


def collect_weights(wholes: Wholes, held: Held, group: Group, *, keep: bool) -> dict[str, Tensor]:
    """The parameters in fp32, as the optimizer holds them: whole, on the host; empty unless `keep`. A collective."""
    found = {}
    for name, whole in wholes.items():
        gathered = _gathered(whole, [(piece, piece.shard.detach()) for piece in held[name]], group)
        if keep:
            found[name] = gathered.cpu()
    return found


def _gathered(whole: Whole, mine: Sequence[tuple[Piece, Tensor]], group: Group) -> Tensor:
    """A whole tensor on the device of which each rank of the group has some pieces."""
    flat = torch.zeros(whole.shape.numel(), dtype=torch.float32, device=whole.device)
    for (_, start, stop), values in mine:
        flat[start:stop] = values
    # Bits and not values are added up: -0.0 + 0.0 is 0.0, and what is loaded must be what was.
    group.all_reduce_(flat.view(torch.int32))
    return flat.view(whole.shape)


def _owners(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Who keeps which parameter: about as much on each rank, and the same answer on all."""
    load, owners = [0] * ranks, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = load.index(min(load))
        load[owners[name]] += sizes[name]
    return owners


def restore(wholes: Wholes, held: Held, inner: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> int:
    """Give the inner optimizer its pieces of whole tensors of any origin; the number of updates so far. No collective.

    Not through DistributedOptimizer.load_state_dict: 0.16.1 cannot load into torch's AdamW.

    Args:
        tensors: as `collect` of all ranks together gives them; only what this rank holds a piece of is read.

    Raises:
        UserError: a tensor of another shape, or parameters that were not all updated equally often.
    """
    steps = {name: float(tensors[f"step/{name}"]) for name in wholes}
    step = next(iter(steps.values()))
    if odd := [name for name, count in steps.items() if count != step]:
        raise UserError(
            f"optimizer state: {odd[0]!r} was updated {steps[odd[0]]:g} times, others {step:g} times; the megatron "
            "engine counts for all alike: go on with parallel.engine = torch"
        )
    of_torch = isinstance(inner, torch.optim.AdamW)
    for name, of_whole in held.items():
        for part in MOMENTS if of_whole else ():
            tensor = _fitting(tensors, f"{part}/{name}", wholes[name], "optimizer state")
            for shard, start, stop in of_whole:
                home = torch.empty_like(shard, dtype=torch.float32, requires_grad=False)
                inner.state[shard][part] = home.copy_(tensor[start:stop])
        for piece in of_whole if of_torch else ():
            inner.state[piece.shard]["step"] = torch.tensor(step, device=piece.shard.device)
    if not of_torch:  # transformer-engine's and apex's count for a whole group
        for group in inner.param_groups:
            if group["params"]:
                group["step"] = int(step)
    return int(step)


def restore_weights(wholes: Wholes, held: Held, tensors: Mapping[str, Tensor]) -> None:
    """Put this rank's pieces of whole parameters, some or all of them, where the optimizer holds them. No collective.

    Raises:
        UserError: a tensor of another shape.
    """
    for name in tensors:
        flat = _fitting(tensors, name, wholes[name], "tensor")
        for shard, start, stop in held[name]:
            shard.detach().copy_(flat[start:stop])


def _fitting(tensors: Mapping[str, Tensor], key: str, whole: Whole, what: str) -> Tensor:
    """A tensor, flat."""
    tensor = tensors[key]
    if tensor.shape != whole.shape:
        raise UserError(f"{what} {key!r} is {tuple(tensor.shape)}, the parameter {tuple(whole.shape)}")
    return tensor.flatten()
