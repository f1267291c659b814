"""Functions, calls, includes and classes of one C++ file, by tree-sitter; robust on code that is broken.

For the call graph. Not a compiler: no preprocessing, no types, no overload resolution.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from typing import Literal, NamedTuple

import tree_sitter
import tree_sitter_cpp

_LANGUAGE = tree_sitter.Language(tree_sitter_cpp.language())
_QUERY = tree_sitter.Query(
    _LANGUAGE,
    """
    (function_definition) @function
    (template_declaration) @template
    (function_declarator parameters: (parameter_list (optional_parameter_declaration))) @defaulted
    (call_expression) @call
    (preproc_include path: (_) @include)
    (namespace_definition body: (_)) @namespace
    (class_specifier name: (_) body: (_)) @class
    (struct_specifier name: (_) body: (_)) @class
    """,
)
_NAME = re.compile(rb"~?[A-Za-z_]\w*(?:::~?[A-Za-z_]\w*)*$|(?:[A-Za-z_]\w*::)*operator[!-/:-@\[-^`{-~]{1,3}$")
_ANGLES = re.compile(rb"<[^<>]*>")
_MAX_COMMENT_LINES = 60
# `class TORCH_API Name` and `CUTLASS_DEVICE int f()`: attributes hidden in macros, which derail the parser.
_CLASS_MACRO = re.compile(rb"\b((?:class|struct)[ \t]+)([A-Z][A-Z0-9_]{2,})(?=[ \t]+[A-Za-z_]\w*\s*(?:final\s*)?[:{])")
_LINE_MACRO = re.compile(
    rb"^([ \t]*(?:(?:static|inline|extern|constexpr)[ \t]+)*)([A-Z][A-Z0-9]*_[A-Z0-9_]+)(?=\s+[A-Za-z_~])", re.M
)


class Call(NamedTuple):
    """A call as written.

    name: qualified, without template arguments ("ns::f", or "m" for x.m()). arity: number of arguments.
    """

    name: str
    arity: int


class Function(NamedTuple):
    """A function with a body.

    name: qualified by the namespaces and classes around it. start, end: bytes of its text, with template
    head, leading comment and indentation. least, most: arguments it takes (most None: any number).
    """

    name: str
    start: int
    end: int
    least: int
    most: int | None
    calls: tuple[Call, ...]


class Defaults(NamedTuple):
    """A declaration with default arguments: the definition elsewhere takes them too, without repeating them."""

    name: str
    least: int
    most: int | None


class ParsedFile(NamedTuple):
    """What one file defines and names.

    functions: outermost definitions in source order. defaults: declarations with default arguments. includes:
    paths as written. classes: qualified names.
    """

    functions: tuple[Function, ...]
    defaults: tuple[Defaults, ...]
    includes: tuple[str, ...]
    classes: tuple[str, ...]
    has_error: bool


class _Item(NamedTuple):
    """A stretch of the file that names something; declarator is set for "function" and "defaults" only."""

    start: int
    end: int
    name: str
    kind: Literal["namespace", "class", "function", "defaults"]
    declarator: tree_sitter.Node | None = None


def parse(text: bytes) -> ParsedFile:
    """Parse one file. Never raises for bad code: what cannot be understood is left out."""
    tree = tree_sitter.Parser(_LANGUAGE).parse(_without_macros(text))
    # The order within each list follows node addresses, not the text: everything below sorts by position.
    found = tree_sitter.QueryCursor(_QUERY).captures(tree.root_node)
    includes = sorted(found.get("include", []), key=lambda n: n.start_byte)
    heads: dict[int, int] = {}
    for template in found.get("template", []):
        end = template.end_byte
        heads[end] = min(template.start_byte, heads.get(end, template.start_byte))
    classes: set[str] = set()
    defaults: dict[Defaults, None] = {}
    functions: list[tuple[int, Function]] = []
    enclosing: list[_Item] = []
    last_end = 0
    for item in sorted(_items(text, found), key=lambda i: (i.start, -i.end, i.kind)):
        while enclosing and enclosing[-1].end <= item.start:
            enclosing.pop()
        qualified = "::".join([*(scope.name for scope in enclosing if scope.name), item.name])
        if item.declarator is None:
            enclosing.append(item)
            if item.kind == "class":
                classes.add(qualified)
            continue
        least, most = _arity(text, item.declarator)
        if item.kind == "defaults":
            defaults[Defaults(qualified, least, most)] = None
        elif item.start >= last_end:  # a function inside a function belongs to the outer one
            start = max(last_end, _text_start(text, heads.get(item.end, item.start)))
            last_end = item.end
            functions.append((item.start, Function(qualified, start, item.end, least, most, ())))
    return ParsedFile(
        functions=_with_calls(text, functions, found.get("call", [])),
        defaults=tuple(defaults),
        includes=tuple(dict.fromkeys(_text(text, n).strip('<>" ') for n in includes)),
        classes=tuple(sorted(classes)),
        has_error=tree.root_node.has_error,
    )


def _without_macros(text: bytes) -> bytes:
    """`text` with attribute macros blanked, byte for byte at the same places."""
    for pattern in (_CLASS_MACRO, _LINE_MACRO):
        text = pattern.sub(lambda found: found.group(1) + b" " * len(found.group(2)), text)
    return text


def _items(text: bytes, found: dict[str, list[tree_sitter.Node]]) -> Iterator[_Item]:
    """Namespaces, classes, functions and declarations with default arguments, unordered."""
    for node in found.get("namespace", []):
        name = _bytes(text, node.child_by_field_name("name")).decode("utf-8", "replace")
        yield _Item(node.start_byte, node.end_byte, name, "namespace")
    for node in found.get("class", []):
        class_name = _plain(_bytes(text, node.child_by_field_name("name")))
        if class_name is not None:
            yield _Item(node.start_byte, node.end_byte, class_name, "class")
    for node in found.get("defaulted", []):
        declared = _plain(_bytes(text, node.child_by_field_name("declarator")))
        if declared is not None:
            yield _Item(node.start_byte, node.end_byte, declared, "defaults", node)
    for node in found.get("function", []):
        item = _function_item(text, node)
        if item is not None:
            yield item


def _function_item(text: bytes, node: tree_sitter.Node) -> _Item | None:
    """A function definition, or the class that was taken for one."""
    declarator = _function_declarator(node)
    if declarator is not None:
        name = _plain(_bytes(text, declarator.child_by_field_name("declarator")))
        return None if name is None else _Item(node.start_byte, node.end_byte, name, "function", declarator)
    # `class EXPORT_MACRO Name : Base {...}` is read as a function named Name that returns a class.
    kind = node.child_by_field_name("type")
    name = _plain(_bytes(text, node.child_by_field_name("declarator")))
    if kind is None or kind.type not in ("class_specifier", "struct_specifier") or name is None:
        return None
    return _Item(node.start_byte, node.end_byte, name, "class")


def _function_declarator(node: tree_sitter.Node) -> tree_sitter.Node | None:
    """The part of a definition that has name and parameters, below pointers and references to the result."""
    current = node.child_by_field_name("declarator")
    while current is not None and current.type != "function_declarator":
        inner = current.child_by_field_name("declarator")
        if inner is None and current.type == "reference_declarator" and current.named_child_count:
            inner = current.named_child(current.named_child_count - 1)
        current = inner
    return current


def _arity(text: bytes, declarator: tree_sitter.Node) -> tuple[int, int | None]:
    """Least and most arguments of a function; most is None with a parameter pack or an ellipsis."""
    parameters = declarator.child_by_field_name("parameters")
    if parameters is None:
        return 0, 0
    least = most = 0
    unlimited = False
    for child in parameters.children:
        if child.type == "parameter_declaration":
            least, most = least + 1, most + 1
        elif child.type == "optional_parameter_declaration":
            most += 1
        elif child.type in ("variadic_parameter_declaration", "variadic_parameter", "..."):
            unlimited = True
    if least == 1 and most == 1 and _bytes(text, parameters).strip(b"() \t\r\n") == b"void":
        return 0, 0
    return least, None if unlimited else most


def _with_calls(
    text: bytes, functions: list[tuple[int, Function]], calls: list[tree_sitter.Node]
) -> tuple[Function, ...]:
    """The functions with the calls that lie inside each, in source order without repetitions."""
    starts = [start for start, _ in functions]
    inside: list[dict[Call, None]] = [{} for _ in functions]
    for node in sorted(calls, key=lambda n: (n.start_byte, n.end_byte)):
        owner = bisect_right(starts, node.start_byte) - 1
        if owner < 0 or node.end_byte > functions[owner][1].end:
            continue
        callee, arguments = node.child_by_field_name("function"), node.child_by_field_name("arguments")
        if callee is not None and callee.type == "field_expression":
            callee = callee.child_by_field_name("field")
        name = _plain(_bytes(text, callee))
        if name is not None and arguments is not None and arguments.type == "argument_list":
            count = arguments.named_child_count
            if count and b"/" in _bytes(text, arguments):  # a comment is a named child too
                count = sum(child.type != "comment" for child in arguments.named_children)
            inside[owner][Call(name, count)] = None
    pairs = zip(functions, inside, strict=True)
    return tuple(function._replace(calls=tuple(found)) for (_, function), found in pairs)


def _text_start(text: bytes, start: int) -> int:
    """Start of the text of a definition: back over its indentation and the comment directly above it."""
    line = text.rfind(b"\n", 0, start) + 1
    if text[line:start].strip():
        return start
    begin = line
    for _ in range(_MAX_COMMENT_LINES):
        if begin == 0:
            break
        above = text.rfind(b"\n", 0, begin - 1) + 1
        content = text[above:begin].strip()
        if content.startswith(b"//"):
            begin = above
        elif content.endswith(b"*/"):
            opening = text.rfind(b"/*", 0, begin)
            first = text.rfind(b"\n", 0, max(opening, 0)) + 1
            # Not a line of code that ends in a comment, nor one that ends in `// ... */`.
            if not text[first:opening].strip() and text.count(b"*/", opening, begin) == 1:
                begin = first
            break
        else:
            break
    return begin


def _bytes(text: bytes, node: tree_sitter.Node | None) -> bytes:
    return text[node.start_byte : node.end_byte] if node is not None else b""


def _text(text: bytes, node: tree_sitter.Node) -> str:
    return _bytes(text, node).decode("utf-8", "replace")


def _plain(name: bytes) -> str | None:
    """A name without template arguments and blanks, or None when it is no plain name (as in a call of a call)."""
    if b"operator" not in name:
        while b"<" in name:
            shorter = _ANGLES.sub(b"", name)
            if shorter == name:
                return None
            name = shorter
    name = b"".join(name.split()).removeprefix(b"::").removeprefix(b"template")
    return name.decode("ascii") if _NAME.match(name) else None
