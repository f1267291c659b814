"""An open XLA device: what the trainer asks of it, in one place, so that a successor of torch_xla can take its place.

Imports torch_xla, which reads PJRT_DEVICE once: `libs.flags.environment.choose_xla_platform` comes first. Not for how
tensors are cut (mesh.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch_xla
import torch_xla.backends
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as met
import torch_xla.runtime as xr
from torch import Tensor

from libs.flags.errors import UserError
from libs.parallel.xla.mesh import Mesh, open_mesh
from libs.parallel.xla.topology import V6E, MeshShape, row_partition


class Compiled(NamedTuple):
    """What this process has compiled.

    programs: graphs that were new. everything: also the small ones by which torch_xla brings a tensor that is cut to
    the host, each time again. seconds: of the last of everything, oldest first.
    """

    programs: int
    everything: int
    seconds: tuple[float, ...]


class XlaDevice:
    """Attributes: device, name ("TPU v6e", or "XLA CPU" with the number of virtual devices), mesh (None with one chip).

    The name of a TPU is that of the generation this lane is for; others were never tried.
    """

    def __init__(self, platform: str, shape: MeshShape, *, exact_fp32: bool) -> None:
        """exact_fp32: fp32 products in fp32; a TPU rounds their operands to bf16 otherwise.

        Raises:
            UserError: another runtime, or another number of devices, than asked for.
        """
        found = xr.device_type()
        if found != platform:
            raise UserError(
                f"train.device asks for torch_xla's {platform} runtime, this process has {found}: unset PJRT_DEVICE"
            )
        devices = xr.global_runtime_device_count()
        if devices != shape.chips:
            raise UserError(
                f"xla.data * xla.fsdp * xla.tensor = {shape.data} * {shape.fsdp} * {shape.tensor} = {shape.chips}, "
                f"but there are {devices} XLA devices here; make the product equal"
            )
        if exact_fp32:
            torch_xla.backends.set_mat_mul_precision("highest")
        self.mesh: Mesh | None = open_mesh(shape) if shape.chips > 1 else None
        self.device: torch.device = torch_xla.device()
        self.on_tpu = platform == "TPU"
        self.chips = devices
        self.shape = shape
        self.name = V6E.name if self.on_tpu else f"XLA CPU x{devices}"

    def sync(self) -> None:
        """Run what has been asked for so far, as one program."""
        torch_xla.sync()

    def rows(self, host: Tensor) -> Tensor:
        """A batch (rows, ...) from the host, its rows shared out over the mesh: sent at once, from any thread."""
        cut = None if self.mesh is None else self.mesh.words(row_partition(host.dim(), host.shape[0], self.shape))
        (sent,) = xm.send_cpu_data_to_device([host], self.device, cut)
        assert isinstance(sent, Tensor)
        return sent

    def seed(self, seed: int) -> None:
        """The device's own generator; nothing in training draws from it."""
        xm.set_rng_state(seed)

    def rng_state(self) -> int:
        """State of that generator."""
        return int(xm.get_rng_state())

    def compiled(self) -> Compiled:
        """Since the process began. torch_xla keeps the durations of the last ones only."""
        data = met.metric_data("CompileTime")
        if data is None:
            return Compiled(0, 0, ())
        count, _total_ns, samples = data
        programs = int(met.counter_value("UncachedCompile") or 0)
        return Compiled(programs, int(count), tuple(float(nanoseconds) / 1e9 for _, nanoseconds in samples))

    def fallbacks(self) -> dict[str, int]:
        """Operators that ran on the host because XLA has none, and how often; each waits for the device."""
        names = [name for name in met.counter_names() if name.startswith("aten::")]
        return {name: int(met.counter_value(name)) for name in names}

    def memory(self) -> int | None:
        """Bytes in use at the highest point, of one chip; None where the runtime does not tell."""
        if not self.on_tpu:
            return None
        return int(xm.get_memory_info(self.device)["peak_bytes_used"])
