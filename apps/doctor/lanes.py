"""The lanes (CPU, several CPU processes, one Hopper GPU, eight, TPU): what each lacks here, and what makes it work.

One command for each. Not for finding out (machine.py). A lane works when nothing that it needs is missing or known bad.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from apps.doctor.machine import Gpu, Machine
from apps.doctor.selftests import SelfTest
from apps.doctor.versions import Bad, known_bad

_HOPPER = (9, 0)
_SETUP = "make setup"
_NODE = 8  # GPUs, as the h200_8x recipes want them
_HOPPER_SETUP = "docker build -f infra/docker/cuda.Dockerfile -t fathom:cuda . (without a network: infra/gpu/README.md)"
_ELSEWHERE = "on a machine with such GPUs: "
_TPU_SETUP = "make setup-tpu, then .venv-tpu/bin/fathom (on a TPU VM with TORCH_INDEX=...: infra/tpu/README.md)"
# What each lane imports: a bad version of anything else is a warning to it, not a fault.
_COMMON = ("python", "torch", "megatron-core", "pydantic", "numpy")


class Lane(NamedTuple):
    """missing: why it does not work, empty when it does. limits: what does not work although the lane does.

    command: makes the lane work, or, where it does, the shortest thing to run on it.
    """

    name: str
    missing: tuple[str, ...]
    limits: tuple[str, ...]
    command: str

    @property
    def works(self) -> bool:
        return not self.missing


class Diagnosis(NamedTuple):
    machine: Machine
    bad: list[Bad]
    selftests: list[SelfTest]
    lanes: list[Lane]

    @property
    def healthy(self) -> bool:
        """Whether the CPU lane works, which every machine can have."""
        return self.lanes[0].works


def diagnose(machine: Machine, selftests: Sequence[SelfTest]) -> Diagnosis:
    """Judge a machine, given what the kernels' self-tests said."""
    bad = known_bad(machine.python, machine.packages)
    makers: tuple[Callable[[Machine, Sequence[Bad], Sequence[SelfTest]], Lane], ...] = (
        _cpu,
        _many,
        _hopper,
        _eight,
        _tpu,
    )
    return Diagnosis(machine, bad, list(selftests), [make(machine, bad, selftests) for make in makers])


def _base(machine: Machine, bad: Sequence[Bad], selftests: Sequence[SelfTest]) -> list[str]:
    missing = [] if machine.torch_error is None else [f"torch cannot be imported: {machine.torch_error}"]
    if "megatron-core" not in machine.packages:
        missing.append("megatron-core is not installed")
    missing += [str(entry) for entry in bad if entry.package in _COMMON]
    return missing + [f"self-test of {test.what}: {test.detail}" for test in selftests if not test.passed]


def _cpu(machine: Machine, bad: Sequence[Bad], selftests: Sequence[SelfTest]) -> Lane:
    missing = _base(machine, bad, selftests)
    if "torch-xla" in machine.packages:
        missing.append("this environment is the TPU's: torch is held back there; keep another one for the CPU")
    limits = []
    if "jinja2" not in machine.packages:
        limits.append("no `fathom report`: jinja2 is not installed (extra eval)")
    if not {"starlette", "uvicorn"} <= machine.packages.keys():
        limits.append("no `fathom serve`: starlette and uvicorn are not both installed (extra serve)")
    if machine.compiler is None:
        limits.append("no C compiler (cc, gcc, clang): nothing that compiles at run time works")
    run = "fathom train --recipe cpu_demo"
    return Lane("CPU", tuple(missing), tuple(limits), _SETUP if missing else run)


def _many(machine: Machine, bad: Sequence[Bad], selftests: Sequence[SelfTest]) -> Lane:
    missing = _base(machine, bad, selftests)
    if machine.torch_error is None and not machine.gloo:
        missing.append("this torch has no gloo: processes on CPUs cannot talk to each other")
    limits = [f"{machine.cores} core: processes take turns"] if machine.cores < 2 else []
    run = "torchrun --nproc-per-node 2 -m apps.train --recipe cpu_demo_tp2"
    return Lane("several CPU processes", tuple(missing), tuple(limits), _SETUP if missing else run)


def _hopper(machine: Machine, bad: Sequence[Bad], selftests: Sequence[SelfTest]) -> Lane:
    missing = _base(machine, bad, selftests)
    hopper = [gpu for gpu in machine.gpus if gpu.capability == _HOPPER]
    if machine.torch_error is None and machine.cuda is None:
        missing.append("this torch is built without CUDA")
    elif machine.torch_error is None and not machine.gpus:
        missing.append(f"torch with CUDA {machine.cuda} sees no GPU: no device, or no driver that fits")
    elif machine.gpus and not hopper:
        shown = ", ".join(f"{gpu.name} (sm_{gpu.capability[0]}{gpu.capability[1]})" for gpu in machine.gpus)
        missing.append(f"no GPU of sm_90 (H100, H200, GH200) among {shown}: the kernels are built for sm_90a")
    if "tilelang" not in machine.packages:
        missing.append("tilelang is not installed (extra cuda)")
    if machine.nvcc is None:
        missing.append("no nvcc: neither on the PATH nor as the wheel nvidia-cuda-nvcc (extra dev)")
    if machine.compiler is None:
        missing.append("no C compiler (cc, gcc, clang): tilelang and triton compile their launchers with it")
    missing += [str(entry) for entry in bad if entry.package == "tilelang"]
    limits = [str(entry) for entry in bad if entry.package in ("liger-kernel", "transformer-engine")]
    for package, gate in (("liger-kernel", "fused_linear_ce"), ("transformer-engine", "fp8_param_gather")):
        if package not in machine.packages:
            limits.append(f"gate {gate} will refuse: {package} is not installed")
    run = "fathom train --recipe h200_1x_smoke --train.mimo_backend tilelang"
    return Lane("CUDA, Hopper", tuple(missing), tuple(limits), _hopper_setup(hopper, 1) if missing else run)


def _eight(machine: Machine, bad: Sequence[Bad], selftests: Sequence[SelfTest]) -> Lane:
    one = _hopper(machine, bad, selftests)
    hopper = [gpu for gpu in machine.gpus if gpu.capability == _HOPPER]
    missing = one.missing
    if hopper and len(hopper) < _NODE:
        missing += (f"{len(hopper)} of {_NODE} GPUs of sm_90: the h200_8x recipes are laid out for {_NODE}",)
    run = "infra/launch/torchrun.sh runs/first --recipe h200_8x_bf16"
    return Lane(f"CUDA, Hopper, {_NODE} GPUs", missing, one.limits, _hopper_setup(hopper, _NODE) if missing else run)


def _hopper_setup(found: Sequence[Gpu], wanted: int) -> str:
    return _HOPPER_SETUP if len(found) >= wanted else _ELSEWHERE + _HOPPER_SETUP


def _tpu(machine: Machine, bad: Sequence[Bad], selftests: Sequence[SelfTest]) -> Lane:
    missing = _base(machine, bad, selftests) if "torch-xla" in machine.packages else []
    if machine.xla_error is not None:
        missing.append(machine.xla_error)
    run = "fathom train --recipe v6e_4k_hybrid"
    return Lane("TPU", tuple(missing), (), _TPU_SETUP if missing else run)
