"""The backends that a config names for loss and attention: refused before anything is written.

Not for the scan's, which the gates ask about (facts.py), nor for asking for them (start.py), which records exposures.
"""

from __future__ import annotations

import torch

from apps.train.config import TrainSection
from libs.flags.errors import UserError
from libs.flags.gateset import GateSet
from libs.kernels import attention, loss
from libs.kernels.attention.pallas import gates as attention_gates
from libs.kernels.loss import gates as loss_gates
from libs.kernels.loss.liger import GATE as LIGER


def refuse_backends(settings: TrainSection, device: torch.device, gates: GateSet) -> None:
    """Raises UserError: a name that is unknown, that cannot run on the device, or that contradicts its gate."""
    try:
        wanted = loss_gates.backend_under(gates.value(LIGER), settings.loss_backend)
        loss.choose_backend(wanted, device)
        gated = gates.is_enabled(attention_gates.GATE)
        attention.choose_backend(attention_gates.backend_under(gated, settings.attention_backend), device)
    except ValueError as error:
        raise UserError(f"train: {error}") from error
