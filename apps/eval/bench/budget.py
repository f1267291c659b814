"""How many samples of a length fit into the time and memory that are left: decided before it is begun.

Pure arithmetic, for `fathom bench crossover`. Not for measuring either.
"""
# S tokens

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

# Calls of a contender beside its timed ones: a warm-up, and on a CPU a step in a fresh process for its memory.
EXTRA_CALLS = 2
MIN_ROUNDS = 2  # with fewer there is no interval
# A length may not need more than this share of the memory that is free: swapping would be timed instead.
MEMORY_SHARE = 0.7


class Measured(NamedTuple):
    """One contender at one length: mean seconds of a step, and the work that its formula counts there."""

    seconds: float
    flops: float


class Allowance(NamedTuple):
    """rounds: 0 leaves the length out, with the reason; fewer than asked for have a reason too."""

    rounds: int
    reason: str | None


def predicted_seconds(known: Mapping[int, Measured], seq_len: int, flops: float) -> float:
    """Seconds of a step at `seq_len`, from the longest shorter length: its time, scaled by modelled FLOPs.

    Too much rather than too little, as far as longer sequences fill a machine better.
    """
    nearest = known[max(length for length in known if length < seq_len)]
    return nearest.seconds * flops / nearest.flops


def allowance(step_seconds: float, *, wanted: int, left_s: float, need_bytes: int, free_bytes: int) -> Allowance:
    """Rounds of a length whose contenders take `step_seconds` together for one step each."""
    if need_bytes > MEMORY_SHARE * free_bytes:
        may = MEMORY_SHARE * free_bytes / 2**30
        return Allowance(0, f"needs about {need_bytes / 2**30:.1f} GiB, {may:.1f} GiB may be used")
    fitting = int(left_s / step_seconds) - EXTRA_CALLS if left_s > 0 else 0
    if fitting >= wanted:
        return Allowance(wanted, None)
    said = (
        f"a step of each would take about {step_seconds:.0f} s, {max(0.0, left_s):.0f} s were left of the time allowed"
    )
    if fitting < min(MIN_ROUNDS, wanted):
        return Allowance(0, f"{said} (--max-minutes)")
    return Allowance(fitting, f"{fitting} instead of {wanted} rounds: {said}")
