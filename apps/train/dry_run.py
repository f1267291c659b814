"""`--dry-run`: what a run needs, by formula and on the meta device, and whether it fits the stated device.

Not a measurement: nothing is allocated and no data is read.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from apps.train.config import TrainConfig
from apps.train.lane import host_memory
from libs.flags.environment import fathom_variables
from libs.flags.errors import ExitStatus, UserError
from libs.flags.facts import Facts
from libs.flags.resolve import resolve
from libs.model import HybridLM, flops_per_token, parameter_count
from libs.model.memory import MemoryEstimate, memory_estimate

GIB = 2**30
# What a process can have of the device's memory, rounded down, by the name the driver gives the device.
DEVICE_MEMORY = {
    "NVIDIA H100 80GB HBM3": 78 * GIB,
    "NVIDIA H200": 139 * GIB,
}


class Target(NamedTuple):
    """The device a plan is for, and where its memory size comes from."""

    name: str
    memory_bytes: int
    source: str


def target_device(config: TrainConfig) -> Target:
    """train.device_memory if stated, else the memory of a known train.device_name, else of this machine.

    Raises:
        UserError: a device that is not here and whose memory is not stated.
    """
    settings = config.train
    name = settings.device_name or ("this machine" if settings.device != "cuda" else "the CUDA device")
    if settings.device_memory is not None:
        return Target(name, int(settings.device_memory), "train.device_memory")
    if settings.device_name is not None:
        if settings.device_name not in DEVICE_MEMORY:
            known = ", ".join(DEVICE_MEMORY)
            raise UserError(
                f"train.device_name = {settings.device_name!r}: its memory is not known (known: {known}); "
                "state it with --train.device_memory 80GB"
            )
        return Target(name, DEVICE_MEMORY[settings.device_name], "known for this device name")
    if settings.device != "cpu" and torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        return Target(found.name, found.total_memory, "reported by the driver")
    if settings.device == "cuda":
        raise UserError("no CUDA device is here: state what to plan for with --train.device_memory 80GB")
    return Target("this machine", host_memory().total, "all memory of this machine")


def dry_run(config: TrainConfig) -> ExitStatus:
    """Print parameters, FLOPs per token and memory by component; USAGE when the step does not fit.

    Raises:
        GateRefused: a gate that the planned device could not honour. UserError: as `target_device`.
    """
    architecture = config.model.architecture()
    target = target_device(config)
    planned = Facts(
        device="cuda" if _on_gpu(config, target) else "cpu",
        device_name=target.name,
        bf16=_in_bf16(config, target),
        mtp_depth=architecture.mtp_depth,
    )
    resolve(fathom_variables(), planned)
    with torch.device("meta"):
        model = HybridLM(architecture, activation_checkpointing=config.train.activation_checkpointing)
    counted = parameter_count(architecture)
    built = sum(parameter.numel() for parameter in model.parameters())
    assert built == counted.total, f"the model has {built} parameters, the formula says {counted.total}"
    flops = flops_per_token(architecture, config.data.window)
    memory = _memory(config, target)
    out = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 100)
    counts = {kind: f"{count:,}" for kind, count in counted.by_layer_type.items()}
    out.print(_table("parameters", counts, f"{counted.total:,}"))
    shown = {kind: f"{value:,.0f}" for kind, value in flops.by_layer_type.items()}
    shown["forward"] = f"{flops.forward:,.0f}"
    title = f"FLOPs per token, window {config.data.window} (formula version {flops.formula_version})"
    out.print(_table(title, shown, f"{flops.train:,.0f}", total_name="training"))
    sizes = {name: f"{size / GIB:,.3f} GiB" for name, size in memory.by_component.items()}
    out.print(_table("memory of one training step (estimate)", sizes, f"{memory.total / GIB:,.3f} GiB"))
    fits = memory.total <= target.memory_bytes
    out.print(
        f"{target.name}: {target.memory_bytes / GIB:,.3f} GiB ({target.source}): "
        + ("the estimate fits" if fits else f"DOES NOT FIT, {memory.total / GIB:,.3f} GiB are needed"),
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return ExitStatus.OK if fits else ExitStatus.USAGE


def _on_gpu(config: TrainConfig, target: Target) -> bool:
    device = config.train.device
    return device == "cuda" or (device == "auto" and target.name.startswith("NVIDIA"))


def _in_bf16(config: TrainConfig, target: Target) -> bool:
    return config.train.precision == "bf16" or (config.train.precision == "auto" and _on_gpu(config, target))


def _memory(config: TrainConfig, target: Target) -> MemoryEstimate:
    return memory_estimate(
        config.model.architecture(),
        tokens=config.data.window * config.data.windows_per_batch,
        dtype_bytes=2 if _in_bf16(config, target) else 4,
        optimizer="adamw",
        activation_checkpointing=config.train.activation_checkpointing,
        device_type="cuda" if _on_gpu(config, target) else "cpu",
    )


def _table(title: str, rows: dict[str, str], total: str, *, total_name: str = "total") -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in rows.items():
        table.add_row(name, value)
    table.add_section()
    table.add_row(total_name, total)
    return table
