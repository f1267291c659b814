"""The text of a compiled program (`HloModule.to_string`) as computations of instructions, and how often each runs.

Text work, no jax here. Not for what an instruction costs: `cycles` reads the compiler's estimate, `roofline` counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_NAMED = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_OPERATION = re.compile(r" ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b(pred|bf16|f8\w+|[fsuc]\d+)\[([\d,]*)\](?:\{([^}]*)\})?")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# torch_xla's scan counts with an s64, which the TPU compiler splits into a pair of u32.
_BOUND = re.compile(r"[su](?:32|64)\[\][^ ]* constant\((\d+)\)")
_BRACKETS = {"(": 1, ")": -1, "[": 1, "]": -1, "{": 1, "}": -1}


class Array(NamedTuple):
    """One array of a result. on_chip: the layout puts it into a chip's own memory (VMEM and the like), not into HBM."""

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool

    @property
    def nbytes(self) -> int:
        bits = 8 if self.dtype == "pred" else int(re.findall(r"\d+", self.dtype)[0])
        return math.prod(self.shape) * max(bits, 8) // 8


class Instruction(NamedTuple):
    """operation: HLO's name ("fusion", "all-gather-start", ...). arrays: of its result. operands: names."""

    name: str
    operation: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str

    def named(self, key: str) -> str:
        """The computation under an attribute such as "body"."""
        match = re.search(rf"\b{key}=%?([\w.\-]+)", self.text)
        assert match is not None, f"an operation without {key}: {self.text[:120]}"
        return match.group(1)

    @property
    def branches(self) -> list[str]:
        """The computations of a conditional."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", self.text)
        if listed is not None:
            return re.findall(r"%?([\w.\-]+)", listed.group(1))
        return [self.named("true_computation"), self.named("false_computation")]


class Executed(NamedTuple):
    """A computation that runs by itself, not inside a fusion. times: of one run of the program; branches of a
    conditional count as if each were taken. in_loop: in the body of a while loop."""

    computation: str
    times: int
    in_loop: bool


class Program(NamedTuple):
    computations: Mapping[str, Sequence[Instruction]]
    entry: str

    def of(self, computation: str) -> Sequence[Instruction]:
        return self.computations.get(computation, ())

    def trips(self, loop: Instruction) -> int | None:
        """How often the body of a while runs; None if the text does not say."""
        if match := _TRIPS.search(loop.text):
            return int(match.group(1))
        condition = self.of(loop.named("condition"))
        bounds = [int(bound) for inside in condition for bound in _BOUND.findall(inside.text)]
        return max(bounds, default=0) or None

    def executed(self) -> Iterator[Executed]:
        """The entry and all that it runs. A loop of unknown length counts once."""
        yield from self._executed(Executed(self.entry, 1, False))

    def _executed(self, at: Executed) -> Iterator[Executed]:
        yield at
        for inside in self.of(at.computation):
            if inside.operation == "while":
                times = at.times * (self.trips(inside) or 1)
                yield from self._executed(Executed(inside.named("body"), times, True))
            elif inside.operation == "conditional":
                for branch in inside.branches:
                    yield from self._executed(at._replace(computation=branch))
            elif inside.operation == "call":
                yield from self._executed(at._replace(computation=inside.named("to_apply")))


def parse(text: str) -> Program:
    """Read a module's text."""
    computations: dict[str, list[Instruction]] = {}
    current: list[Instruction] | None = None
    entry = ""
    for line in text.splitlines():
        match = _COMPUTATION.match(line) if not line.startswith((" ", "HloModule")) else None
        if match is not None:
            current = computations.setdefault(match.group(2), [])
            entry = match.group(2) if match.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (named := _NAMED.match(line)) is not None:
            current.append(_instruction(named.group(1), line, named.end()))
    return Program(computations, entry)


def _instruction(name: str, line: str, start: int) -> Instruction:
    # The type of a result is one word, or a tuple in parentheses.
    after_type = _closed(line, start) if line[start] == "(" else line.find(" ", start)
    operation = _OPERATION.match(line, after_type)
    assert operation is not None, f"no operation in: {line[:120]}"
    inside = line[operation.end() : _closed(line, operation.end() - 1) - 1]
    return Instruction(name, operation.group(1), arrays_of(line[start:after_type]), _operands(inside), line)


def _closed(line: str, at: int) -> int:
    """Where the bracket that opens at `at` has closed."""
    depth = 0
    for place in range(at, len(line)):
        depth += _BRACKETS.get(line[place], 0)
        if depth == 0:
            return place + 1
    raise AssertionError(f"a bracket that does not close: {line[:120]}")


def _operands(inside: str) -> tuple[str, ...]:
    """Names; with or without types before them."""
    found, depth, start = [], 0, 0
    for place, letter in enumerate(f"{inside},"):
        depth += _BRACKETS.get(letter, 0)
        if letter == "," and depth == 0:
            words = re.sub(r"/\*.*?\*/", "", inside[start:place]).split()
            found.extend(words[-1:])
            start = place + 1
    return tuple(word.removeprefix("%") for word in found)


def arrays_of(text: str) -> tuple[Array, ...]:
    """The arrays of a type, in order."""
    return tuple(
        Array(dtype, tuple(int(n) for n in shape.split(",") if n), re.search(r"S\([1-9]", layout or "") is not None)
        for dtype, shape, layout in _ARRAY.findall(text)
    )
