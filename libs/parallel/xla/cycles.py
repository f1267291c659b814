"""Modelled time of a program that libtpu has compiled: the cycles it estimates for each operation, summed over loops.

Modelled, never measured: custom calls (Pallas kernels) and waits for other chips count nothing, and streaming from
memory is estimated about 2.5 times slower than the data sheet. Good for ranking variants. Text work; no jax here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
# -1 as an unsigned number.
NO_ESTIMATE = 2**64 - 1
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# torch_xla's scan counts with an s64, which the TPU compiler splits into a pair of u32.
_BOUND = re.compile(r"[su]32\[\][^ ]* constant\((\d+)\)")
_OPERATION = re.compile(
    r"\b(while|conditional|call|custom-call|all-gather|all-reduce|reduce-scatter|all-to-all)(?:-start)?\("
)


class Loop(NamedTuple):
    """One while loop: how often its body runs, and the cycles of one time."""

    body: str
    trips: int
    cycles: int


class Modelled(NamedTuple):
    """cycles: of the whole program. unknown: loops whose trips could not be read (counted once). uncounted: custom
    calls to kernels, whose cycles libtpu does not state. unestimated: operations for which it has no estimate.
    collectives: how many of each kind. All with loops counted."""

    cycles: int
    loops: tuple[Loop, ...]
    unknown: tuple[str, ...]
    uncounted: int
    unestimated: int
    collectives: dict[str, int]


def modelled_cycles(hlo: str) -> Modelled:
    """Read the text of an optimised TPU program (`HloModule.to_string`)."""
    computations, entry = _split(hlo)
    reader = _Reader(computations)
    cycles = reader.walk(entry, 1)
    return Modelled(
        cycles, tuple(reader.loops), tuple(reader.unknown), reader.kernels, reader.unestimated, reader.collectives
    )


class _Reader:
    def __init__(self, computations: Mapping[str, Sequence[str]]) -> None:
        self.computations = computations
        self.loops: list[Loop] = []
        self.unknown: list[str] = []
        self.kernels = 0
        self.unestimated = 0
        self.collectives: dict[str, int] = {}

    def walk(self, name: str, times: int) -> int:
        """Cycles of one run of a computation, which runs `times` times."""
        total = 0
        for line in self.computations.get(name, ()):
            if match := _CYCLES.search(line):
                known = int(match.group(1)) != NO_ESTIMATE
                total += int(match.group(1)) if known else 0
                self.unestimated += 0 if known else times
            operation = _OPERATION.search(line)
            if operation is not None:
                total += self._inside(operation.group(1), line, times)
        return total

    def _inside(self, operation: str, line: str, times: int) -> int:
        if operation == "while":
            body = _named(line, "body")
            trips = self._trips(line)
            if trips is None:
                self.unknown.append(body)
            cycles = self.walk(body, times * (trips or 1))
            self.loops.append(Loop(body, trips or 1, cycles))
            return (trips or 1) * cycles
        if operation == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", line)
            names = re.findall(r"%([\w.\-]+)", branches.group(1)) if branches else []
            return max((self.walk(name, times) for name in names), default=0)
        if operation == "call":
            return self.walk(_named(line, "to_apply"), times)
        if operation == "custom-call":
            self.kernels += times * ("tpu_custom_call" in line)
            return 0
        self.collectives[operation] = self.collectives.get(operation, 0) + times
        return 0

    def _trips(self, line: str) -> int | None:
        if match := _TRIPS.search(line):
            return int(match.group(1))
        condition = self.computations.get(_named(line, "condition"), ())
        bounds = [int(bound) for text in condition for bound in _BOUND.findall(text)]
        return max(bounds, default=0) or None


def _named(line: str, key: str) -> str:
    match = re.search(rf"{key}=%?([\w.\-]+)", line)
    assert match is not None, f"an operation without {key}: {line[:120]}"
    return match.group(1)


def _split(hlo: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    current: list[str] | None = None
    entry = ""
    for line in hlo.splitlines():
        match = _COMPUTATION.match(line) if not line.startswith((" ", "HloModule")) else None
        if match is not None:
            current = computations.setdefault(match.group(2), [])
            entry = match.group(2) if match.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            current.append(line)
    return computations, entry
