"""Real source text of a wanted length, with places where a line may be put in; and putting lines in.

The text is a document of kind "unit" (several files one after another), as in training. Everything is done on ids that
begin and end where lines do, so that the ids are those of the whole text. Not for what is put in (needle, scope).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from apps.eval.suites.cpp import gaps
from apps.eval.suites.suite import SuiteInput
from libs.flags.errors import UserError
from libs.model.text.document import MARKERS, Kind, Role
from libs.model.text.tokenizer import CODE, PATH

Ids = NDArray[np.int32]
NO_IDS: Ids = np.empty(0, dtype=np.int32)
FULL = 0.85  # of the room that was to be filled; a haystack with less is too short


class Place(NamedTuple):
    """A place between two tokens where a line may be put in: before token `token`, the line break included."""

    token: int
    indent: bytes


class Source(NamedTuple):
    """One file of the split: the head of its section (markers and path), its code, and the places in its code."""

    document: int
    path: str
    head: Ids
    code: Ids
    places: tuple[Place, ...]


class Haystack(NamedTuple):
    """ids: of a unit without end-of-document token. places: ascending. documents: where the text is from."""

    ids: Ids
    places: tuple[Place, ...]
    documents: tuple[int, ...]


class Line(NamedTuple):
    """Text without line break, to be put in at `place`."""

    place: Place
    text: bytes


class Sources:
    """The files of a split in drawn order, read and parsed when first wanted."""

    def __init__(self, inputs: SuiteInput) -> None:
        """Raises UserError when the split has no whole file."""
        self._inputs = inputs
        whole = [i for i in inputs.drawn if inputs.metadata[i].kind is Kind.FILE]
        self._files = whole
        self._read: dict[int, Source] = {}
        self._marker = np.array([inputs.tokenizer.special_ids[MARKERS[Role.UNIT]]], dtype=np.int32)
        if not whole:
            raise UserError("the split holds no document of kind 'file': build the data with --mix file=1,...")

    def haystack(self, room: int, start: int) -> Haystack | None:
        """Files from the `start`-th on, until `room` tokens are full; None when there is too little text.

        The last file ends at one of its places. A file without a fitting place is passed over.
        """
        parts, used = [self._marker], 1
        places: list[Place] = []
        documents: list[int] = []
        for step in range(len(self._files)):
            source = self._source((start + step) % len(self._files))
            cut = source.code.size
            if used + source.head.size + cut > room:
                fitting = [p.token for p in source.places if used + source.head.size + p.token <= room]
                if not fitting:
                    continue
                cut = fitting[-1]
            base = used + source.head.size
            parts += [source.head, source.code[:cut]]
            places += [Place(base + p.token, p.indent) for p in source.places if p.token <= cut]
            documents.append(source.document)
            used = base + cut
            if used >= FULL * room:
                break
        if used < FULL * room or not places:
            return None
        return Haystack(np.concatenate(parts), tuple(places), tuple(documents))

    def _source(self, number: int) -> Source:
        document = self._files[number]
        if document not in self._read:
            self._read[document] = _read(self._inputs, document)
        return self._read[document]

    def __len__(self) -> int:
        return len(self._files)


def _read(inputs: SuiteInput, document: int) -> Source:
    tokenizer, meta = inputs.tokenizer, inputs.metadata[document]
    ids, (section, *_) = inputs.documents[document], meta.sections
    path, code = tokenizer.special_ids[PATH], tokenizer.special_ids[CODE]
    head = np.concatenate([[path], tokenizer.encode(section.path), [code]]).astype(np.int32)
    code_ids = ids[section.start : section.end]
    offsets = np.concatenate([[0], np.cumsum(tokenizer.token_bytes[code_ids])])
    token_at = {int(offset): token for token, offset in enumerate(offsets)}
    found = gaps(tokenizer.decode(code_ids))
    places = tuple(Place(token_at[gap.at], gap.indent) for gap in found if gap.at in token_at)
    return Source(document, section.path, head, code_ids, places)


def nearest_place(haystack: Haystack, depth: float) -> Place:
    """The place nearest to `depth`, 0 for the beginning and 1 for the end; the earlier of two."""
    wanted = depth * haystack.ids.size
    return min(haystack.places, key=lambda place: (abs(place.token - wanted), place.token))


def places_from(haystack: Haystack, place: Place) -> Sequence[Place]:
    """That place and those after it."""
    return haystack.places[bisect_right(haystack.places, place.token - 1, key=lambda p: p.token) :]


def put_in(inputs: SuiteInput, haystack: Haystack, lines: Sequence[Line]) -> tuple[Ids, list[int]]:
    """The ids with the lines in, and where each line's first token is now. Lines of one place keep their order."""
    order = sorted(range(len(lines)), key=lambda i: lines[i].place.token)
    encoded = {i: inputs.tokenizer.encode(b"\n" + lines[i].place.indent + lines[i].text) for i in order}
    parts: list[Ids] = []
    starts = [0] * len(lines)
    done = added = 0
    for i in order:
        token = lines[i].place.token
        parts += [haystack.ids[done:token], encoded[i]]
        starts[i] = token + added
        done, added = token, added + int(encoded[i].size)
    return np.concatenate([*parts, haystack.ids[done:]]), starts
