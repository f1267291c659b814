"""Numbers of one step: bits per byte, tokens per second, where the time went, MFU or why there is none.

Not for validation scores (evaluate.py), nor for who hears of the numbers (hooks.py).
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from libs.parallel.xla.topology import V6E

# Dense bf16 matrix peak, FLOP/s, by the exact name the driver gives: NVIDIA H100 and H200 data sheets,
# whose headline figures count 2:4 sparsity and are halved here; a TPU's is in its topology.
PEAK_BF16_FLOPS = {
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H100 PCIe": 756.5e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA H200 NVL": 835.5e12,
    V6E.name: V6E.peak_bf16,
}


class Mfu(NamedTuple):
    """Model FLOPs utilisation in [0, 1], or None with the reason it cannot be stated."""

    value: float | None
    reason: str | None


def mfu(*, flops_per_token: float, tokens_per_s: float, device_name: str, precision: str) -> Mfu:
    """Achieved model FLOP/s over the device's peak; never against a guessed peak."""
    peak = PEAK_BF16_FLOPS.get(device_name)
    if peak is None:
        return Mfu(None, f"the peak of {device_name!r} is not known")
    if precision != "bf16":
        return Mfu(None, f"the known peak of {device_name!r} is for bf16, this run computes in {precision}")
    return Mfu(flops_per_token * tokens_per_s / peak, None)


def bits_per_byte(nll_sum: float, n_bytes: int) -> float:
    """`sum nll / (ln 2 * bytes)` of a training batch; special tokens are in the sum and have no bytes."""
    return nll_sum / (math.log(2.0) * max(1, n_bytes))


def mean_context(boundaries: Sequence[Tensor]) -> float:
    """Mean keys a query sees in packed documents: sum L (L + 1) / 2 over sum L; cu_seqlens (n+1,) each."""
    lengths = torch.cat([bounds.diff() for bounds in boundaries]).double()
    return float((lengths * (lengths + 1) / 2).sum() / lengths.sum())


class StepClock:
    """Splits a step's wall time by phase; on an accelerator each phase ends when its work is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started = time.perf_counter()
        self.seconds = {"data": 0.0, "forward_backward": 0.0, "optimizer": 0.0}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time inside to `seconds[name]`."""
        started = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[name] += time.perf_counter() - started

    def total(self) -> float:
        """Seconds since the step began."""
        return time.perf_counter() - self._started

    def other(self, total: float) -> float:
        """What no phase accounts for."""
        return max(0.0, total - sum(self.seconds.values()))


def peak_memory_bytes(device: torch.device) -> int:
    """Most device memory held so far; on a CPU the process's largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
