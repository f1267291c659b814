"""A small plan on the CPU: the chunked backend in place of the kernels, the wall clock in place of CUDA events."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from apps.eval.bench.cuda import accuracy, measure, run
from apps.eval.bench.cuda import plan as plans
from apps.eval.bench.cuda.builds import Built
from apps.eval.bench.cuda.device import Machine
from apps.eval.bench.interleave import wall_seconds
from apps.eval.bench.operands import Operands, Shape
from apps.eval.bench.receipt import Gpu
from libs.kernels.mimo import mamba3_mimo
from libs.kernels.mimo.sm90.gates import KernelGates

GPU = Gpu(
    name="Test GPU", capability="9.0", multiprocessors=132, memory_bytes=1 << 30, cuda="none", driver="1.2",
    sm_clock_mhz=None, memory_clock_mhz=None, max_sm_clock_mhz=None, power_limit_w=None, temperature_c=None,
)  # fmt: skip
SMALL = plans.Case(8, 8, 2, 8)
CPU = torch.device("cpu")


def chunked_in_bf16(operands: Operands, shape: Shape, chunk_size: int, gates: KernelGates) -> Tensor:
    """Something right that takes bf16 operands."""
    out: Tensor = mamba3_mimo(*operands, chunk_size, shape.divisor, torch.bfloat16, backend="chunked")
    return out


def small_plan(
    *, rounds: int, seed: int, base: str = "off", workers: int = 1, seconds: float | None = None,
    against: str | None = None,
) -> plans.CudaPlan:  # fmt: skip
    settings = plans.settings_on(base)
    kept = (settings[0], settings[4], settings[-1])
    points = (plans.Point(1, 32), plans.Point(2, 16))
    checks = tuple((SMALL, setting) for setting in kept)
    return plans.CudaPlan(checks, 20, points, kept, rounds, 16, 1024, workers, seed, seconds, against)


def one_call(call: Callable[[], object], device: torch.device) -> int:
    call()
    return 1000


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "require_cuda", lambda: Machine(CPU, GPU))
    monkeypatch.setattr(run, "EventClock", lambda device: wall_seconds)
    monkeypatch.setattr(run, "build_ahead", lambda jobs, workers, on_built: Built(0, 0.0, ("fwd: no compiler",)))
    monkeypatch.setattr(run, "jobs_of", lambda plan, multiprocessors: ())
    monkeypatch.setattr(measure, "peak_bytes", one_call)
    monkeypatch.setattr(measure, "op_call", chunked_in_bf16)
    monkeypatch.setattr(accuracy, "op_call", chunked_in_bf16)
    monkeypatch.setattr(plans, "quick_plan", small_plan)
