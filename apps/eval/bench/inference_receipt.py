"""What the receipts of `fathom bench prefix` and `decode` have in common: where and how they were measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from apps.eval.bench.machine import Where
from apps.eval.bench.receipt import Aim, Decision
from libs.flags.facts import Facts
from libs.flags.installed import install
from libs.flags.resolve import resolve


class Circumstances:
    """Taken before the measurement; see `machine.Where`."""

    def __init__(self, threads: int, command: Sequence[str], machine: str | None) -> None:
        """Raises GateRefused when the environment asks for a gate that cannot be honoured."""
        facts = Facts(device="cpu", mimo_backend="chunked", state_slots=True)
        self._where, self._command = Where(facts, None, threads=threads, machine=machine), command

    def fields(self, config: Mapping[str, Any], aims: Sequence[Aim]) -> dict[str, Any]:
        """Every field of a `Receipt` that does not say what was measured."""
        named = {key: list(v) if isinstance(v, tuple) else v for key, v in config.items()}
        return self._where.fields(named, self._command) | {
            "memory": [],
            "aims": list(aims),
            "decision": Decision.of_aims(aims),
        }


def own_process(gates: Mapping[str, str], facts: Facts, threads: int) -> ProcessPoolExecutor:
    """A process with gates of its own: they are fixed for the life of a process."""
    start = (dict(gates), facts, threads)
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_begin, initargs=start)


def _begin(gates: dict[str, str], facts: Facts, threads: int) -> None:
    torch.set_num_threads(threads)
    install(resolve(gates, facts))


def aim(name: str, measured: float, relation: str, target: float) -> Aim:
    """An aim, judged."""
    met = {">=": measured >= target, "<=": measured <= target, "<": measured < target}[relation]
    return Aim.model_validate({"name": name, "measured": measured, "relation": relation, "target": target, "met": met})
