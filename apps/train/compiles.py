"""What XLA compiled in a run, for its log: an event for each program, and an anomaly for one that came after warm-up.

The same for the scan's own kernels is kernels.py. Not for compiling ahead of time (aot.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import JsonValue

from apps.train.kernels import RECOMPILED, KernelWatch
from libs.flags.errors import UserError
from libs.flags.events import AnomalyGeneric, KernelCompiled
from libs.flags.runlog import RunLog

if TYPE_CHECKING:
    from libs.parallel.xla.device import XlaDevice

PROGRAM = "xla"
# Steps until nothing new is compiled: the first compiles everything; a resumed run may do so in its second.
WARM_STEPS = 2


class CompileWatch(KernelWatch):
    """Tells the log of every program that XLA compiles.

    Expected before the first step, in the first `WARM_STEPS` steps and in the first validation of an attempt. Later it
    means that a shape or a number of the host changes from step to step, which costs minutes each time on a TPU.
    """

    def __init__(self, log: RunLog, device: XlaDevice, *, strict: bool) -> None:
        """strict: a program that is compiled after warm-up stops the run."""
        super().__init__(log, None)
        self._device, self._strict = device, strict
        self._before, self._calls = device.compiled(), dict.fromkeys(("selftest", "step", "evaluation"), 0)

    def report(self, phase: str, step: int | None = None) -> None:
        """Log what was compiled since the last call.

        Raises:
            UserError: something was, after warm-up, and the run is strict.
        """
        compiled = self._device.compiled()
        new = compiled.programs - self._before.programs
        since = compiled.seconds[-(compiled.everything - self._before.everything) :] if new else ()
        self._before = compiled
        self._calls[phase] += 1
        # Beside the new programs there may be small ones that bring a tensor to the host.
        seconds = sorted(since, reverse=True)[:new]
        for one in seconds:
            event = KernelCompiled(kernel=PROGRAM, seconds=one, details={"phase": phase, "programs": compiled.programs})
            self._log.emit(event, step=step)
        if new and self._calls[phase] > (WARM_STEPS if phase == "step" else 1):
            self._late(phase, step, new, sum(seconds))

    def _late(self, phase: str, step: int | None, programs: int, seconds: float) -> None:
        details: dict[str, JsonValue] = {"phase": phase, "programs": programs, "seconds": seconds}
        details["fallbacks"] = dict[str, JsonValue](self._device.fallbacks())
        action = "stop" if self._strict else "none"
        anomaly = AnomalyGeneric(what=RECOMPILED, details=details, action=action)
        self._log.emit(anomaly, step=step, level="error" if self._strict else "warning")
        if self._strict:
            raise UserError(
                f"{programs} program(s) compiled after warm-up, in phase {phase} at step {step}, and --strict-compile "
                "is on: some shape or number of the host has changed; PT_XLA_DEBUG_LEVEL=1 shows where. Resume from "
                "the last checkpoint without it to go on (each compilation is then an anomaly in the log)"
            )
