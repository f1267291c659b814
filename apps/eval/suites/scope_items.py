"""Generator of the suite `scope`: pairs of a name that is in scope and one that is not, and nothing else different.

Pure: the same split, lengths and seed give the same items. Not for asking or scoring (scope.py).

    out_of_scope  a variable of the file, against a local variable of another function
    shadowed      a member of the parameter's type, against one of the type of the global that the parameter hides
    namespace     a variable of the namespace that is named, against one of another namespace
    real          as it stands in a file: a local variable, against one of an earlier function (found by tree-sitter)

Both names of a made pair come from one distribution, stand equally often in the text and in either order, so that a
model that cannot tell them apart is right half of the time. In a real pair both have equally many tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from apps.eval.suites.cpp import Function, Local, functions, locals_of, value_names
from apps.eval.suites.haystack import NO_IDS, Haystack, Ids, Line, Place, Sources, put_in
from apps.eval.suites.needle_items import Draw
from apps.eval.suites.suite import SuiteInput
from libs.model.text.document import MARKERS, Kind, Role
from libs.model.text.tokenizer import CODE, PATH

DISTANCES = (128, 512, 2048, 8192, 32_768)  # tokens from the declaration to the use
_ROOM = 400  # tokens that declarations and use take at most, per distance
_PER_FILE = 3
SHORT = 4096
_CONTROLS = 2


class Pair(NamedTuple):
    """One minimal pair. lines: its declarations. ask: the text before the name. right, wrong: with a leading blank
    where the text has one, because it belongs to the name's token."""

    lines: tuple[bytes, ...]
    ask: bytes
    right: bytes
    wrong: bytes


class Item(NamedTuple):
    """distance: of the grid; placed: tokens from the end of the declarations to the name, None for a control."""

    item: str
    kind: str
    distance: int | None
    placed: int | None
    prompt: Ids
    right: bytes
    wrong: bytes


class Context(NamedTuple):
    """Items that share a context. `reason` is set, and there are no items, when it could not be made."""

    name: str
    length: int
    ids: Ids
    documents: tuple[int, ...]
    items: tuple[Item, ...]
    reason: str | None


class _Known(NamedTuple):
    function: Function
    variables: list[Local]


def _variable(draw: Draw) -> bytes:
    return "_".join(draw.words()[:2]).lower().encode() + b"_" + draw.words()[0].lower().encode()


def _either(draw: Draw, *lines: bytes) -> tuple[bytes, ...]:
    return tuple(draw.random.sample(lines, len(lines)))


def _function(draw: Draw, body: bytes) -> bytes:
    return b"static int " + _variable(draw) + b"() { " + body + b" }"


def _out_of_scope(draw: Draw) -> Pair:
    right, wrong, value = _variable(draw), _variable(draw), draw.value()
    # Each name twice: declared, and returned by a function.
    ours = b"static int " + right + b" = " + value + b"; " + _function(draw, b"return " + right + b";")
    theirs = _function(draw, b"int " + wrong + b" = " + draw.value() + b"; return " + wrong + b";")
    ask = b"\n\nstatic int " + _variable(draw) + b"() {\n  return"
    return Pair(_either(draw, ours, theirs), ask, b" " + right, b" " + wrong)


def _shadowed(draw: Draw) -> Pair:
    right, wrong, hidden = _variable(draw), _variable(draw), _variable(draw)
    inner, outer = ("".join(draw.words()[:2]).encode() + b"Info" for _ in range(2))
    types = _either(
        draw, b"struct " + inner + b" { int " + right + b"; };", b"struct " + outer + b" { int " + wrong + b"; };"
    )
    ask = b"\n\nstatic int " + _variable(draw) + b"(const " + inner + b"& " + hidden + b") {\n  return " + hidden + b"."
    return Pair((*types, b"static " + outer + b" " + hidden + b";"), ask, right, wrong)


