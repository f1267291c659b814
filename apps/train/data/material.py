"""The text of one split as token ids: whole files, single functions, paths; each encoded once.

For the two document makers (`pack`, `context`). Not for choosing anything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from apps.train.data.callgraph import CallGraph
from libs.model.text.document import Kind, Role, Section, SectionSpan, assemble
from libs.model.text.tokenizer import Ids, Tokenizer

_BATCH = 64


class Material:
    """Ids of everything a document can be made of.

    file_ids[i]: file i of the graph. path_ids[i]: its path. function_ids[n]: text of node n, for nodes with
    an edge. separator: what stands between two functions of one section.
    """

    def __init__(
        self,
        graph: CallGraph,
        texts: Sequence[bytes],
        licences: Sequence[str],
        tokenizer: Tokenizer,
        advance: Callable[[int], None],
    ) -> None:
        self.graph, self.licences, self.tokenizer = graph, licences, tokenizer
        self.file_ids = _encode(tokenizer, texts, advance)
        self.path_ids = tokenizer.encode_batch([file.path for file in graph.files])
        self.separator = tokenizer.encode(b"\n\n")
        linked = [n for n in range(len(graph.nodes)) if graph.callees[n] or graph.callers[n]]
        spans = [(graph.nodes[n].file, graph.nodes[n].function) for n in linked]
        pieces = [texts[i][function.start : function.end] for i, function in spans]
        self.function_ids = dict(zip(linked, _encode(tokenizer, pieces, advance), strict=True))

    @property
    def source_tokens(self) -> int:
        """Tokens of all files, each once."""
        return sum(int(ids.size) for ids in self.file_ids)

    def section(self, role: Role, file: int, code_ids: Ids) -> Section:
        """A section with code of one file."""
        return Section(role, self.graph.files[file].path, self.path_ids[file], code_ids)


class Draft(NamedTuple):
    """A finished document before it has a place: ids with end-of-document, and what its metadata will say."""

    ids: Ids
    spans: tuple[SectionSpan, ...]
    kind: Kind
    package: str
    paths: tuple[str, ...]
    licences: tuple[str, ...]
    target: str | None = None
    part: tuple[int, int] | None = None
    ambiguity: int = 0


def draft(
    material: Material,
    kind: Kind,
    main: int,
    sections: Sequence[Section],
    files: Iterable[int],
    *,
    target: str | None = None,
    part: tuple[int, int] | None = None,
    ambiguity: int = 0,
) -> Draft:
    """Assemble `sections`; `main` is the file whose package the document counts for, `files` are all shown."""
    ids, spans = assemble(material.tokenizer, sections)
    shown = list(dict.fromkeys(files))
    return Draft(
        ids=ids,
        spans=spans,
        kind=kind,
        package=material.graph.files[main].package,
        paths=tuple(material.graph.files[i].path for i in shown),
        licences=tuple(sorted({material.licences[i] for i in shown})),
        target=target,
        part=part,
        ambiguity=ambiguity,
    )


def chance(seed: int, key: str) -> float:
    """A number in [0, 1) that depends on `seed` and `key` only."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def budget(seed: int, key: str, most: int) -> int:
    """Length of one document: log-uniform between most / 32 and most, so that all lengths get trained on."""
    return int(most * 2.0 ** (-5.0 * chance(seed, key)))


def _encode(tokenizer: Tokenizer, texts: Sequence[bytes], advance: Callable[[int], None]) -> list[Ids]:
    encoded: list[Ids] = []
    for start in range(0, len(texts), _BATCH):
        batch = texts[start : start + _BATCH]
        encoded += tokenizer.encode_batch(batch)
        advance(sum(map(len, batch)))
    return encoded


def cut_at_lines(tokenizer: Tokenizer, ids: Ids, most: int) -> list[Ids]:
    """`ids` in pieces of at most `most`, each beginning with a token that starts a line if there is one."""
    if ids.size <= most:
        return [ids]
    starts_line = np.array([tokenizer.piece(i).startswith((b"\n", b"\r\n")) for i in range(tokenizer.vocab_size)])
    pieces: list[Ids] = []
    while ids.size > most:
        candidates = np.flatnonzero(starts_line[ids[1 : most + 1]]) + 1
        cut = int(candidates[-1]) if candidates.size else most
        pieces.append(ids[:cut])
        ids = ids[cut:]
    return [*pieces, ids]
