"""Calls resolve by name, qualifier, arity and include reach; ambiguity is counted, never hidden."""

from __future__ import annotations

import itertools
import random

from apps.train.data.callgraph import CallGraph, GraphFile, Includes
from apps.train.data.parse import ParsedFile, parse


def graph_of(files: dict[str, str]) -> CallGraph:
    return CallGraph([GraphFile(path, path.split("/")[0], parse(text.encode())) for path, text in files.items()])


def called(graph: CallGraph, name: str) -> list[tuple[str, str, int]]:
    """(function, file, others that fitted) for every callee of the function `name`."""
    (n,) = [i for i, node in enumerate(graph.nodes) if node.function.name == name]
    edges = graph.callees[n]
    return [(graph.nodes[e.node].function.name, graph.files[graph.nodes[e.node].file].path, e.beside) for e in edges]


def test_across_files_through_a_header() -> None:
    graph = graph_of(
        {
            "p/inc/box.h": "class Box { int get(int); };",
            "p/src/box.cc": '#include "box.h"\nint Box::get(int a) { return a; }',
            "p/src/use.cc": '#include "box.h"\nint use(Box& b) { return b.get(1) + missing(2); }',
        }
    )
    assert called(graph, "use") == [("Box::get", "p/src/box.cc", 0)]
    assert (graph.stats.calls, graph.stats.resolved, graph.stats.cross_file, graph.stats.unknown) == (2, 1, 1, 1)
    (box,) = [i for i, node in enumerate(graph.nodes) if node.function.name == "Box::get"]
    assert [graph.nodes[e.node].function.name for e in graph.callers[box]] == ["use"]


def test_arity_and_qualifier_choose() -> None:
    graph = graph_of(
        {
            "p/a.h": "namespace a { int f(int x) { return x; } int f(int x, int y = 2, int z = 3) { return x; } }\n"
            "namespace b { int f(int x) { return x; } int g(int... ) { return 0; } }",
            "p/u.cc": '#include "a.h"\nint one() { return b::f(1); }\nint two() { return a::f(1, 2, 3); }\n'
            "int none() { return a::f(1, 2, 3, 4); }\nint both() { return a::f(1); }",
        }
    )
    assert called(graph, "one") == [("b::f", "p/a.h", 0)]
    assert called(graph, "two") == [("a::f", "p/a.h", 0)]
    assert called(graph, "none") == []
    assert called(graph, "both") == [("a::f", "p/a.h", 1)]
    assert (graph.stats.ambiguous, graph.stats.candidates_beside) == (1, 1)


def test_default_arguments_count_where_they_are_declared() -> None:
    graph = graph_of(
        {
            "p/a.h": "namespace n { class A { int get(int a, int b = 1); }; int f(int a = 0, int b = 0); }",
            "p/a.cc": '#include "a.h"\nint n::A::get(int a, int b) { return a; }\n'
            "namespace n { int f(int a, int b) { return a; } }",
            "p/u.cc": '#include "a.h"\nint use(n::A& x) { return x.get(1) + n::f(); }\n'
            "int no(n::A& x) { return x.get(); }",
        }
    )
    assert called(graph, "use") == [("n::A::get", "p/a.cc", 0), ("n::f", "p/a.cc", 0)]
    assert called(graph, "no") == []


def test_what_is_included_comes_before_what_is_not() -> None:
    graph = graph_of(
        {
            "p/far.h": "int f(int x) { return 1; }",
            "p/mid.h": '#include "near.h"',
            "p/near.h": "int f(int x) { return 2; }",
            "p/u.cc": '#include "mid.h"\nint use() { return f(1); }',
            "q/v.cc": "int other() { return f(1); }",
        }
    )
    assert called(graph, "use") == [("f", "p/near.h", 0)]
    assert called(graph, "other") == []
    assert graph.stats.unreachable == 1


def test_the_callers_own_scope_wins_over_another() -> None:
    files = {
        "p/a.cc": "namespace m { int f() { return 0; } int use() { return f(); } }\n"
        "namespace n { int f() { return 1; } }"
    }
    assert called(graph_of(files), "m::use") == [("m::f", "p/a.cc", 0)]


def test_too_many_equals_are_left_alone() -> None:
    many = "\n".join(f"struct S{i} {{ int size() {{ return {i}; }} }};" for i in range(6))
    graph = graph_of({"p/a.cc": many + "\nint use(T& t) { return t.size(); }"})
    assert called(graph, "use") == []
    assert graph.stats.too_ambiguous == 1


def test_recursion_is_no_edge() -> None:
    assert called(graph_of({"p/a.cc": "int f(int n) { return n ? f(n - 1) : 0; }"}), "f") == []


def test_include_reach_is_the_closure_even_with_cycles() -> None:
    draw = random.Random(0)
    names = [f"p/f{i}.h" for i in range(12)]
    named = {name: draw.sample(names, 2) for name in names}
    parsed = [
        GraphFile(name, "p", ParsedFile((), (), tuple(other.split("/")[1] for other in named[name]), (), False))
        for name in names
    ]
    includes = Includes(parsed)
    sees = {name: {name, *named[name]} for name in names}
    for middle, _ in itertools.product(names, names):
        for name in names:
            if middle in sees[name]:
                sees[name] |= sees[middle]
    for i, name in enumerate(names):
        assert {names[j] for j in range(12) if includes.reach[i] >> j & 1} == sees[name]


def test_an_include_prefers_its_own_directory_then_its_own_package() -> None:
    files = {
        "p/x/a.h": "",
        "p/y/a.h": "",
        "q/a.h": "",
        "p/x/u.cc": '#include "a.h"',
        "q/deep/er/u.cc": "#include <a.h>",
        "q/w.cc": '#include "y/a.h"\n#include "../q/a.h"',
    }
    includes = Includes([GraphFile(path, path[0], parse(text.encode())) for path, text in files.items()])
    names = list(files)
    assert [names[j] for j in includes.direct[3]] == ["p/x/a.h"]
    assert [names[j] for j in includes.direct[4]] == ["q/a.h"]
    assert [names[j] for j in includes.direct[5]] == ["p/y/a.h", "q/a.h"]