def _namespace(draw: Draw) -> Pair:
    right, wrong, here, there = (_variable(draw) for _ in range(4))
    lines = (
        b"namespace " + space + b" { static int " + name + b" = " + draw.value() + b"; }"
        for space, name in ((here, right), (there, wrong))
    )
    ask = b"\n\nstatic int " + _variable(draw) + b"() {\n  return " + here + b"::"
    return Pair(_either(draw, *lines), ask, right, wrong)


def _control(draw: Draw) -> Pair:
    """Two names of random letters, neither of them declared."""
    right, wrong = (bytes(draw.random.choices(b"abcdefghijklmnopqrstuvwxyz", k=12)) for _ in range(2))
    return Pair((), b"\n\nstatic int " + _variable(draw) + b"() {\n  return", b" " + right, b" " + wrong)


KINDS: Mapping[str, Callable[[Draw], Pair]] = MappingProxyType(
    {"out_of_scope": _out_of_scope, "shadowed": _shadowed, "namespace": _namespace}
)


def made_contexts(inputs: SuiteInput, lengths: Sequence[int], items: int | None, seed: int) -> Iterator[Context]:
    """Contexts of real text with made pairs in them: every kind at every distance that the length has room for.

    Args:
        items: contexts per length; None: four, and one above 4,096 tokens.
    """
    sources = Sources(inputs)
    for length in lengths:
        distances = [distance for distance in DISTANCES if distance <= 3 * length // 4]
        for repeat in range(items or (4 if length <= SHORT else 1)):
            yield _made(inputs, sources, length, distances, f"{length}/{repeat}", f"{seed}:scope:{length}/{repeat}")


def _made(inputs: SuiteInput, sources: Sources, length: int, distances: Sequence[int], name: str, key: str) -> Context:
    start, room = random.Random(key).randrange(len(sources)), length - _ROOM * len(distances)
    found = (sources.haystack(room, start + step) for step in range(len(sources) if distances and room > 0 else 0))
    haystack = next((h for h in found if h is not None), None)
    if haystack is None:
        return Context(name, length, NO_IDS, (), (), f"no text of {length} tokens and distances {list(distances)}")
    draw = Draw(inputs.tokenizer.decode(haystack.ids), key)
    pairs = [(kind, distance, make(draw)) for distance in distances for kind, make in KINDS.items()]
    lines: list[Line] = []
    nearer = 0  # tokens of the declarations that will stand between a place and the end; nearest pairs come first
    for distance in distances:
        texts = [text for _, at, pair in pairs if at == distance for text in pair.lines]
        size = sum(int(inputs.tokenizer.encode(text).size) for text in texts)
        place = _place_before(haystack, max(0, distance - nearer - size // 2))
        lines += [Line(place, text) for text in texts]
        nearer += size
    ids, starts = put_in(inputs, haystack, lines)
    encode = inputs.tokenizer.encode
    items: list[Item] = []
    at = 0
    for kind, distance, pair in pairs:
        prompt, last = encode(pair.ask), starts[at + len(pair.lines) - 1]
        at += len(pair.lines)
        placed = int(ids.size + prompt.size) - last - int(encode(pair.lines[-1]).size)
        items.append(Item(f"{name}/{kind}/{distance}", kind, distance, placed, prompt, pair.right, pair.wrong))
    for number in range(_CONTROLS):
        pair = _control(draw)
        items.append(Item(f"{name}/control/{number}", "control", None, None, encode(pair.ask), pair.right, pair.wrong))
    return Context(name, length, ids, haystack.documents, tuple(items), None)


def _place_before(haystack: Haystack, distance: int) -> Place:
    """The place whose distance to the end is nearest to `distance`."""
    wanted = haystack.ids.size - distance
    return min(haystack.places, key=lambda place: (abs(place.token - wanted), place.token))


def real_contexts(inputs: SuiteInput, most_tokens: int, wanted: int, seed: int) -> Iterator[Context]:
    """Pairs that stand in files, in drawn order, at most three of a file; a prompt is the whole file up to the name."""
    made = 0
    for document in inputs.drawn:
        if made >= wanted:
            return
        if inputs.metadata[document].kind is not Kind.FILE:
            continue
        for item in _real(inputs, document, seed)[: min(_PER_FILE, wanted - made)]:
            reason = None
            if item.prompt.size + 16 > most_tokens:
                reason = f"{item.prompt.size} tokens before the name, more than {most_tokens - 16}"
            made += reason is None
            items = (item,) if reason is None else ()
            yield Context(item.item, int(item.prompt.size), NO_IDS, (document,), items, reason)


def _real(inputs: SuiteInput, document: int, seed: int) -> list[Item]:
    """Pairs of one file, one per function at most, in a seeded order."""
    tokenizer, section = inputs.tokenizer, inputs.metadata[document].sections[0]
    text = tokenizer.decode(inputs.documents[document][section.start : section.end])
    special = tokenizer.special_ids
    head = [[special[MARKERS[Role.FILE]], special[PATH]], tokenizer.encode(section.path), [special[CODE]]]
    known = [_Known(function, locals_of(text, function)) for function in functions(text)]
    draw = random.Random(f"{seed}:scope:{document}")
    items: list[Item] = []
    for number in draw.sample(range(len(known)), len(known)):
        found = _pair_in(inputs, text, known, number, draw) if len(items) < _PER_FILE else None
        if found is None:
            continue
        declared, use, right, wrong = found
        lead = _lead(text, use)
        prompt = np.concatenate([*head, tokenizer.encode(text[: use - len(lead)])]).astype(np.int32)
        placed = int(tokenizer.encode(text[declared:use]).size)
        distance = next((d for d in DISTANCES if placed <= d), DISTANCES[-1])
        items.append(Item(f"real/{document}/{use}", "real", distance, placed, prompt, lead + right, lead + wrong))
    return items


def _pair_in(
    inputs: SuiteInput, text: bytes, known: Sequence[_Known], number: int, draw: random.Random
) -> tuple[int, int, bytes, bytes] | None:
    """(declaration, use, right name, wrong name) in function `number`, or None."""
    function, variables = known[number]
    start, end = function.node.start_byte, function.node.end_byte
    mine = {local.name: local for local in reversed(variables) if len(local.name) > 2}
    uses = [
        (name, at)
        for name, at in value_names(text, function.body)
        if name in mine and mine[name].at + len(name) < at < mine[name].until
    ]
    earlier = [other for other in known[:number] if other.function.node.end_byte <= start]
    if not uses or not earlier:
        return None
    name, use = draw.choice(uses)
    lead = _lead(text, use)
    size = inputs.tokenizer.encode(lead + name).size
    spans = [(other.function.node.start_byte, other.function.node.end_byte) for other in earlier]
    wrong = sorted({local.name for other in earlier for local in other.variables})
    fitting = [
        other
        for other in wrong
        if inputs.tokenizer.encode(lead + other).size == size
        and other not in text[start:end]  # so no name of this function, nor the beginning of one
        and not other.startswith(name)
        and _only_inside(text[:use], other, spans)
    ]
    return (mine[name].at, use, name, draw.choice(fitting)) if fitting else None


def _lead(text: bytes, at: int) -> bytes:
    """The single blank before a name, which is part of its first token; more than one blank is a token of its own."""
    return b" " if text[at - 1 : at] == b" " and text[at - 2 : at - 1].strip() else b""


def _only_inside(text: bytes, name: bytes, spans: Sequence[tuple[int, int]]) -> bool:
    """Whether `name` stands in `text` inside the spans alone: elsewhere it might be a name of the file."""
    at = text.find(name)
    while at >= 0:
        if not any(start <= at < end for start, end in spans):
            return False
        at = text.find(name, at + 1)
    return True
