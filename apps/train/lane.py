"""The lane a run is on: device, precision and determinism, each chosen once with its reason.

Not for operators' backends (libs.kernels) nor for gates (libs.flags), which are told about it by facts.py.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple

import psutil  # type: ignore[import-untyped]
import torch

from apps.train.config import TrainSection
from libs.flags.errors import UserError
from libs.flags.provenance import cpu_model
from libs.kernels.backend import Choice


class Lane(NamedTuple):
    """Where and how a run computes. `device_name` is what the driver calls it."""

    device: torch.device
    device_name: str
    precision: Literal["fp32", "bf16"]
    choices: dict[str, Choice]

    def autocast(self) -> AbstractContextManager[object]:
        """Matrix products in bf16 with fp32 weights, or nothing."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def choose_lane(settings: TrainSection, local_rank: int = 0) -> Lane:
    """Resolve device and precision and make torch deterministic if asked to.

    local_rank: which of the machine's GPUs is this process's.

    Raises:
        UserError: a device or precision that this machine does not have.
    """
    device = choose_device(settings.device)
    precision = choose_precision(settings.precision, device.value)
    torch.use_deterministic_algorithms(settings.deterministic)
    # The mode would also fill every torch.empty: that finds reads of unwritten memory, for tests, at a cost.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    on_gpu = device.value == "cuda"
    if on_gpu and local_rank:
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK = {local_rank}, but torch sees {torch.cuda.device_count()} CUDA devices here; start at "
                "most one process for each"
            )
        torch.cuda.set_device(local_rank)
    return Lane(
        device=torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu"),
        device_name=torch.cuda.get_device_name() if on_gpu else cpu_model(),
        precision="bf16" if precision.value == "bf16" else "fp32",
        choices={"train.device": device, "train.precision": precision},
    )


def choose_device(requested: str) -> Choice:
    """cpu or cuda; "auto" takes the GPU when there is one."""
    available = torch.cuda.is_available()
    if requested == "auto":
        if available:
            return Choice("cuda", "auto: torch sees a CUDA device")
        return Choice("cpu", "auto: torch sees no CUDA device")
    if requested == "cuda" and not available:
        raise UserError(
            f"train.device = 'cuda', but torch {torch.__version__} sees no CUDA device on this machine; "
            "allowed here: auto, cpu (or --dry-run to plan for a device that is elsewhere)"
        )
    return Choice(requested, "requested by name")


def choose_precision(requested: str, device_type: str) -> Choice:
    """fp32, or bf16 autocast over fp32 weights."""
    able = device_type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if requested == "auto":
        if device_type == "cpu":
            return Choice("fp32", "auto: bf16 on a CPU is not faster everywhere")
        if able:
            return Choice("bf16", "auto: the device computes bf16")
        return Choice("fp32", "auto: the device does not compute bf16")
    if requested == "bf16" and not able:
        raise UserError(f"train.precision = 'bf16', but {torch.cuda.get_device_name()} does not compute bf16; use fp32")
    return Choice(requested, "requested by name")


def set_threads(settings: TrainSection, recorded: int | None) -> Choice:
    """Fix torch's CPU threads for the process.

    `recorded`: what the run used before it was interrupted, None at first. Sums depend on it, so it is kept.
    """
    if recorded is not None:
        choice = Choice(str(recorded), "as in the checkpoint: sums depend on the number of threads")
    elif settings.threads is not None:
        choice = Choice(str(settings.threads), "requested by number")
    else:
        choice = Choice(str(torch.get_num_threads()), "torch's own number for this machine")
    torch.set_num_threads(int(choice.value))
    return choice


class HostMemory(NamedTuple):
    """Bytes of this machine's memory."""

    total: int
    available: int


def host_memory() -> HostMemory:
    """As the system reports it now."""
    found = psutil.virtual_memory()
    return HostMemory(int(found.total), int(found.available))
