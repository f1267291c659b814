"""Who calls whom across files: by qualified name, number of arguments and include reach.

For context-graph documents. Not a linker: where several definitions fit equally well the first is taken and
the others are counted, and a call that fits too many, or only code it cannot see, is left unresolved and
counted.
"""

from __future__ import annotations

import posixpath
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from apps.train.data.parse import Call, Function, ParsedFile
from libs.model.text.manifest import CallGraphStats

MAX_CANDIDATES = 200
MAX_EQUAL = 4


class GraphFile(NamedTuple):
    """One file of the split."""

    path: str
    package: str
    parsed: ParsedFile


class Node(NamedTuple):
    """A function of the graph. parts: its qualified name, split. least: arguments it needs, defaults known."""

    file: int
    function: Function
    parts: tuple[str, ...]
    least: int


class Edge(NamedTuple):
    """A resolved call. beside: definitions that fitted equally well and were not taken."""

    node: int
    beside: int


class Includes:
    """Which files each file sees.

    direct[i]: files that file i names, in source order. reach[i]: bit j is set when i sees j through any chain.
    """

    def __init__(self, files: Sequence[GraphFile]) -> None:
        self._files = files
        self._by_name: dict[str, list[int]] = defaultdict(list)
        for i, file in enumerate(files):
            self._by_name[posixpath.basename(file.path)].append(i)
        self.direct = [self._resolve(i) for i in range(len(files))]

    @cached_property
    def reach(self) -> list[int]:
        """Transitive closure, by repeated union until nothing changes (cycles are common in real headers)."""
        reach = [1 << i for i in range(len(self._files))]
        changed = True
        while changed:
            changed = False
            for i in reversed(range(len(reach))):
                bits = reach[i]
                for j in self.direct[i]:
                    bits |= reach[j]
                if bits != reach[i]:
                    reach[i], changed = bits, True
        return reach

    def _resolve(self, i: int) -> tuple[int, ...]:
        found = (self._find(self._files[i], written) for written in self._files[i].parsed.includes)
        return tuple(dict.fromkeys(j for j in found if j is not None and j != i))

    def _find(self, file: GraphFile, written: str) -> int | None:
        """The file that an include means: beside the includer, else the shortest path ending so, own package first."""
        candidates = self._by_name.get(posixpath.basename(written), [])
        beside = posixpath.normpath(posixpath.join(posixpath.dirname(file.path), written))
        for j in candidates:
            if self._files[j].path == beside:
                return j
        tail = "/" + posixpath.normpath(written).lstrip("./")
        fitting = [j for j in candidates if self._files[j].path.endswith(tail)]
        if not fitting:
            return None
        return min(fitting, key=lambda j: (self._files[j].package != file.package, len(self._files[j].path), j))


