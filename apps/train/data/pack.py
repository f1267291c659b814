"""All documents of one split: plain files, context graphs and translation units, in the mix asked for.

For `build`. Not for windows, which are cut when training (see `libs.model.text.shards`).
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterator

from apps.train.data.context import context_documents
from apps.train.data.material import Draft, Material, budget, chance, cut_at_lines, draft
from apps.train.data.options import BuildOptions
from apps.train.data.source import IMPLEMENTATION
from libs.model.text.document import Kind, Role, overhead

MAX_HEADER_USES = 4
_EOD = 1


def documents(material: Material, options: BuildOptions) -> Iterator[Draft]:
    """Every document of the split, kind by kind; deterministic."""
    most, seed, mix = options.document_tokens, options.seed, options.mix
    tokens = material.source_tokens
    # Markers count too, so a quota of all source tokens would leave the last files out.
    files = math.inf if mix.file == 1 else mix.file * tokens
    yield from _until(file_documents(material, most, seed), files)
    yield from _until(context_documents(material, most, seed), mix.callgraph * tokens)
    yield from _until(unit_documents(material, most, seed), mix.unit * tokens)


def file_documents(material: Material, most: int, seed: int) -> Iterator[Draft]:
    """Each file by itself, in seeded order; one too long for a document is cut at line starts into parts."""
    paths = [file.path for file in material.graph.files]
    for i in sorted(range(len(paths)), key=lambda i: (chance(seed, paths[i]), i)):
        room = most - overhead(material.section(Role.FILE, i, material.file_ids[i])) - _EOD
        pieces = cut_at_lines(material.tokenizer, material.file_ids[i], room)
        for number, piece in enumerate(pieces):
            part = (number, len(pieces)) if len(pieces) > 1 else None
            yield draft(material, Kind.FILE, i, [material.section(Role.FILE, i, piece)], [i], part=part)


def unit_documents(material: Material, most: int, seed: int) -> Iterator[Draft]:
    """A source file after the headers it includes, in dependency order;
    headers as roots where there is no source.
    """
    graph = material.graph
    sources = {f.package for f in graph.files if os.path.splitext(f.path)[1].lower() in IMPLEMENTATION}
    uses: dict[int, int] = defaultdict(int)
    roots = [
        i
        for i, file in enumerate(graph.files)
        if graph.includes.direct[i]
        and (os.path.splitext(file.path)[1].lower() in IMPLEMENTATION or file.package not in sources)
    ]
    for root in sorted(roots, key=lambda i: (chance(seed, "unit:" + graph.files[i].path), i)):
        cost = _unit_cost(material, root) + 1 + _EOD
        left = min(max(budget(seed, "unit length:" + graph.files[root].path, most), 2 * cost), most) - cost
        chosen = _headers(material, root, left, uses)
        if left < 0 or not chosen:
            continue
        order = _dependency_order(material, root, chosen)
        sections = [material.section(Role.UNIT, i, material.file_ids[i]) for i in order]
        yield draft(material, Kind.UNIT, root, sections, order, target=graph.files[root].path)


def _unit_cost(material: Material, i: int) -> int:
    return int(material.file_ids[i].size) + int(material.path_ids[i].size) + 2


def _headers(material: Material, root: int, room: int, uses: dict[int, int]) -> set[int]:
    """Files that `root` includes, nearest first, while they fit into `room` tokens."""
    chosen: set[int] = set()
    seen, frontier = {root}, [root]
    while frontier:
        reached: list[int] = []
        for i in (j for f in frontier for j in material.graph.includes.direct[f]):
            if i in seen:
                continue
            seen.add(i)
            cost = _unit_cost(material, i)
            if cost <= room and uses[i] < MAX_HEADER_USES:
                chosen.add(i)
                uses[i] += 1
                room -= cost
                reached.append(i)
        frontier = reached
    return chosen


def _dependency_order(material: Material, root: int, chosen: set[int]) -> list[int]:
    """Included before including, `root` last; include cycles are cut where they close."""
    order: list[int] = []
    seen: set[int] = set()
    stack: list[tuple[int, bool]] = [(root, False)]
    while stack:
        i, expanded = stack.pop()
        if expanded:
            order.append(i)
            continue
        if i in seen:
            continue
        seen.add(i)
        stack.append((i, True))
        stack += [(j, False) for j in reversed(material.graph.includes.direct[i]) if j in chosen]
    return order


def _until(made: Iterator[Draft], tokens: float) -> Iterator[Draft]:
    """Documents until their tokens reach the quota; a quota of 0 makes none."""
    spent = 0
    while spent < tokens:
        made_next = next(made, None)
        if made_next is None:
            return
        spent += int(made_next.ids.size)
        yield made_next
