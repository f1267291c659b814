"""What the receipts of `fathom bench prefix` and `decode` have in common: where and how they were measured."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from apps.eval.bench.receipt import Aim, Code, Decision, Hardware
from libs.flags.canonical import hash_json, utc_now
from libs.flags.environment import fathom_variables
from libs.flags.facts import Facts
from libs.flags.installed import install
from libs.flags.provenance import redact_command, snapshot
from libs.flags.resolve import resolve

_REPORTED_PACKAGES = ("fathom", "torch", "numpy")


class Circumstances:
    """Taken before the measurement: it names what ran, and how alone the machine was."""

    def __init__(self, threads: int, command: Sequence[str], machine: str | None) -> None:
        """Raises GateRefused when the environment asks for a gate that cannot be honoured."""
        self._gates = resolve(fathom_variables(), Facts(device="cpu", mimo_backend="chunked", state_slots=True))
        self._load, self._source = os.getloadavg()[0], snapshot({})
        self._threads, self._command, self._machine = threads, command, machine

    def fields(self, config: Mapping[str, Any], aims: Sequence[Aim]) -> dict[str, Any]:
        """Every field of a `Receipt` that does not say what was measured."""
        source, named = self._source, {key: list(v) if isinstance(v, tuple) else v for key, v in config.items()}
        return {
            "created": utc_now(),
            "command": redact_command(self._command),
            "code": Code.of(source),
            "config": named,
            "config_hash": hash_json(named),
            "gates_hash": self._gates.hash,
            "gates": dict(self._gates.values()),
            "hardware": Hardware(
                machine=self._machine or f"{source['cpu']} {self._threads} threads",
                device="cpu",
                threads=self._threads,
                load_before=self._load,
                **{key: source[key] for key in ("cpu", "cpu_count", "cpu_affinity", "memory_bytes")},
            ),
            "versions": {"python": source["python"], **{name: source["packages"][name] for name in _REPORTED_PACKAGES}},
            "memory": [],
            "aims": list(aims),
            "decision": Decision(
                value="record",
                reason=f"{sum(aim.met for aim in aims)} of {len(aims)} aims met; decides about no change",
            ),
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
