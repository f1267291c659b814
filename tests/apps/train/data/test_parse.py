"""What tree-sitter gives us: names, arity, calls, spans; and that no input breaks it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.train.data.parse import Call, Function, parse

SOURCE = b"""\
#include "a/b.h"
#include <vector>
namespace tvm { namespace ir::x {
class TVM_DLL Foo : public Bar {
 public:
  int run(int a, T b = 3) const { return helper<T>(a, /* c */ b) + this->other(); }
  ~Foo() {}
  Foo& operator=(const Foo& o) { return *this; }
};
struct S { void m(void) { std::move(x); obj.template call<int>(1); } };

// Says one thing,
// and another.
template <typename T>
int* Foo::run2(T, ...) { auto l = [&](int q) { return deep(q); }; return l(1); }
template <class... A> static void pack(A&&... a) { f(a...); }
}}
int Box<int>::outside() { struct In { int inner() { return leaf(); } }; return In().inner(); }
int declared_only(int);
"""


@pytest.fixture(scope="module")
def functions() -> dict[str, Function]:
    return {function.name: function for function in parse(SOURCE).functions}


def test_names_are_qualified_by_everything_around_them(functions: dict[str, Function]) -> None:
    assert list(functions) == [
        "tvm::ir::x::Foo::run",
        "tvm::ir::x::Foo::~Foo",
        "tvm::ir::x::Foo::operator=",
        "tvm::ir::x::S::m",
        "tvm::ir::x::Foo::run2",
        "tvm::ir::x::pack",
        "Box::outside",
    ]


def test_arity_knows_defaults_packs_and_void(functions: dict[str, Function]) -> None:
    arity = {name.rpartition("::")[2]: (f.least, f.most) for name, f in functions.items()}
    assert arity == {
        "run": (1, 2), "~Foo": (0, 0), "operator=": (1, 1), "m": (0, 0), "run2": (1, None), "pack": (0, None),
        "outside": (0, 0),
    }  # fmt: skip


def test_calls_belong_to_the_outermost_function(functions: dict[str, Function]) -> None:
    calls = {name.rpartition("::")[2]: f.calls for name, f in functions.items()}
    assert calls["run"] == (Call("helper", 2), Call("other", 0))
    assert calls["m"] == (Call("std::move", 1), Call("call", 1))
    assert calls["run2"] == (Call("deep", 1), Call("l", 1))
    assert set(calls["outside"]) == {Call("leaf", 0), Call("In", 0), Call("inner", 0)}


def test_spans_take_template_and_comment_along(functions: dict[str, Function]) -> None:
    run2 = functions["tvm::ir::x::Foo::run2"]
    text = SOURCE[run2.start : run2.end]
    assert text.startswith(b"// Says one thing,\n// and another.\ntemplate <typename T>\n")
    assert text.endswith(b"return l(1); }")
    ends = [0]
    for function in functions.values():
        assert ends[-1] <= function.start < function.end
        ends.append(function.end)


def test_includes_and_classes() -> None:
    parsed = parse(SOURCE)
    assert parsed.includes == ("a/b.h", "vector")
    assert parsed.classes == ("In", "tvm::ir::x::Foo", "tvm::ir::x::S")
    assert not parsed.has_error


def test_attribute_macros_are_looked_through_and_stay_in_the_text() -> None:
    text = (
        b"namespace n {\nclass N_API A final : public B { void f() { g(); } };\n"
        b"N_HOST_DEVICE\nint h(int a) { return a; }\n}\n"
    )
    parsed = parse(text)
    assert not parsed.has_error
    assert parsed.classes == ("n::A",)
    assert [function.name for function in parsed.functions] == ["n::A::f", "n::h"]
    assert parse(b"int MAX_A;\nN_CALL(x)\nvoid f() { N_CHECK(x) << 1; }").functions[0].name == "f"


def test_a_broken_file_still_gives_its_whole_functions() -> None:
    parsed = parse(b"int bad(int a) { return a + ; ) }\nint good(int a) { return f(a); }\nvoid cut(int b) { if (b")
    assert parsed.has_error
    assert ("good", (Call("f", 1),)) in {(f.name, f.calls) for f in parsed.functions}


@settings(max_examples=150, deadline=None)
@given(
    parts=st.lists(
        st.sampled_from(
            ["{", "}", "(", ")", "<", ">", "template ", "class X ", "int f", "::", ";", '"', "/*", "*/", "//", "\n",
             "#include ", "operator", "~", "namespace n ", "->g(1)", "\x00", "é", "R\"(", "#if\n"]
        ),
        max_size=40,
    )
)  # fmt: skip
def test_no_text_breaks_it_and_spans_stay_inside(parts: list[str]) -> None:
    text = "".join(parts).encode()
    last_end = 0
    for function in parse(text).functions:
        assert last_end <= function.start < function.end <= len(text)
        assert function.name
        last_end = function.end


def test_a_comment_behind_a_function_is_not_the_next_ones() -> None:
    first, second = parse(b"int a() { return 1; } /* about a */\nint b() { return 2; }\n").functions
    assert first.end <= second.start


def test_the_order_of_chained_calls_and_includes_is_that_of_the_text() -> None:
    text = b'#include "z.h"\n#include "a.h"\n#include "m.h"\nint f() { return a().b().c().d(e(), g()); }\n'
    results = {parse(text) for _ in range(20)}
    assert len(results) == 1
    (parsed,) = results
    assert parsed.includes == ("z.h", "a.h", "m.h")
    assert [call.name for call in parsed.functions[0].calls] == ["a", "b", "c", "d", "e", "g"]


def test_operators_are_spelled_in_ascii() -> None:
    for text in ("int operator中(int a) { return a; }", "int f(int x) { return operatoré(x) + operator\xa0(x); }"):
        assert [f.calls for f in parse(text.encode()).functions if f.name != "f"] == []
    assert [f.name for f in parse(b"S operator+(S a, S b) { return a; }").functions] == ["operator+"]


@pytest.mark.parametrize(
    ("above", "taken"),
    [
        (b"int a; /* x */\n", b""),
        (b"/* w */\nint a; // x */\n", b""),
        (b"#endif /* X */\n", b""),
        (b"int a;\n  /* x */\n", b"  /* x */\n"),
        (b"int a;\n/** x\n * y */\n", b"/** x\n * y */\n"),
        (b"int a; /* x */\n// y\n", b"// y\n"),
    ],
)
def test_only_a_comment_of_its_own_goes_with_a_function(above: bytes, taken: bytes) -> None:
    code = b"int f() { return 1; }"
    (function,) = parse(above + code).functions
    assert (above + code)[function.start : function.end] == taken + code
