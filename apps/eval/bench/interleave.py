"""Interleaved timing: every round runs every contender once, in an order that changes from round to round.

Not for what is timed (ops.py) or for what is concluded (receipt.py).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Contender(NamedTuple):
    """Something to time.

    rounds: it takes part in the first `rounds` rounds. warm_up: one untimed call before the first round.
    """

    name: str
    run: Callable[[], object]
    rounds: int
    warm_up: bool


def wall_seconds(run: Callable[[], object]) -> float:
    """One call by the wall clock, for work that is done when the call returns."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def interleave(
    contenders: Sequence[Contender],
    *,
    seed: int,
    on_sample: Callable[[str, float], None],
    clock: Callable[[Callable[[], object]], float] = wall_seconds,
    late: Callable[[], bool] = lambda: False,
) -> dict[str, list[float]]:
    """Time the contenders in interleaved rounds; seconds per call, by name, in round order.

    A slow phase of the machine then falls on all contenders, and sample i of two contenders is a pair. The
    order within a round is shuffled, so that no contender always runs on the cache that the same one left.
    clock: runs its argument once and returns its seconds. late: asked after every round; true ends the rounds.
    """
    names = [contender.name for contender in contenders]
    assert len(set(names)) == len(names), f"two contenders of one name in {names}"
    shuffler = random.Random(seed)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for contender in contenders:
        if contender.warm_up:
            contender.run()
    for round_index in range(max((contender.rounds for contender in contenders), default=0)):
        order = [contender for contender in contenders if round_index < contender.rounds]
        shuffler.shuffle(order)
        for contender in order:
            seconds = clock(contender.run)
            samples[contender.name].append(seconds)
            on_sample(contender.name, seconds)
        if late():
            break
    return samples
