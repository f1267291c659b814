"""Layout of one training document: role markers, file paths and code, closed by the end-of-document token.

For writing documents and reading their parts back, in one place. Not for choosing what goes into a document
(see `apps.train.data.pack`).

    <|callers|><|path|>a.h<|code|>...<|target|><|path|>b.cc<|code|>...<|callees|><|path|>c.h<|code|>...<|eod|>
    <|file|><|path|>a.h<|code|>...<|eod|>
    <|unit|><|path|>a.h<|code|>...<|path|>b.cc<|code|>...<|eod|>        headers first, in dependency order

A role marker stands once before the first path of its role (no blanks around markers).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from libs.model.text.tokenizer import CALLEES, CALLERS, CODE, FILE, PATH, TARGET, UNIT, Ids, Tokenizer


class Role(StrEnum):
    """What a section is to its document."""

    CALLERS = "callers"
    TARGET = "target"
    CALLEES = "callees"
    FILE = "file"
    UNIT = "unit"


class Kind(StrEnum):
    """What a document is made of."""

    CALLGRAPH = "callgraph"
    FILE = "file"
    UNIT = "unit"


MARKERS: dict[Role, str] = {
    Role.CALLERS: CALLERS,
    Role.TARGET: TARGET,
    Role.CALLEES: CALLEES,
    Role.FILE: FILE,
    Role.UNIT: UNIT,
}


class Section(NamedTuple):
    """Code of one file in one role, as ids without markers."""

    role: Role
    path: str
    path_ids: Ids
    code_ids: Ids


class SectionSpan(BaseModel):
    """Where the code of a section lies in its document: tokens [start, end)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Role
    path: str
    start: int
    end: int


class DocumentMeta(BaseModel):
    """What is known of one stored document (one line of `documents.jsonl`).

    bytes: what its tokens stand for (paths included, markers not). tokens: with markers and end-of-document.
    part: (number from 0, count) when a file was too long for one document. ambiguity: over the calls shown,
    how many definitions fitted equally well besides the one taken.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    split: str
    index: int
    kind: Kind
    package: str
    paths: tuple[str, ...]
    licences: tuple[str, ...]
    bytes: int
    tokens: int
    target: str | None = None
    part: tuple[int, int] | None = None
    ambiguity: int = 0
    sections: tuple[SectionSpan, ...]


class ReadSection(NamedTuple):
    """A section read back from ids."""

    role: Role
    path: str
    code: bytes


def overhead(section: Section) -> int:
    """Most tokens that `section` takes beyond its code: role marker, path marker, path, code marker."""
    return 3 + int(section.path_ids.size)


def assemble(tokenizer: Tokenizer, sections: Sequence[Section]) -> tuple[Ids, tuple[SectionSpan, ...]]:
    """Ids (n,) of the document with its trailing end-of-document token, and where each section's code lies."""
    assert sections, "a document needs a section"
    special = {name: np.array([i], dtype=np.int32) for name, i in tokenizer.special_ids.items()}
    parts: list[Ids] = []
    spans: list[SectionSpan] = []
    position, previous = 0, None
    for section in sections:
        head = [special[PATH], section.path_ids, special[CODE]]
        if section.role is not previous:
            head.insert(0, special[MARKERS[section.role]])
        previous = section.role
        start = position + sum(int(part.size) for part in head)
        position = start + int(section.code_ids.size)
        parts += [*head, section.code_ids]
        spans.append(SectionSpan(role=section.role, path=section.path, start=start, end=position))
    parts.append(np.array([tokenizer.eod_id], dtype=np.int32))
    return np.concatenate(parts), tuple(spans)


def read_sections(tokenizer: Tokenizer, ids: Ids) -> list[ReadSection]:
    """The sections of one document; the inverse of `assemble` as far as bytes go. Works on a cut-off
       document.
    Code before the first path marker (a document that begins in its middle) has no section and is left out.
    """
    roles = {tokenizer.special_ids[name]: role for role, name in MARKERS.items()}
    path_id, code_id = tokenizer.special_ids[PATH], tokenizer.special_ids[CODE]
    stops = {*roles, path_id, code_id, tokenizer.eod_id}
    marks = [i for i, token in enumerate(ids.tolist()) if token in stops] + [int(ids.size)]
    sections: list[ReadSection] = []
    role: Role | None = None
    path: str | None = None
    for begin, end in itertools.pairwise(marks):
        token, body = int(ids[begin]), ids[begin + 1 : end]
        if token in roles:
            role = roles[token]
        elif token == path_id:
            path = tokenizer.decode(body).decode("utf-8", "surrogateescape")
        elif token == code_id and role is not None and path is not None:
            sections.append(ReadSection(role, path, tokenizer.decode(body)))
    return sections
