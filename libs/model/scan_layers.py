"""Gate xla_scan_layers: which layers of a model run as one loop on XLA, or why none can.

What makes layers equal is `libs.parallel.xla.homogeneous`'s to say, and `stack` there is the loop. MTP depths are never
in one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from libs.flags import refuse_if_gated, value_of
from libs.flags.catalog import CATALOG
from libs.flags.errors import GateRefused, Refusal
from libs.kernels.chunk_loop import Driver
from libs.model.block import ResidualBlock
from libs.model.config import ModelConfig
from libs.model.layers import ForwardContext
from libs.model.packing import STATIC_DEVICES
from libs.parallel.xla.homogeneous import Finding, Run, homogeneous_runs, whole_stack
from libs.parallel.xla.stack import NotLoopable, run_units

GATE = "xla_scan_layers"
# The loop keeps what enters a unit and runs the unit again in backward: that is this kind of checkpointing.
CHECKPOINTING = "block"


class Loopable(NamedTuple):
    """What the gate's values would find in a model's trunk. difference: why it is not one run, None when it is."""

    difference: str | None
    runs: int


def loopable(config: ModelConfig) -> Loopable:
    """Of a model that is not built yet; the layers themselves are looked at again in every pass."""
    with torch.device("meta"):
        blocks = [ResidualBlock(config, kind) for kind in config.layers.trunk]
    whole, parts = whole_stack(blocks), homogeneous_runs(blocks)
    return Loopable(str(whole) if isinstance(whole, Finding) else None, 0 if isinstance(parts, Finding) else len(parts))


def layer_runs(layers: Sequence[nn.Module], checkpointing: str) -> list[Run]:
    """The runs to loop over, in order; none when the gate is off.

    Raises:
        GateRefused: on, and the layers are not one run; runs, and there are none; or a unit's forward may not run again
            in backward.
    """
    value = value_of(GATE)
    if value == "off":
        return []
    if checkpointing != CHECKPOINTING:
        raise refused(f"activation checkpointing is {checkpointing}, a unit in a loop is always recomputed in backward")
    found = whole_stack(layers) if value == "on" else homogeneous_runs(layers)
    if isinstance(found, Finding):
        raise refused(str(found))
    return [found] if isinstance(found, Run) else found


def run_as_loop(
    layers: Sequence[nn.Module], run: Run, x_BSD: Tensor, context: ForwardContext, driver: Driver
) -> Tensor:
    """The residual stream after the layers of `run`. Raises GateRefused: their code is not for a loop."""
    tensors, together = context.apart()
    try:
        return run_units(layers, run, x_BSD, tensors, together, driver)
    except NotLoopable as error:
        raise refused(f"layers {run.start} to {run.stop - 1}, units of {run.unit}: {error}") from error


def refuse_one_by_one(device: torch.device) -> None:
    """For passes that take layers one by one, each with a state. Raises GateRefused: on XLA, where the gate is on."""
    if device.type in STATIC_DEVICES:
        refuse_if_gated(GATE)


def refused(failure: str) -> GateRefused:
    """The gate as it was asked for cannot be had with these layers."""
    variable = CATALOG[GATE].variable
    remedy = f"unset {variable}: the plain loop takes any stack"
    return GateRefused([Refusal(GATE, variable, str(value_of(GATE)), (failure,), (remedy,))])
