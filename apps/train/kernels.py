"""The scan kernels of a run, for its log: the self-test before step 1, what was compiled and when.

Not for choosing a backend (facts.py, libs.model) nor for judging a result (libs.kernels.mimo.selftest).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from apps.train.facts import scan_geometry
from apps.train.lane import Lane
from libs.flags.events import AnomalyGeneric, KernelCompiled, KernelSelftest
from libs.flags.runlog import RunLog
from libs.kernels.mimo.capabilities import compiled_kernels
from libs.kernels.mimo.selftest import SelfTestFailed, SelfTestResult, gates_in_force, self_test
from libs.model import HybridLM
from libs.model.sharding import local_mixer

RECOMPILED = "kernel compiled after warm-up"


class KernelWatch:
    """Tells the log of every kernel that the scan's backend compiles.

    Compiling is expected in the self-test, in the first step and in the first validation of an attempt. Later it means
    that a shape changes from step to step, which costs minutes each time: an anomaly, though nothing is wrong.
    """

    def __init__(self, log: RunLog, backend: str | None) -> None:
        self._log, self._backend = log, backend
        self._reported = len(self._builds())
        self._warm: set[str] = set()

    def _builds(self) -> tuple[Any, ...]:
        return () if self._backend is None else compiled_kernels(self._backend)

    def report(self, phase: str, step: int | None = None) -> None:
        """Log what was compiled since the last call. `phase`: "selftest", "step" or "evaluation"."""
        new = self._builds()[self._reported :]
        self._reported += len(new)
        for build in new:
            event = KernelCompiled(kernel=build.kernel, seconds=build.seconds, details=build.details)
            self._log.emit(event, step=step)
        if new and phase in self._warm:
            details = {"phase": phase, "kernels": [build.kernel for build in new]}
            seconds = sum(build.seconds for build in new)
            anomaly = AnomalyGeneric(what=RECOMPILED, details=details | {"seconds": seconds}, action="none")
            self._log.emit(anomaly, step=step, level="warning")
        self._warm.add(phase)


def check_scan(
    model: HybridLM, lane: Lane, log: RunLog, watch: KernelWatch, *, tokens: int
) -> tuple[SelfTestResult, ...]:
    """Run the self-test of the backend that `model` computes its scan with, and log it; () for a model without one.

    `tokens`: of a micro-batch. The Hopper kernels are compiled for a length, so they are checked at this one too.

    Raises:
        SelfTestFailed: the backend is wrong at this model's shape; the run must not start. UserError: it refuses the
            shape.
    """
    if "mimo" not in model.choices:
        return ()
    mixer, backend = model.config.mixer, model.choices["mimo"].value
    assert mixer is not None, "a pattern with 'M' has a mixer"
    mixer = mixer if model.parallel is None else local_mixer(mixer, model.parallel.tp.size)
    dtype = torch.bfloat16 if lane.precision == "bf16" else torch.float32
    gates = gates_in_force(backend)
    results = []
    try:
        for length in (None,) if gates is None else (None, tokens):
            results.append(self_test(scan_geometry(mixer), backend, lane.device, dtype, gates, tokens=length))
            log.emit(_event(results[-1]))
    except SelfTestFailed as error:
        log.emit(_event(error.result), level="error")
        raise
    finally:
        watch.report("selftest")
    return tuple(results)


def _event(result: SelfTestResult) -> KernelSelftest:
    """The whole result; numbers that JSON has no word for are spelled."""
    plain = result._asdict()
    details = {name: plain[name] for name in ("against", "dtype", "gates", "tokens", "seconds")} | {
        "geometry": dict(result.geometry._asdict()),
        "bounds": list(result.bounds),
        "limits": dict(result.limits._asdict()),
        "errors": {name: error if math.isfinite(error) else str(error) for name, error in result.errors.items()},
        "wrong": sorted(result.wrong),
    }
    return KernelSelftest(kernel=f"mamba3_mimo.{result.backend}", passed=not result.wrong, details=details)
