"""The mutation table of INFERENCE.md (test 9): each part of a restored state, wrong in each of four ways.

A case is one prompt whose repeat starts from a kept state; a mutant is killed by a case when any log-probability of the
repeat has other bits than without the cache. `python -m tests.libs.model.inference.mutations` prints the table that the
README of the engine shows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from libs.flags import installed
from libs.flags.facts import Facts
from libs.flags.installed import GateState, install
from libs.flags.resolve import resolve
from libs.model import HybridLM
from libs.model.inference import Completion, Engine, EngineConfig, Sampling, StateSlots
from libs.model.inference.audit import recompute
from tests.libs.model.conftest import roughen, tiny_config
from tests.libs.model.inference.conftest import PATTERN, ids

PARTS = ("angle", "ssm", "k", "x")
WAYS = ("zero", "one step stale", "swapped with neighbour", "bf16")
# Prompts by length: the kept state is at 64 or at 128 tokens, and 1 to 63 tokens are computed after it.
CASES = (65, 70, 100, 127, 129, 150)
HOW = Sampling(max_new_tokens=4)


class Seen(NamedTuple):
    """kills: cases that differ, of CASES. error: the largest difference of a first log-probability, in nats."""

    kills: int
    error: float


def an_engine(model: HybridLM, mode: str) -> Engine:
    """An engine with gates of its own."""
    installed._PROCESS = GateState()
    install(resolve({"FATHOM_PREFIX_CACHE": mode}, Facts(state_slots=True)))
    return Engine(model, EngineConfig(max_tokens=256, block_size=16, max_batch=2))


def a_model() -> HybridLM:
    return roughen(HybridLM(tiny_config(PATTERN)))


@contextmanager
def restoring_wrongly(engine: Engine, prompt: list[int], part: str, way: str) -> Iterator[None]:
    """Within it, every restored state has `part` wrong in that way, in all layers."""
    whole = StateSlots.restore

    def state_after(tokens: list[int]) -> torch.Tensor:
        lane, _ = recompute(engine._runner, tokens, engine.grid)
        layers = engine._slots.layout.layers
        return torch.stack([getattr(lane.state(layer), part)[0] for layer in layers])

    def restore(self: StateSlots, slot: int, blob: bytes) -> int:
        tokens = whole(self, slot, blob)
        right = self._states[part][:, slot].clone()
        wrong = {
            "": lambda: right,
            "zero": lambda: torch.zeros_like(right),
            "one step stale": lambda: state_after(prompt[: tokens - 1]),
            "swapped with neighbour": lambda: state_after(ids(tokens, 99)),
            "bf16": lambda: right.bfloat16().float(),
        }
        self._states[part][:, slot] = wrong[way]()
        return tokens

    StateSlots.restore = restore  # type: ignore[method-assign]
    try:
        yield
    finally:
        StateSlots.restore = whole  # type: ignore[method-assign]


@functools.cache
def without_cache(model: HybridLM, n: int) -> Completion:
    """What a case must give."""
    (wanted,) = an_engine(model, "off").generate([ids(n, n)], HOW)
    return wanted


def mutate(model: HybridLM, part: str, way: str) -> Seen:
    """Run every case; way "" changes nothing."""
    kills, error = 0, 0.0
    for n in CASES:
        prompt = ids(n, n)
        wanted = without_cache(model, n)
        engine = an_engine(model, "snapshots")
        (first,) = engine.generate([prompt], HOW)
        assert first.logprobs == wanted.logprobs
        with restoring_wrongly(engine, prompt, part, way):
            (found,) = engine.generate([prompt], HOW)
        assert found.report.skipped == (n - 1) // 64 * 64, "the case restores nothing"
        kills += found.logprobs != wanted.logprobs
        error = max(error, abs(found.logprobs[0] - wanted.logprobs[0]))
    return Seen(kills, error)


def table() -> str:
    """As the README shows it."""
    model = a_model()
    rows = ["| part | " + " | ".join(WAYS) + " |", "|---|" + "---|" * len(WAYS)]
    for part in PARTS:
        cells = [mutate(model, part, way) for way in WAYS]
        rows.append(f"| {part} | " + " | ".join(f"{c.kills} of {len(CASES)} ({c.error:.1g})" for c in cells) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table())
