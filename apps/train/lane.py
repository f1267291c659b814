"""The lane a run is on: device, precision and determinism, each chosen once with its reason.

Not for operators' backends (libs.kernels) nor for gates (libs.flags), which are told about it by facts.py.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Literal, NamedTuple

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor

from apps.train.config import TrainSection, XlaSection
from apps.train.data.loader import Batch
from libs.flags.environment import choose_xla_platform
from libs.flags.errors import UserError
from libs.flags.provenance import cpu_model
from libs.kernels.backend import Choice
from libs.parallel.xla.pins import RUNTIME, refuse_other_versions
from libs.parallel.xla.topology import MeshShape

if TYPE_CHECKING:
    from libs.parallel.xla.device import XlaDevice


# train.device -> the runtime of torch_xla.
XLA_RUNTIMES = {"tpu": "TPU", "xla": "CPU"}


class Placed(NamedTuple):
    """tokens, labels: (rows, tokens of a row). cu_seqlens: boundaries over all rows, on the CPU for XLA."""

    tokens: Tensor
    labels: Tensor
    cu_seqlens: Tensor


class Lane(NamedTuple):
    """Where and how a run computes. `device_name` is what the driver calls it. xla: the open device of the XLA lane."""

    device: torch.device
    device_name: str
    precision: Literal["fp32", "bf16"]
    choices: dict[str, Choice]
    xla: XlaDevice | None = None

    @property
    def chips(self) -> int:
        """Accelerators that this one process drives."""
        return 1 if self.xla is None else self.xla.chips

    def place(self, batch: Batch) -> Placed:
        """A batch where the model takes it from. On XLA one row per window, shared out over the chips."""
        tokens, labels, cu_seqlens = batch.tokens, batch.labels, batch.cu_seqlens
        if self.xla is None:
            return Placed(tokens.to(self.device), labels.to(self.device), cu_seqlens.to(self.device))
        moved = batch.moved or self._rows(batch)
        return Placed(*moved, cu_seqlens)

    def move(self, batch: Batch) -> Batch:
        """The batch with its tokens on the XLA device already; from any thread."""
        return batch._replace(moved=self._rows(batch))

    def _rows(self, batch: Batch) -> tuple[Tensor, Tensor]:
        assert self.xla is not None, "one row for all windows elsewhere"
        rows = len(batch.window_ids)
        return self.xla.rows(batch.tokens.view(rows, -1)), self.xla.rows(batch.labels.view(rows, -1))

    def autocast(self) -> AbstractContextManager[object]:
        """Matrix products in bf16 with fp32 weights, or nothing."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def choose_lane(settings: TrainSection, local_rank: int = 0, xla: XlaSection | None = None) -> Lane:
    """Resolve device and precision and make torch deterministic if asked to.

    local_rank: which of the machine's GPUs is this process's. xla: the mesh, on an XLA device (None: one chip).

    Raises:
        UserError: a device or precision that this machine does not have.
    """
    device = choose_device(settings.device)
    precision = choose_precision(settings.precision, device.value)
    torch.use_deterministic_algorithms(settings.deterministic)
    # The mode would also fill every torch.empty: that finds reads of unwritten memory, for tests, at a cost.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.value in XLA_RUNTIMES:
        return _xla_lane(device, precision, xla or XlaSection())
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


def _xla_lane(device: Choice, precision: Choice, xla: XlaSection) -> Lane:
    """Open torch_xla, in a process of its own: what it is told at its first import holds for good."""
    refuse_other_versions(RUNTIME, f"train.device = {device.value!r}")
    shape = MeshShape(xla.data, xla.fsdp, xla.tensor)
    choose_xla_platform(XLA_RUNTIMES[device.value], shape.chips)
    # torch_xla is not in the main environment.
    from libs.parallel.xla.device import XlaDevice

    opened = XlaDevice(XLA_RUNTIMES[device.value], shape, exact_fp32=precision.value == "fp32")
    return Lane(
        device=opened.device,
        device_name=opened.name,
        precision="bf16" if precision.value == "bf16" else "fp32",
        choices={"train.device": device, "train.precision": precision},
        xla=opened,
    )


def choose_device(requested: str) -> Choice:
    """cpu, cuda, or by name tpu or xla; "auto" takes the GPU when there is one."""
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
    if device_type in XLA_RUNTIMES and requested == "auto":
        return Choice("bf16", "auto: a TPU multiplies bf16") if device_type == "tpu" else Choice("fp32", "auto: a CPU")
    able = device_type in ("cpu", *XLA_RUNTIMES) or torch.cuda.is_bf16_supported(including_emulation=False)
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
        choice = Choice(str(recorded), "as before the interruption: sums depend on the number of threads")
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
