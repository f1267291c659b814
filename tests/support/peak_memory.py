"""The peak memory of a few training steps: `python -m tests.support.peak_memory KIND WORDS OF TRAIN`, one process each.

Prints bytes as JSON, by kind:

* `tensors`: the highest sum of the events of torch's CPU allocator in the second step, with the parameters and the
  optimizer's state that were there before it.
* `resident`: the process's high-water mark in the steps, above its resident set just before the first one (imports,
  threads, self-test and validation are done) without the parameters. With `MALLOC_MMAP_THRESHOLD_=65536` in the
  environment glibc gives every large tensor pages of its own and returns them at once; without it, it raises that
  threshold up to 32 MiB while tensors are freed and keeps their memory for others, so that the mark says more of the
  order of sizes than of what is held.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from apps.eval.bench.memory import allocated_peak, status_bytes
from apps.train import loop
from apps.train.__main__ import main
from apps.train.loop import Run
from libs.flags.errors import run_entry

PROFILED_STEP = 2


def resident_bytes(field: str) -> int:
    found = status_bytes(field)
    assert found is not None, f"no {field} in /proc/self/status"
    return found


def parameter_bytes(run: Run) -> int:
    return sum(parameter.nbytes for parameter in run.model.parameters())


def state_bytes(run: Run) -> int:
    state = [u for of in run.optimizer.state.values() for u in of.values()]
    return sum(u.nbytes for u in state if isinstance(u, torch.Tensor))


class Meter:
    """Around every step of the loop: either reading disturbs the other, so a process takes one."""

    def __init__(self, kind: str) -> None:
        self.kind, self.found, self._before, self._step = kind, 0, 0, loop.one_step

    def one_step(self, run: Run) -> None:
        if self.kind == "tensors" and run.progress.step == PROFILED_STEP - 1:
            run.optimizer.zero_grad(set_to_none=True)
            held = parameter_bytes(run) + state_bytes(run)
            self.found = held + allocated_peak(lambda: self._step(run))
            return
        if run.progress.step == 0:
            self._before = resident_bytes("VmRSS") - parameter_bytes(run)
            Path("/proc/self/clear_refs").write_text(
                "5", encoding="ascii"
            )  # the high-water mark starts again from here
        self._step(run)
        if self.kind == "resident":
            self.found = resident_bytes("VmHWM") - self._before


if __name__ == "__main__":
    meter = Meter(sys.argv[1])
    loop.one_step = meter.one_step
    assert run_entry(main, sys.argv[2:]) == 0
    print(json.dumps({meter.kind: meter.found}))
