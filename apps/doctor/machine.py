"""What this machine has: packages, compilers, devices. Finds out and judges nothing (see lanes.py, versions.py)."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from typing import NamedTuple

from libs.flags.provenance import cpu_model, package_versions

_COMPILERS = ("cc", "gcc", "clang")
_NVCC_WHEEL = "nvidia-cuda-nvcc"
# What a package raises that is not there, lacks a library, fails as it starts, or was removed by half.
UNUSABLE = (ImportError, OSError, RuntimeError, AttributeError)


class Gpu(NamedTuple):
    name: str
    capability: tuple[int, int]
    memory_bytes: int


class Machine(NamedTuple):
    """torch_error, xla_error: why it cannot be used; None when it can. packages: by lower-case name with dashes.

    cuda: of the CUDA that torch is built with. gloo: torch's CPU collectives are there.
    """

    python: str
    cpu: str
    cores: int
    packages: dict[str, str]
    torch_error: str | None
    cuda: str | None
    gloo: bool
    gpus: tuple[Gpu, ...]
    xla_error: str | None
    compiler: str | None
    nvcc: str | None


def why(error: Exception) -> str:
    """Its kind and the first line of what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def probe() -> Machine:
    """Ask the machine. A package that cannot be imported is an answer, not an error."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch_error, cuda, gloo, gpus = _torch()
    return Machine(
        python=platform.python_version(),
        cpu=cpu_model(),
        cores=cores,
        packages={name.lower().replace("_", "-"): version for name, version in package_versions().items()},
        torch_error=torch_error,
        cuda=cuda,
        gloo=gloo,
        gpus=gpus,
        xla_error=_xla(),
        compiler=next((found for name in _COMPILERS if (found := shutil.which(name))), None),
        nvcc=shutil.which("nvcc") or _nvcc_of_wheel(),
    )


def _torch() -> tuple[str | None, str | None, bool, tuple[Gpu, ...]]:
    gpus: list[Gpu] = []
    try:
        import torch

        if torch.cuda.is_available():
            for index in range(torch.cuda.device_count()):
                found = torch.cuda.get_device_properties(index)
                gpus.append(Gpu(found.name, (found.major, found.minor), found.total_memory))
        gloo = torch.distributed.is_available() and torch.distributed.is_gloo_available()
        return None, torch.version.cuda, gloo, tuple(gpus)
    except UNUSABLE as error:
        return why(error), None, False, ()


def _xla() -> str | None:
    """Why no TPU can be used. Asks torch_xla only where it is installed: it takes the device when it starts."""
    try:
        importlib.metadata.version("torch_xla")
    except importlib.metadata.PackageNotFoundError:
        return "torch_xla is not installed"
    try:
        import torch_xla
        from torch_xla import runtime

        kind = runtime.device_type()
        torch_xla.device()
    except UNUSABLE as error:
        return why(error)
    return None if kind == "TPU" else f"torch_xla runs on {kind} here, not on a TPU"


def _nvcc_of_wheel() -> str | None:
    try:
        files = importlib.metadata.files(_NVCC_WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((str(file.locate()) for file in files if file.name == "nvcc"), None)
