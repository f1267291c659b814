"""AdamW with one group that decays and one that does not, and its state as named tensors.

Not for the learning rate (schedule.py): it is set before each step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from apps.train.config import OptimSection
from libs.flags.errors import UserError
from libs.model import no_decay

STATE_PARTS = ("step", "exp_avg", "exp_avg_sq")


def build_optimizer(model: nn.Module, settings: OptimSection) -> torch.optim.AdamW:
    """Matrices decay; norms, biases, dt_bias, D and all other vectors do not (libs.model.no_decay)."""
    decayed = [p for name, p in model.named_parameters() if p.requires_grad and not no_decay(name, p)]
    kept = [p for name, p in model.named_parameters() if p.requires_grad and no_decay(name, p)]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=all(p.device.type in ("cpu", "cuda") for p in model.parameters()),
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """One rate for all groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state keyed "<part>/<parameter name>"; empty before the first step."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        tensors.update({f"{part}/{name}": state[part] for part in STATE_PARTS if part in state})
    return tensors


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave.

    Raises:
        UserError: a tensor of an unknown parameter, one of another shape, or some parameters without state.
    """
    parameters = dict(model.named_parameters())
    expected = {f"{part}/{name}" for part in STATE_PARTS for name, p in parameters.items() if p.requires_grad}
    if tensors and set(tensors) != expected:
        odd = sorted(set(tensors) ^ expected)
        raise UserError(f"optimizer state does not belong to this model: {len(odd)} names differ, first {odd[0]!r}")
    for key, tensor in tensors.items():
        part, name = key.split("/", 1)
        parameter = parameters[name]
        if part != "step" and tensor.shape != parameter.shape:
            raise UserError(f"optimizer state {key!r} is {tuple(tensor.shape)}, the parameter {tuple(parameter.shape)}")
        # Copied into storage of torch's own alignment, which the order of a vectorised sum may depend on.
        home = torch.empty(tensor.shape, dtype=tensor.dtype, device=parameter.device)
        optimizer.state[parameter][part] = home.copy_(tensor)
