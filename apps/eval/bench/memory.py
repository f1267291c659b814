"""Peak extra memory of one forward+backward, measured twice in fresh processes: allocator and resident set.

Not for training memory (libs.model.memory_estimate). The larger of the two readings is the one reported:

* allocator: torch's CPU allocator events, from the profiler: every tensor and temporary, also inside ATen.
* resident set (Linux): the process's high-water mark above what it held just before. It also sees what
  bypasses the allocator (BLAS buffers, thread stacks), and may miss what fits into pages already resident.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from torch.profiler import ProfilerActivity, profile

from apps.eval.bench.contenders import Kind, tensors_of, training_runner
from apps.eval.bench.operands import Shape

_WARM_UP_TOKENS = 256  # loads libraries and starts thread pools; its own memory is far below what is measured


Reader: TypeAlias = Callable[[Kind, Shape, int, int], int | None]


class Peak(NamedTuple):
    """Peak extra bytes of forward+backward above the inputs and the gradient of the output.

    resident_bytes is None where the system does not tell a process its high-water mark.
    """

    input_bytes: int
    allocator_bytes: int
    resident_bytes: int | None

    @property
    def extra_bytes(self) -> int:
        return max(self.allocator_bytes, self.resident_bytes or 0)

    @property
    def multiple(self) -> float:
        return self.extra_bytes / self.input_bytes


def measure_peak(kind: Kind, shape: Shape, *, chunk_size: int, threads: int) -> Peak:
    """Measure one contender in two fresh processes with the given number of threads.

    The gradients of the inputs are part of the extra memory; the inputs themselves are not.
    """
    inputs = tensors_of(kind, shape._replace(S=_WARM_UP_TOKENS), seed=0)
    per_token = sum(t.numel() * t.element_size() for t in inputs if _WARM_UP_TOKENS in t.shape) / _WARM_UP_TOKENS
    fixed = sum(t.numel() * t.element_size() for t in inputs if _WARM_UP_TOKENS not in t.shape)
    allocator = _in_fresh_process(_allocator_peak, kind, shape, chunk_size, threads)
    resident = _in_fresh_process(_resident_peak, kind, shape, chunk_size, threads)
    assert allocator is not None
    return Peak(int(per_token * shape.S + fixed), allocator, resident)


def _in_fresh_process(read: Reader, kind: Kind, shape: Shape, chunk_size: int, threads: int) -> int | None:
    """A process for each reading: a second run could hide in the pages that a first one freed."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_quiet) as pool:
        return pool.submit(read, kind, shape, chunk_size, threads).result()


def _quiet() -> None:
    """The profiler prints to the streams shared with the parent, whose stdout may be JSON."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)


def _allocator_peak(kind: Kind, shape: Shape, chunk_size: int, threads: int) -> int:
    torch.set_num_threads(threads)
    return allocated_peak(training_runner(kind, shape, seed=0, chunk_size=chunk_size))


def allocated_peak(run: Callable[[], object]) -> int:
    """The highest sum of the events of torch's CPU allocator while `run` runs, from nothing."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: int(e.start_ns())):
        held += int(event.nbytes())
        peak = max(peak, held)
    return peak


def _resident_peak(kind: Kind, shape: Shape, chunk_size: int, threads: int) -> int | None:
    torch.set_num_threads(threads)
    training_runner(kind, shape._replace(S=_WARM_UP_TOKENS), seed=0, chunk_size=chunk_size)()
    run = training_runner(kind, shape, seed=0, chunk_size=chunk_size)
    before = status_bytes("VmRSS")
    run()
    after = status_bytes("VmHWM")
    return None if before is None or after is None else max(0, after - before)


def status_bytes(field: str) -> int | None:
    """A size of /proc/self/status. Not getrusage: its maximum survives exec, so a child has its parent's."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    for line in status.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return None
