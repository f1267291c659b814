"""Generator of the suite `callgraph`: the next line of a function, where it calls what another file defines.

Pure: the same split and seed give the same items. Not for asking or scoring (callgraph.py).

A context-graph document holds callers, a target function and callees from several files. The target is cut before a
line with a call whose name is defined in a section of another file, stands in no section of the target's own file, and
has not been seen in the target yet. The sections before it, callees included, are the context: none, those of the
target's file, or all of them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from apps.eval.suites.cpp import called_names, functions, parse
from apps.eval.suites.generation import answer_tokens
from apps.eval.suites.haystack import Ids
from apps.eval.suites.suite import SuiteInput
from libs.model.text.document import MARKERS, Kind, Role, SectionSpan
from libs.model.text.tokenizer import CODE, PATH

CONTEXTS = ("none", "same_file", "full")
_PER_DOCUMENT = 2
_LEAST_BYTES, _MOST_BYTES = 6, 160


class Item(NamedTuple):
    """item: its name. name: what is called. line: the reference, without blanks around it. prompts: by context.

    reason: why it is not asked, None when it is.
    """

    item: str
    document: int
    name: bytes
    line: bytes
    prompts: dict[str, Ids]
    reason: str | None


def items(inputs: SuiteInput, most_tokens: int, wanted: int, seed: int) -> Iterator[Item]:
    """Items in drawn order until `wanted` can be asked; those with a prompt and answer over `most_tokens` say so."""
    made = 0
    for document in inputs.drawn:
        if inputs.metadata[document].kind is not Kind.CALLGRAPH:
            continue
        for item in _of_document(inputs, document, most_tokens, seed):
            if made == wanted:
                return
            made += item.reason is None
            yield item


def _of_document(inputs: SuiteInput, document: int, most_tokens: int, seed: int) -> Iterator[Item]:
    sections = inputs.metadata[document].sections
    ids = inputs.documents[document]
    texts = [inputs.tokenizer.decode(ids[section.start : section.end]) for section in sections]
    target = next(i for i, section in enumerate(sections) if section.role is Role.TARGET)
    code = texts[target]
    own, foreign = set[bytes](), set[bytes]()
    for section, text in zip(sections, texts, strict=True):
        names = {function.name for function in functions(text)}
        (own if section.path == sections[target].path else foreign).update(names)
    found = [
        (name, at)
        for name, at in called_names(code, parse(code))
        if name in foreign - own and name not in code[: code.rfind(b"\n", 0, at) + 1]
    ]
    draw = random.Random(f"{seed}:callgraph:{document}")
    lines: dict[int, bytes] = {}
    for name, at in draw.sample(found, len(found)):
        begin, end = code.rfind(b"\n", 0, at) + 1, code.find(b"\n", at)
        line = code[begin : end if end >= 0 else len(code)]
        if begin and line.isascii() and _LEAST_BYTES <= len(line.strip()) <= _MOST_BYTES and len(lines) < _PER_DOCUMENT:
            lines.setdefault(begin + len(line) - len(line.lstrip()), name)
    for at in sorted(lines):
        end = code.find(b"\n", at)
        line = code[at : end if end >= 0 else len(code)].strip()
        prompts = {context: _prompt(inputs, ids, sections, target, code[:at], context) for context in CONTEXTS}
        longest = max(int(prompt.size) for prompt in prompts.values()) + answer_tokens(inputs.tokenizer, line)
        reason = f"{longest} tokens with its answer, more than {most_tokens}" if longest > most_tokens else None
        yield Item(f"{document}/{at}", document, lines[at], line, prompts, reason)


def _prompt(
    inputs: SuiteInput, ids: Ids, sections: Sequence[SectionSpan], target: int, before: bytes, context: str
) -> Ids:
    """Sections with their markers, callers and callees, and the target up to the line, which comes last."""
    special, tokenizer = inputs.tokenizer.special_ids, inputs.tokenizer
    parts: list[Ids] = []
    role: Role | None = None
    for number, section in enumerate(sections):
        alike = section.path == sections[target].path
        if number == target or context == "none" or (context == "same_file" and not alike):
            continue
        head = [special[PATH], *tokenizer.encode(section.path).tolist(), special[CODE]]
        if section.role is not role:
            head.insert(0, special[MARKERS[section.role]])
        role = section.role
        parts += [np.array(head, dtype=np.int32), ids[section.start : section.end]]
    path = tokenizer.encode(sections[target].path).tolist()
    parts += [
        np.array([special[MARKERS[Role.TARGET]], special[PATH], *path, special[CODE]], dtype=np.int32),
        tokenizer.encode(before),
    ]
    return np.concatenate(parts)
