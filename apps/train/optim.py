"""AdamW with one group that decays and one that does not, and its state as named tensors.

Not for the learning rate (schedule.py): it is set before each step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from apps.train.config import OptimSection
from libs.flags.errors import UserError
from libs.model import no_decay
from libs.parallel.data import PiecedState
from libs.parallel.mesh import Group, Groups

STATE_PARTS = ("step", "exp_avg", "exp_avg_sq")
AnyOptimizer: TypeAlias = torch.optim.Optimizer | PiecedState


def build_optimizer(
    model: nn.Module, settings: OptimSection, *, shared_by: Group | None = None
) -> torch.optim.AdamW | ZeroRedundancyOptimizer:
    """Matrices decay; norms, biases, dt_bias, D and all other vectors do not (libs.model.no_decay).

    shared_by: ranks that hold the same parameters, and of whose state each then keeps a part (ZeRO stage 1).
    """
    decayed = [p for name, p in model.named_parameters() if p.requires_grad and not no_decay(name, p)]
    kept = [p for name, p in model.named_parameters() if p.requires_grad and no_decay(name, p)]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {"lr": settings.lr, "betas": (settings.beta1, settings.beta2), "eps": settings.eps}
    kinds = {p.device.type for p in model.parameters()}
    options["fused"] = kinds <= {"cpu", "cuda"}
    if "xla" in kinds:
        # A rate or a step count of the host would be a constant of the compiled program.
        device = next(model.parameters()).device
        options |= {"capturable": True, "foreach": False, "lr": torch.tensor(settings.lr, device=device)}
    if shared_by is None or shared_by.size == 1:
        return torch.optim.AdamW(groups, **options)
    return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, process_group=shared_by.process_group, **options)


def holder(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that has this rank's state: the inner one of a ZeroRedundancyOptimizer, else itself."""
    if not isinstance(optimizer, ZeroRedundancyOptimizer):
        return optimizer
    inner: torch.optim.Optimizer = optimizer.optim
    return inner


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state that this rank holds, keyed "<part>/<parameter name>"; empty before the first step."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state = holder(optimizer).state.get(parameter, {})
        tensors.update({f"{part}/{name}": state[part] for part in STATE_PARTS if part in state})
    return tensors


class HeldState(NamedTuple):
    """What one rank writes of an optimizer. parts: into how many files the state of one tensor-parallel rank goes.
    copied: nobody changes these tensors any more. weights: in place of the model's parameters, which hold less."""

    tensors: dict[str, Tensor]
    parts: int
    copied: bool = False
    weights: dict[str, Tensor] | None = None


def held_state(model: nn.Module, optimizer: AnyOptimizer, groups: Groups) -> HeldState:
    """What this rank is to write; ranks with the same parameters write them once. A collective for `PiecedState`."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        weights = optimizer.collect_weights() if optimizer.owns_weights else None
        return HeldState(optimizer.collect_state(), groups.dp_cp.size, copied=True, weights=weights)
    parts = groups.dp_cp.size if isinstance(optimizer, ZeroRedundancyOptimizer) else 1
    writes = groups.dp_cp.rank == 0 or parts > 1
    return HeldState(optimizer_tensors(model, optimizer) if writes else {}, parts)


def load_optimizer_tensors(model: nn.Module, optimizer: AnyOptimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave; of a mapping of all parameters' state, take what this rank holds.

    Raises:
        UserError: a tensor of an unknown parameter, one of another shape, or some parameters without state.
    """
    parameters = dict(model.named_parameters())
    if isinstance(optimizer, torch.optim.Optimizer):
        names = [name for name, p in parameters.items() if p.requires_grad]
    else:
        names = list(optimizer.names)
    expected = {f"{part}/{name}" for part in STATE_PARTS for name in names}
    if tensors and set(tensors) != expected:
        odd = sorted(set(tensors) ^ expected)
        raise UserError(f"optimizer state does not belong to this model: {len(odd)} names differ, first {odd[0]!r}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        if tensors:
            optimizer.restore_state(tensors)
        return
    inner = holder(optimizer)
    held = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
    for key in tensors:
        part, name = key.split("/", 1)
        parameter = parameters[name]
        if id(parameter) not in held:
            continue
        tensor = tensors[key]
        if part != "step" and tensor.shape != parameter.shape:
            raise UserError(f"optimizer state {key!r} is {tuple(tensor.shape)}, the parameter {tuple(parameter.shape)}")
        # Copied into storage of torch's own alignment, which the order of a vectorised sum may depend on.
        home = torch.empty(tensor.shape, dtype=tensor.dtype, device=parameter.device)
        inner.state[parameter][part] = home.copy_(tensor)