class CallGraph:
    """Functions of one split and the calls between them.

    nodes: in order of file and place. callees[n], callers[n]: edges without repetitions, in source order of
    the calls. stats: what resolved and what did not, counted per distinct call of each function.
    """

    def __init__(self, files: Sequence[GraphFile]) -> None:
        self.files = files
        self.includes = Includes(files)
        least = _least_by_declaration(files)
        self.nodes = [
            Node(
                i,
                function,
                tuple(function.name.split("::")),
                min(function.least, least.get((function.name, function.most), function.least)),
            )
            for i, file in enumerate(files)
            for function in file.parsed.functions
        ]
        self._by_last: dict[str, list[int]] = defaultdict(list)
        for n, node in enumerate(self.nodes):
            self._by_last[node.parts[-1]].append(n)
        self._counts: dict[str, int] = defaultdict(int)
        self._memo: dict[tuple[int, tuple[str, ...], Call], Edge | str] = {}
        self.callees = [self._edges(n) for n in range(len(self.nodes))]
        self.callers: list[list[Edge]] = [[] for _ in self.nodes]
        for n, edges in enumerate(self.callees):
            for edge in edges:
                self.callers[edge.node].append(Edge(n, edge.beside))

    @cached_property
    def stats(self) -> CallGraphStats:
        """Counts over the whole graph."""
        names = ("calls", "resolved", "cross_file", "ambiguous", "candidates_beside")
        reasons = ("too_ambiguous", "unreachable", "unknown")
        counts = {name: self._counts[name] for name in (*names, *reasons)}
        return CallGraphStats(functions=len(self.nodes), **counts)

    def _edges(self, n: int) -> list[Edge]:
        """Resolve every call of one function."""
        node = self.nodes[n]
        edges: dict[int, Edge] = {}
        for call in node.function.calls:
            key = (node.file, node.parts[:-1], call)
            if key not in self._memo:
                self._memo[key] = self._resolve(node, call)
            outcome = self._memo[key]
            self._counts["calls"] += 1
            if isinstance(outcome, str):
                self._counts[outcome] += 1
                continue
            self._counts["resolved"] += 1
            self._counts["cross_file"] += self.nodes[outcome.node].file != node.file
            self._counts["ambiguous"] += outcome.beside > 0
            self._counts["candidates_beside"] += outcome.beside
            if outcome.node != n:
                edges.setdefault(outcome.node, outcome)
        return list(edges.values())

    def _resolve(self, caller: Node, call: Call) -> Edge | str:
        """The definition that a call means, or the reason there is none."""
        *qualifier, last = call.name.split("::")
        named = self._by_last.get(last, [])
        if len(named) > MAX_CANDIDATES:
            return "too_ambiguous"
        fitting = [n for n in named if self._fits(self.nodes[n], tuple(qualifier), call.arity)]
        if not fitting:
            return "unknown"
        ranked = [(self._tier(caller, n, bool(qualifier), len(fitting)), n) for n in fitting]
        tier = min(rank for rank, _ in ranked)
        if tier == _UNREACHABLE:
            return "unreachable"
        nearest = [n for rank, n in ranked if rank == tier]
        shared = {n: _common(caller.parts[:-1], self.nodes[n].parts[:-1]) for n in nearest}
        best = [n for n in nearest if shared[n] == max(shared.values())]
        return Edge(best[0], len(best) - 1) if len(best) <= MAX_EQUAL else "too_ambiguous"

    @staticmethod
    def _fits(node: Node, qualifier: tuple[str, ...], arity: int) -> bool:
        most = node.function.most
        if arity < node.least or (most is not None and arity > most):
            return False
        return not qualifier or node.parts[:-1][-len(qualifier) :] == qualifier

    def _tier(self, caller: Node, candidate: int, qualified: bool, fitting: int) -> int:
        """How well the caller sees a definition.

        0: same file. 1: included. 2: the source file of an included header. 3: it includes a header that the
        caller sees too. 4: same package, and the name is qualified or unique.
        """
        here, there = caller.file, self.nodes[candidate].file
        if here == there:
            return 0
        reach = self.includes.reach[here]
        if reach >> there & 1:
            return 1
        shared = [h for h in self.includes.direct[there] if reach >> h & 1]
        stem = _stem(self.files[there].path)
        if any(_stem(self.files[h].path) == stem for h in shared):
            return 2
        if shared:
            return 3
        same_package = self.files[here].package == self.files[there].package
        return 4 if same_package and (qualified or fitting == 1) else _UNREACHABLE


_UNREACHABLE = 5


def _least_by_declaration(files: Sequence[GraphFile]) -> dict[tuple[str, int | None], int]:
    """(qualified name, most arguments) -> fewest that a declaration anywhere allows."""
    least: dict[tuple[str, int | None], int] = {}
    for file in files:
        for declared in file.parsed.defaults:
            key = (declared.name, declared.most)
            least[key] = min(declared.least, least.get(key, declared.least))
    return least


def _stem(path: str) -> str:
    return posixpath.splitext(posixpath.basename(path))[0]


def _common(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    """Length of the common beginning of two scopes."""
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length
