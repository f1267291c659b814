"""Which GPU this is, for the receipt, and why there is none, for the refusal. Changes no setting of the device.

Not for what the kernels need of it beyond the architecture: the tile table and the kernels refuse that themselves.
"""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from apps.eval.bench.receipt import Gpu
from libs.flags.errors import UserError

HOPPER = 9  # major compute capability
_HELP = "infra/gpu/README.md says how to take the project to a GPU machine; --device cpu times the CPU backend"
_QUERY = {
    "driver": "driver_version",
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "max_sm_clock_mhz": "clocks.max.sm",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}
_QUERY_SECONDS = 20

Run = Callable[[Sequence[str]], str]


class Machine(NamedTuple):
    """Where everything runs, and its record."""

    device: torch.device
    gpu: Gpu


def require_cuda() -> Machine:
    """The current CUDA device.

    Raises:
        UserError: no CUDA device, not a Hopper one, or no TileLang.
    """
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = "this torch is built without CUDA" if built is None else f"torch with CUDA {built} sees none"
        raise UserError(f"--device cuda: there is no CUDA device here ({why}, torch {torch.__version__}); {_HELP}")
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    if properties.major != HOPPER:
        raise UserError(
            f"--device cuda: {properties.name} has compute capability {properties.major}.{properties.minor}; the "
            f"kernels are built for sm_90a, that is H100, H200 and GH200; {_HELP}"
        )
    if importlib.util.find_spec("tilelang") is None:
        raise UserError("--device cuda: tilelang is not installed; install the extra 'cuda' of this project")
    device = torch.device("cuda", torch.cuda.current_device())
    which = f"GPU-{str(properties.uuid).removeprefix('GPU-')}"  # CUDA_VISIBLE_DEVICES renumbers, nvidia-smi does not
    state = smi_state(which, _run)
    return Machine(device, gpu_record(properties, state))


def gpu_record(properties: Any, state: dict[str, str]) -> Gpu:
    """The receipt's record from torch's properties and what nvidia-smi says ({} when it says nothing)."""

    def number(key: str) -> float | None:
        try:
            return float(state[key])
        except (KeyError, ValueError):
            return None  # "[N/A]", or no nvidia-smi: the record says null

    return Gpu(
        name=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        multiprocessors=properties.multi_processor_count,
        memory_bytes=properties.total_memory,
        cuda=torch.version.cuda or "none",
        driver=state.get("driver"),
        sm_clock_mhz=number("sm_clock_mhz"),
        memory_clock_mhz=number("memory_clock_mhz"),
        max_sm_clock_mhz=number("max_sm_clock_mhz"),
        power_limit_w=number("power_limit_w"),
        temperature_c=number("temperature_c"),
    )


def smi_state(which: str, run: Run) -> dict[str, str]:
    """Driver and clocks by nvidia-smi, by the names of _QUERY; {} where it is missing or refuses."""
    fields = ",".join(_QUERY.values())
    command = ("nvidia-smi", f"--id={which}", f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    try:
        said = run(command)
    except (FileNotFoundError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in said.strip().split(",")]
    return dict(zip(_QUERY, values, strict=True)) if len(values) == len(_QUERY) else {}


def _run(command: Sequence[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=_QUERY_SECONDS).stdout
