"""AdamW with one group that decays and one that does not, and its state as named tensors.

Not for the learning rate (schedule.py): it is set before each step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from apps.train.config import OptimSection
from libs.flags.errors import UserError
from libs.model import no_decay
from libs.parallel.mesh import Group

STATE_PARTS = ("step", "exp_avg", "exp_avg_sq")


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
    options["fused"] = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
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


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave; of a mapping of all parameters' state, take what this rank holds.

    Raises:
        UserError: a tensor of an unknown parameter, one of another shape, or some parameters without state.
    """
    parameters, inner = dict(model.named_parameters()), holder(optimizer)
    expected = {f"{part}/{name}" for part in STATE_PARTS for name, p in parameters.items() if p.requires_grad}
    if tensors and set(tensors) != expected:
        odd = sorted(set(tensors) ^ expected)
        raise UserError(f"optimizer state does not belong to this model: {len(odd)} names differ, first {odd[0]!r}")
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
