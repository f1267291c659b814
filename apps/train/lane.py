"""The lane a run is on: device, precision and determinism, each chosen once with its reason.

Not for operators' backends (libs.kernels) nor for gates (libs.flags), which are told the facts gathered here.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple

import psutil  # type: ignore[import-untyped]
import torch

from apps.train.config import TrainConfig, TrainSection
from libs.flags.errors import UserError
from libs.flags.facts import Facts
from libs.flags.provenance import cpu_model
from libs.kernels.backend import Choice
from libs.kernels.mimo import choose_backend
from libs.model.pattern import LayerKind


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


def choose_lane(settings: TrainSection) -> Lane:
    """Resolve device and precision and make torch deterministic if asked to.

    Raises:
        UserError: a device or precision that this machine does not have.
    """
    device = choose_device(settings.device)
    precision = choose_precision(settings.precision, device.value)
    torch.use_deterministic_algorithms(settings.deterministic)
    # The mode would also fill every torch.empty: that finds reads of unwritten memory, for tests, at a cost.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    on_gpu = device.value == "cuda"
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


def gather_facts(config: TrainConfig, lane: Lane) -> Facts:
    """What the gates' preconditions may ask about this machine and this model.

    Raises:
        UserError: a scan backend that is unknown or cannot run here.
    """
    model, tokens = config.model, config.data.window * config.data.windows_per_batch
    mixer, layers = model.mixer, model.layers
    on_gpu = lane.device.type == "cuda"
    properties = torch.cuda.get_device_properties(lane.device) if on_gpu else None
    try:
        backend = choose_backend(config.train.mimo_backend, lane.device).value
    except ValueError as error:
        raise UserError(f"train.mimo_backend: {error}") from error
    return Facts(
        device="cuda" if on_gpu else "cpu",
        device_name=lane.device_name,
        compute_capability=(properties.major, properties.minor) if properties is not None else None,
        device_count=torch.cuda.device_count() if on_gpu else None,
        multiprocessors=properties.multi_processor_count if properties is not None else None,
        free_memory_bytes=torch.cuda.mem_get_info(lane.device)[0] if on_gpu else host_memory().available,
        mimo_backend=backend,
        psiv_bytes_per_layer=None if mixer is None else tokens * mixer.inner * mixer.mimo_rank * 2,
        n_mamba_layers=sum(kind is LayerKind.MAMBA for kind in layers.trunk),
        batch_heads=None if mixer is None else mixer.nheads,
        bf16=lane.precision == "bf16",
        distributed_optimizer=False,
        homogeneous_stack=len(set(layers.trunk)) == 1,
        mtp_depth=model.mtp_depth,
    )
