"""Modelled time of a program that libtpu has compiled: the cycles it estimates for each operation, summed over loops.

Modelled, never measured: custom calls (Pallas kernels) and waits for other chips count nothing, copies count more than
they can take, and least effort leaves operations untiled at many times their cost. Good for ranking programs of full
effort (README.md has what it was checked with). A bound from below is `roofline`'s to say.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from libs.parallel.xla.hlo import Instruction, Program

# From here on it is no number of cycles: -1 or the largest signed number as unsigned ones, and sums with them.
NO_ESTIMATE = 2**62
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
# How many kinds of operations are named.
COSTLY = 10


class Loop(NamedTuple):
    """One while loop: how often its body runs, and the cycles of one time."""

    body: str
    trips: int
    cycles: int


class Costly(NamedTuple):
    """An operation, with all that are alike: what it does, what it makes, how often it runs, cycles of all together.

    A fusion goes by the operation that it is named for, usually its last.
    """

    operation: str
    result: str
    times: int
    cycles: int


class Modelled(NamedTuple):
    """cycles: of the whole program. unknown: loops whose trips could not be read (counted once). uncounted: custom
    calls to kernels, whose cycles libtpu does not state. unestimated: operations for which it has no estimate. costly:
    what takes most, all branches of a conditional among it. All with loops counted."""

    cycles: int
    loops: tuple[Loop, ...]
    unknown: tuple[str, ...]
    uncounted: int
    unestimated: int
    costly: tuple[Costly, ...]


def modelled_cycles(program: Program) -> Modelled:
    """Of an optimised TPU program."""
    reader = _Reader(program)
    cycles = reader.walk(program.entry, 1)
    costly = sorted(reader.costs.items(), key=lambda one: -one[1][1])[:COSTLY]
    return Modelled(
        cycles, tuple(reader.loops), tuple(reader.unknown), reader.kernels, reader.unestimated,
        tuple(Costly(*what, *cost) for what, cost in costly),
    )  # fmt: skip


class _Reader:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.loops: list[Loop] = []
        self.unknown: list[str] = []
        self.kernels = 0
        self.unestimated = 0
        self.costs: dict[tuple[str, str], tuple[int, int]] = {}

    def walk(self, name: str, times: int) -> int:
        """Cycles of one run of a computation, which runs `times` times."""
        total = 0
        for instruction in self.program.of(name):
            if match := _CYCLES.search(instruction.text):
                cycles = int(match.group(1))
                if cycles < NO_ESTIMATE:
                    total += cycles
                    self._add(instruction, times, times * cycles)
                else:
                    self.unestimated += times
            total += self._inside(instruction, times)
        return total

    def _add(self, instruction: Instruction, times: int, cycles: int) -> None:
        named = _OP_NAME.search(instruction.text)
        # "call.7/dot.438" is a dot.
        last = "" if named is None else named.group(1).rpartition("/")[2].rpartition(".")[0]
        operation = instruction.operation if last in ("", instruction.operation) else f"{instruction.operation} {last}"
        made = [f"{u.dtype}[{','.join(map(str, u.shape))}]" for u in instruction.arrays]
        result = made[0] + (f" and {len(made) - 1} more" if len(made) > 1 else "") if made else "nothing"
        before = self.costs.get((operation, result), (0, 0))
        self.costs[operation, result] = (before[0] + times, before[1] + cycles)

    def _inside(self, instruction: Instruction, times: int) -> int:
        if instruction.operation == "while":
            return self._loop(instruction, times)
        if instruction.operation == "conditional":
            return max((self.walk(name, times) for name in instruction.branches), default=0)
        if instruction.operation == "call":
            return self.walk(instruction.named("to_apply"), times)
        if instruction.operation == "custom-call":
            self.kernels += times * ("tpu_custom_call" in instruction.text)
        return 0

    def _loop(self, instruction: Instruction, times: int) -> int:
        body, trips = instruction.named("body"), self.program.trips(instruction)
        if trips is None:
            self.unknown.append(body)
        cycles = self.walk(body, times * (trips or 1))
        self.loops.append(Loop(body, trips or 1, cycles))
        return (trips or 1) * cycles
