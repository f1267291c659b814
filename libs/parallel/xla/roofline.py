"""What a compiled program does on one chip: operations of its matrix products, bytes to and from HBM, and what chips
exchange. All with loops counted; and the time that a chip at its peaks would need for that.

Counted, not estimated: a bound from below for this program, which nothing reaches. Kernel calls (Pallas) count nothing.
What the compiler itself expects is `cycles`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from libs.parallel.xla.hlo import Array, Instruction, Program
from libs.parallel.xla.topology import Chip

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# How the TPU compiler names the fusion that it makes of an all-reduce of which each chip keeps a part.
REDUCE_SCATTER = "all-reduce-scatter"
# These move nothing: names of what is there, or a computation that is walked through by itself.
_FREE = frozenset(
    (
        "parameter",
        "constant",
        "get-tuple-element",
        "tuple",
        "bitcast",
        "while",
        "conditional",
        "call",
        "after-all",
        "partition-id",
        "replica-id",
        "opt-barrier",
        "add-dependency",
        "iota",
    )
)
_SLICES = frozenset(("dynamic-slice", "slice", "gather"))
_FIELD = re.compile(r"(\w+)=([\-\dx_]+)")


class Counted(NamedTuple):
    """flops: two for each multiplication and addition of a matrix product. hbm_bytes: read and written.

    collectives: how many of each kind; in_loops: those in bodies of loops; exchanged: their bytes, before they are cut.
    """

    flops: int
    hbm_bytes: int
    exchanged: dict[str, int]
    collectives: dict[str, int]
    in_loops: dict[str, int]

    def seconds(self, chip: Chip) -> float:
        """No less than this: products at the chip's peak, or bytes at its bandwidth, whichever takes longer."""
        return max(self.flops / chip.peak_bf16, self.hbm_bytes / chip.bandwidth)


def count(program: Program) -> Counted:
    """Of an optimised program, as one chip runs it."""
    counter = _Counter(program)
    for at in program.executed():
        for instruction in program.of(at.computation):
            counter.add(instruction, at.computation, at.times, at.in_loop)
    return Counted(counter.flops, counter.nbytes, counter.exchanged, counter.collectives, counter.in_loops)


