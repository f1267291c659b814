"""Context-graph documents: callers of a function, the function, its callees, from all files of the split.

For documents of kind "callgraph". Not for resolving calls (see `callgraph`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from apps.train.data.callgraph import Edge
from apps.train.data.material import Draft, Material, budget, chance, draft
from libs.model.text.document import Kind, Role, Section
from libs.model.text.tokenizer import Ids

MAX_USES = 8  # how often one function may be context; as target it appears once
_CALLER_HOPS, _CALLEE_HOPS = 8, 16
_CALLER_SHARE = 0.5
_LEAST_FILL = 0.25
_MARKER_TOKENS = 6  # three role markers, path and code marker of the target, end of document


class _Taken(NamedTuple):
    hop: int
    node: int
    beside: int


def context_documents(material: Material, most: int, seed: int) -> Iterator[Draft]:
    """Documents in a seeded order of targets, each of a seeded length up to `most` tokens.

    A target whose surroundings do not fill a quarter of the length drawn for it is passed over: without that
    rule most documents would be a function and its one callee, and hardly any would be long.
    """
    graph = material.graph
    uses: Counter[int] = Counter()
    names = {
        n: f"{graph.files[graph.nodes[n].file].path}:{graph.nodes[n].function.start}" for n in material.function_ids
    }
    for target in sorted(names, key=lambda n: (chance(seed, names[n]), n)):
        file = graph.nodes[target].file
        fixed = int(material.function_ids[target].size) + int(material.path_ids[file].size) + _MARKER_TOKENS
        length = min(max(budget(seed, "length:" + names[target], most), 2 * fixed), most)
        if fixed >= length:
            continue
        shown = {target}
        room = int((length - fixed) * _CALLER_SHARE)
        before, spent = _collect(material, target, graph.callers, room, _CALLER_HOPS, uses, shown)
        room = length - fixed - spent
        after, spent_after = _collect(material, target, graph.callees, room, _CALLEE_HOPS, uses, shown)
        if fixed + spent + spent_after < _LEAST_FILL * length or len(shown) == 1:
            continue
        uses.update(shown - {target})
        yield _document(material, target, before, after)


def _document(material: Material, target: int, before: list[_Taken], after: list[_Taken]) -> Draft:
    graph = material.graph
    file = graph.nodes[target].file
    sections = [
        *_sections(material, Role.CALLERS, before, farthest_first=True),
        material.section(Role.TARGET, file, material.function_ids[target]),
        *_sections(material, Role.CALLEES, after, farthest_first=False),
    ]
    return draft(
        material,
        Kind.CALLGRAPH,
        file,
        sections,
        [file, *(graph.nodes[taken.node].file for taken in (*before, *after))],
        target=graph.nodes[target].function.name,
        ambiguity=sum(taken.beside for taken in (*before, *after)),
    )


def _collect(
    material: Material,
    target: int,
    edges: Sequence[Sequence[Edge]],
    room: int,
    hops: int,
    uses: Counter[int],
    shown: set[int],
) -> tuple[list[_Taken], int]:
    """Functions around `target`, nearest first, while they fit into `room` tokens; what they take of it."""
    graph = material.graph
    taken: list[_Taken] = []
    spent, frontier = 0, [target]
    for hop in range(1, hops + 1):
        reached: list[int] = []
        for edge in (edge for node in frontier for edge in edges[node]):
            file = graph.nodes[edge.node].file
            # Path and separator are counted for every function, although neighbours share a path.
            cost = int(material.function_ids[edge.node].size) + int(material.path_ids[file].size) + 2
            cost += int(material.separator.size)
            if edge.node in shown or uses[edge.node] >= MAX_USES or spent + cost > room:
                continue
            shown.add(edge.node)
            spent += cost
            taken.append(_Taken(hop, edge.node, edge.beside))
            reached.append(edge.node)
        frontier = reached
    return taken, spent


def _sections(material: Material, role: Role, taken: list[_Taken], *, farthest_first: bool) -> list[Section]:
    """One section per hop and file, functions in source order; the nearest stand next to the target."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for hop, node, _ in taken:
        groups[-hop if farthest_first else hop, material.graph.nodes[node].file].append(node)
    sections: list[Section] = []
    for (_, file), nodes in sorted(groups.items()):
        parts: list[Ids] = []
        for node in sorted(nodes):
            parts += [material.separator, material.function_ids[node]]
        sections.append(material.section(role, file, np.concatenate(parts[1:])))
    return sections
