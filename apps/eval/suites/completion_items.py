"""Generator of the suite `completion`: a line, a block or a node of the syntax tree taken out of a real file.

Pure: the same split and seed give the same items. Not for asking or scoring (completion.py).

    line   the text of one line inside a function
    block  what stands between the braces of a function or a statement
    node   an expression, call, declaration or statement as the parser delimits it
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import tree_sitter

from apps.eval.suites.cpp import functions, walk
from apps.eval.suites.haystack import Ids
from apps.eval.suites.suite import SuiteInput
from libs.model.text.document import MARKERS, Kind, Role
from libs.model.text.tokenizer import CODE, FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX, PATH

SPANS = ("line", "block", "node")
ORDERS = ("psm", "spm")
_BYTES: Mapping[str, tuple[int, int]] = MappingProxyType({"line": (8, 120), "block": (16, 400), "node": (8, 120)})
_NODES = frozenset(
    {
        "argument_list", "assignment_expression", "binary_expression", "call_expression", "conditional_expression",
        "condition_clause", "declaration", "expression_statement", "initializer_list", "parameter_list",
        "return_statement",
    }
)  # fmt: skip


class Item(NamedTuple):
    """before, after: the file around the span; middle: the reference. head: the document's markers and path.

    reason: why it is not asked, None when it is.
    """

    item: str
    document: int
    span: str
    head: Ids
    before: bytes
    middle: bytes
    after: bytes
    reason: str | None


def items(inputs: SuiteInput, most_tokens: int, wanted: int, seed: int) -> Iterator[Item]:
    """One item per kind of span and file, in drawn order, until `wanted` files gave some; longer files say so."""
    made = 0
    for document in inputs.drawn:
        if made == wanted:
            return
        meta = inputs.metadata[document]
        if meta.kind is not Kind.FILE:
            continue
        found = _of_file(inputs, document, most_tokens, seed)
        made += any(item.reason is None for item in found)
        yield from found


def _of_file(inputs: SuiteInput, document: int, most_tokens: int, seed: int) -> list[Item]:
    section = inputs.metadata[document].sections[0]
    tokenizer, special = inputs.tokenizer, inputs.tokenizer.special_ids
    text = tokenizer.decode(inputs.documents[document][section.start : section.end])
    path = tokenizer.encode(section.path).tolist()
    head = np.array([special[MARKERS[Role.FILE]], special[PATH], *path, special[CODE]], dtype=np.int32)
    size = inputs.metadata[document].tokens + 64  # the three markers, and that a cut text has a few tokens more
    reason = f"{size} tokens, more than {most_tokens}" if size > most_tokens else None
    draw = random.Random(f"{seed}:completion:{document}")
    found = []
    for span, ranges in _ranges(text).items():
        least, most = _BYTES[span]
        fitting = [(a, b) for a, b in ranges if least <= b - a <= most and text[a:b].strip()]
        if fitting:
            start, end = draw.choice(fitting)
            name = f"{document}/{span}/{start}"
            found.append(Item(name, document, span, head, text[:start], text[start:end], text[end:], reason))
    return found


def _ranges(text: bytes) -> dict[str, list[tuple[int, int]]]:
    """Byte ranges of every span of each kind inside functions, ascending."""
    found: dict[str, set[tuple[int, int]]] = {span: set() for span in SPANS}
    for function in functions(text):
        for node in walk(function.body):
            if node.has_error:
                continue
            if node.type == "compound_statement":
                found["block"].add((node.start_byte + 1, node.end_byte - 1))
            elif node.type in _NODES:
                found["node"].add((node.start_byte, node.end_byte))
        found["line"].update(_lines(text, function.body))
    return {span: sorted(ranges) for span, ranges in found.items()}


def _lines(text: bytes, body: tree_sitter.Node) -> Iterator[tuple[int, int]]:
    """Lines inside a body without their blanks and line break; comments and lone brackets are no lines."""
    at = text.find(b"\n", body.start_byte, body.end_byte) + 1
    while 0 < at < body.end_byte:
        end = text.find(b"\n", at, body.end_byte)
        if end < 0:
            return
        line = text[at:end]
        if line.strip(b" \t\r{}();,") and not line.strip().startswith((b"//", b"*", b"/*", b"#")):
            yield at + len(line) - len(line.lstrip()), at + len(line.rstrip())
        at = end + 1


def prompt(inputs: SuiteInput, item: Item, order: str) -> Ids:
    """Fill-in-the-middle ids (Bavarian et al., arXiv 2207.14255, section 3): the middle is asked for at the end.

    psm: <prefix> before <suffix> after <middle>. spm, in its variant that psm training knows too: <prefix> <suffix>
    after <middle> before, so that the middle follows the text before it.
    """
    special, encode = inputs.tokenizer.special_ids, inputs.tokenizer.encode
    begin, end, middle = (np.array([special[name]], dtype=np.int32) for name in (FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE))
    before, after = encode(item.before), encode(item.after)
    parts = [begin, before, end, after, middle] if order == "psm" else [begin, end, after, middle, before]
    return np.concatenate([item.head, *parts])