class _Counter:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.results = {name: {i.name: i for i in inside} for name, inside in program.computations.items()}
        self.flops = self.nbytes = 0
        self.exchanged: dict[str, int] = {}
        self.collectives: dict[str, int] = {}
        self.in_loops: dict[str, int] = {}

    def add(self, instruction: Instruction, computation: str, times: int, in_loop: bool) -> None:
        kind = _kind(instruction)
        if kind in COLLECTIVES:
            self.collectives[kind] = self.collectives.get(kind, 0) + times
            self.in_loops[kind] = self.in_loops.get(kind, 0) + (times if in_loop else 0)
            self.exchanged[kind] = self.exchanged.get(kind, 0) + times * self._exchanged(kind, instruction, computation)
        self.flops += times * self._flops(instruction, computation)
        self.nbytes += times * self._bytes(instruction, computation)

    def _operand(self, computation: str, name: str) -> tuple[Array, ...]:
        found = self.results[computation].get(name)
        return () if found is None else found.arrays

    def _operands(self, instruction: Instruction, computation: str) -> Iterator[Array]:
        for name in instruction.operands:
            yield from self._operand(computation, name)

    def _exchanged(self, kind: str, instruction: Instruction, computation: str) -> int:
        """What is gathered, or what is added up. One that starts and ends apart also lists its operands as results."""
        given = sum(u.nbytes for u in self._operands(instruction, computation))
        if kind != "all-gather":
            return given
        made = sum(u.nbytes for u in instruction.arrays)
        return made - given if instruction.operation.endswith("-start") else made

    def _flops(self, instruction: Instruction, computation: str) -> int:
        if instruction.operation == "fusion":
            inside = instruction.named("calls")
            return sum(self._flops(one, inside) for one in self.program.of(inside))
        if instruction.operation not in ("convolution", "dot"):
            return 0
        left, right = (self._operand(computation, name)[0].shape for name in instruction.operands[:2])
        made = instruction.arrays[0].shape
        if instruction.operation == "dot":
            return 2 * math.prod(made) * math.prod(left[dim] for dim in _dims(instruction.text))
        return convolution_flops(instruction.text, left, right, made)

    def _bytes(self, instruction: Instruction, computation: str) -> int:
        operation = instruction.operation
        if operation in _FREE or operation.endswith("-done"):
            return 0
        made = [u for u in instruction.arrays if not u.on_chip]
        read = [u for u in self._operands(instruction, computation) if not u.on_chip]
        if operation == "fusion":
            return self._fusion_bytes(instruction, computation)
        if operation in _SLICES:
            return 2 * sum(u.nbytes for u in made)
        if operation == "dynamic-update-slice":
            return 2 * self._operand(computation, instruction.operands[1])[0].nbytes
        if operation.endswith("-start"):
            # Its result lists what it reads, what it makes, and flags: each once.
            return sum(u.nbytes for u in made)
        return sum(u.nbytes for u in (*made, *read))

    def _fusion_bytes(self, instruction: Instruction, computation: str) -> int:
        """Operands of which only slices are read count as these, and what is updated in place as what is written."""
        name = instruction.named("calls")
        inside = self.program.of(name)
        parameters = sorted(
            (i for i in inside if i.operation == "parameter"),
            key=lambda i: int(i.text.split("parameter(")[1].split(")")[0]),
        )
        total = 0
        for given, parameter in zip(instruction.operands, parameters, strict=False):
            if any(u.on_chip for u in self._operand(computation, given)):
                continue
            whole = sum(u.nbytes for u in parameter.arrays)
            total += min(whole, self._read(name, inside, parameter.name))
        for array, root in self._made(instruction, inside):
            if array.on_chip:
                continue
            update = root is not None and root.operation == "dynamic-update-slice"
            total += self._operand(name, root.operands[1])[0].nbytes if update and root is not None else array.nbytes
        return total

    def _read(self, computation: str, inside: Sequence[Instruction], parameter: str) -> int:
        """Bytes that a fusion reads of a parameter, seen through bitcasts."""
        total = 0
        for user in (i for i in inside if parameter in i.operands):
            if user.operation == "bitcast":
                total += self._read(computation, inside, user.name)
            elif user.operation in _SLICES and user.operands[0] == parameter:
                total += sum(u.nbytes for u in user.arrays)
            elif user.operation == "dynamic-update-slice" and user.operands[0] == parameter:
                continue
            else:
                total += sum(u.nbytes for u in self._operand(computation, parameter))
        return total

    def _made(
        self, instruction: Instruction, inside: Sequence[Instruction]
    ) -> Iterator[tuple[Array, Instruction | None]]:
        """Each array of a fusion's result, and what makes it, seen through bitcasts."""
        by_name = {i.name: i for i in inside}
        root = next((i for i in inside if i.text.lstrip().startswith("ROOT")), None)
        makers = [root] if root is None or root.operation != "tuple" else [by_name.get(n) for n in root.operands]
        for number, array in enumerate(instruction.arrays):
            maker = makers[number] if number < len(makers) else None
            while maker is not None and maker.operation == "bitcast":
                maker = by_name.get(maker.operands[0])
            yield array, maker


def _kind(instruction: Instruction) -> str:
    """Of a collective, also where it starts apart from its end or is a fusion."""
    if instruction.operation == "fusion" and instruction.named("calls").startswith(REDUCE_SCATTER):
        return "reduce-scatter"
    return instruction.operation.removesuffix("-start")


def _dims(text: str) -> list[int]:
    listed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", text)
    return [int(n) for n in listed.group(1).split(",") if n] if listed else []


def convolution_flops(text: str, left: Sequence[int], right: Sequence[int], made: Sequence[int]) -> int:
    """Of one convolution, which is how the TPU compiler writes every matrix product: batches and heads are places of a
    window of which only those count that fall on an operand.

    text: with window={...} and dim_labels=... . Formula: two times output batch and features, input features of the
    kernel, and for each spatial dimension the pairs of output and kernel place that meet.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", text)
    assert labels is not None, f"a convolution without labels: {text[:120]}"
    of_left, of_right, of_made = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", text)
    fields = dict(_FIELD.findall(window.group(1))) if window else {}
    total = 2 * made[of_made.index("b")] * made[of_made.index("f")] * right[of_right.index("i")]
    for place, digit in enumerate(sorted(letter for letter in of_left if letter.isdigit())):

        def field(name: str, default: str, at: int = place) -> str:
            return fields[name].split("x")[at] if name in fields else default

        low = int(field("pad", "0_0").split("_")[0])
        stride, dilated, spread = (int(field(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        size, n_kernel, n_made = (
            shape[letters.index(digit)] for shape, letters in ((left, of_left), (right, of_right), (made, of_made))
        )
        reach = (size - 1) * dilated
        total *= sum(
            0 <= (at := o * stride - low + k * spread) <= reach and at % dilated == 0
            for o in range(n_made)
            for k in range(n_kernel)
        )
    return total
