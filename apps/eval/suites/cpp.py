"""What suites need to know of C++ text, by tree-sitter: where a line may be put in, names, functions, errors.

Works on code that is broken or cut off. Not a compiler: no preprocessing, no types. Not for training data, whose parser
asks other questions (apps.train.data.parse).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import tree_sitter
import tree_sitter_cpp

_LANGUAGE = tree_sitter.Language(tree_sitter_cpp.language())
# Where declarations of namespace scope stand one after another, and what leads to such a place.
_BODIES = frozenset({"translation_unit", "declaration_list", "preproc_if", "preproc_ifdef", "preproc_else"})
_AROUND = _BODIES | {"linkage_specification", "namespace_definition"}


class Gap(NamedTuple):
    """A place at the end of a line, between two declarations of namespace scope. at: byte offset of the line's end."""

    at: int
    indent: bytes


class Function(NamedTuple):
    """A function with a body. name: without what qualifies it. node: its definition, body: the braces' part of it."""

    name: bytes
    node: tree_sitter.Node
    body: tree_sitter.Node


class Local(NamedTuple):
    """A variable or parameter of a function. at: byte offset of its name where declared. until: its scope's end."""

    name: bytes
    at: int
    until: int


def parse(text: bytes) -> tree_sitter.Node:
    """The root of the syntax tree. Never raises for bad code."""
    return tree_sitter.Parser(_LANGUAGE).parse(text).root_node


def walk(node: tree_sitter.Node) -> Iterator[tree_sitter.Node]:
    """The node and everything below it, in source order."""
    stack = [node]
    while stack:
        current = stack.pop()
        yield current
        stack += reversed(current.children)


def error_count(text: bytes) -> int:
    """Places that the parser could not read: ERROR nodes and missing tokens."""
    return sum(node.type == "ERROR" or node.is_missing for node in walk(parse(text)))


def gaps(text: bytes) -> list[Gap]:
    """Where a line with a declaration may be put in, ascending."""
    found: dict[int, bytes] = {}
    stack = [parse(text)]
    while stack:
        node = stack.pop()
        for child in node.named_children:
            if child.type in _AROUND:
                stack.append(child)
            if node.type not in _BODIES or child.type == "ERROR" or child.type in _BODIES:
                continue
            at = child.end_byte - 1 if text[child.end_byte - 1 : child.end_byte] == b"\n" else child.end_byte
            if text[at : at + 1] == b"\n" and at and text[at - 1 : at] not in (b"\n", b"\r", b"\\"):
                line = text.rfind(b"\n", 0, child.start_byte) + 1
                head = text[line : child.start_byte]
                found[at] = head if not head.strip() else b""
    return [Gap(at, found[at]) for at in sorted(found)]


def functions(text: bytes) -> list[Function]:
    """Functions with a body and a plain name, in source order, those inside others included."""
    found = []
    for node in walk(parse(text)):
        if node.type != "function_definition":
            continue
        body, name = node.child_by_field_name("body"), _declared(node.child_by_field_name("declarator"))
        if body is not None and body.type == "compound_statement" and name is not None:
            found.append(Function(text[name.start_byte : name.end_byte].rsplit(b"::", 1)[-1].strip(), node, body))
    return found


def locals_of(text: bytes, function: Function) -> list[Local]:
    """Parameters and local variables of a function of `text`, in source order."""
    found = []
    for node in walk(function.node):
        if node.type in ("parameter_declaration", "optional_parameter_declaration"):
            until = function.node.end_byte
            if node.start_byte >= function.body.start_byte:
                continue  # of a lambda, or of a declaration inside
        elif node.type == "declaration" and node.parent is not None:
            until = node.parent.end_byte
        else:
            continue
        for declarator in node.children_by_field_name("declarator"):
            name = _declared(declarator)
            if name is not None and name.type == "identifier":
                found.append(Local(text[name.start_byte : name.end_byte], name.start_byte, until))
    return found


def value_names(text: bytes, node: tree_sitter.Node) -> list[tuple[bytes, int]]:
    """(name, byte offset) of every plain identifier below `node`, in source order; types and members are none."""
    found = (n for n in walk(node) if n.type == "identifier")
    return [(text[n.start_byte : n.end_byte], n.start_byte) for n in found]


def called_names(text: bytes, node: tree_sitter.Node) -> list[tuple[bytes, int]]:
    """(name, byte offset) of every call below `node` that is written with a name, qualified or not, or as a member."""
    found = []
    for call in walk(node):
        callee = call.child_by_field_name("function") if call.type == "call_expression" else None
        while callee is not None and callee.type in ("field_expression", "qualified_identifier", "template_function"):
            callee = callee.child_by_field_name("field") or callee.child_by_field_name("name")
        if callee is not None and callee.type in ("identifier", "field_identifier"):
            found.append((text[callee.start_byte : callee.end_byte], callee.start_byte))
    return found


def _declared(node: tree_sitter.Node | None) -> tree_sitter.Node | None:
    """The name inside a declarator, below pointers, references, arrays, initialisers and parameter lists."""
    while node is not None and node.type not in ("identifier", "field_identifier", "qualified_identifier"):
        inner = node.child_by_field_name("declarator")
        if inner is None and node.type in ("reference_declarator", "parenthesized_declarator") and node.named_children:
            inner = node.named_children[-1]
        if inner is None:
            return None
        node = inner
    return node
