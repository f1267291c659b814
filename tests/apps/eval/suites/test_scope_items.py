"""Pairs of real files, on sources written by hand: one for each reason why a name must not be asked for or offered."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from apps.eval.suites.cpp import functions, locals_of
from apps.eval.suites.scope_items import Context, _Known, _pair_in, real_contexts
from apps.eval.suites.suite import SuiteInput
from libs.model.text.tokenizer import Tokenizer
from tests.apps.eval.suites.questions_support import inputs_of
from tests.support.data_dir import write_data_dir

FIRST = "int first(int alpha) {\n  int delta = alpha;\n  return delta;\n}\n"
SECOND = "int second(int gamma) {\n  return gamma;\n}\n"
BOTH = {(" gamma", " alpha"), (" gamma", " delta")}


def inputs_with(path: Path, *files: str) -> SuiteInput:
    texts = [(f"{number}.cc", file.encode()) for number, file in enumerate(files)]
    return inputs_of(write_data_dir(path / "data", {"train": [("t.cc", b"int x;\n")], "valid": texts}))


def asked(inputs: SuiteInput, *, most_tokens: int = 10_000, wanted: int = 20, seed: int = 0) -> list[Context]:
    return list(real_contexts(inputs, most_tokens, wanted, seed))


def pairs(path: Path, file: str) -> set[tuple[str, str]]:
    """(right, wrong) of all draws."""
    inputs = inputs_with(path, file)
    items = [item for seed in range(40) for context in asked(inputs, seed=seed) for item in context.items]
    return {(item.right.decode(), item.wrong.decode()) for item in items}


@pytest.mark.parametrize(
    ("file", "wanted"),
    [
        (FIRST + SECOND, BOTH),
        (SECOND + FIRST, {(" alpha", " gamma"), (" delta", " gamma")}),
        ("extern int delta;\n" + FIRST + SECOND, {(" gamma", " alpha")}),  # a name of the file
        (FIRST + "extern int delta;\n" + SECOND, {(" gamma", " alpha")}),
        (FIRST + SECOND.replace("return gamma", "return gamma + box().delta"), {(" gamma", " alpha")}),  # a member
        (FIRST.replace("delta", "gamma") + SECOND, {(" gamma", " alpha")}),  # of both
        (FIRST.replace("delta", "deltas") + SECOND, {(" gamma", " alpha")}),  # more tokens
        (FIRST + SECOND.replace("return gamma", "return  gamma"), {("gamma", "alpha"), ("gamma", "delta")}),
        ("int first(int aa) {\n  return aa;\n}\nint second(int gg) {\n  return gg;\n}\n", set()),  # too short
        # Behind its block it is another variable.
        (FIRST + SECOND.replace("return gamma", "{ int theta = gamma; }\n  return theta"), BOTH),
        # The outer function has not ended: its names are not those of an earlier one.
        ("int outer(int abcde) {\n  struct In { int run(int fghij) { return fghij; } };\n  return abcde;\n}\n", set()),
    ],
)
def test_only_these_pairs_are_made(tmp_path: Path, file: str, wanted: set[tuple[str, str]]) -> None:
    assert pairs(tmp_path, file) == wanted


def test_of_two_variables_of_one_name_the_first_is_asked_for(tmp_path: Path) -> None:
    blocks = "{ int theta = 1; theta++; }\n  { int theta = 2; theta--; }\n  return gamma"
    file = FIRST + SECOND.replace("return gamma", blocks)
    inputs = inputs_with(tmp_path, file)
    uses = {int(c.name.rsplit("/")[-1]) for seed in range(60) for c in asked(inputs, seed=seed)}
    assert uses == {file.index("theta++"), file.rindex("gamma")}


@pytest.mark.parametrize(("gap", "distance"), [(0, 128), (200, 512), (40_000, 32_768)])
def test_the_distance_is_that_from_the_declaration_to_the_use(tmp_path: Path, gap: int, distance: int) -> None:
    file = FIRST + SECOND.replace("  return", f"  // {'x' * gap}\n  return")
    (context,) = asked(inputs_with(tmp_path, file), most_tokens=100_000)
    (item,) = context.items
    assert item.placed == file.rindex("gamma") - file.index("gamma")  # a token is a byte here
    assert item.distance == distance


def test_three_of_a_file_and_no_more_than_wanted(tmp_path: Path) -> None:
    five = "".join(SECOND.replace("second", f"f{n}").replace("gamma", f"gam{n}x") for n in range(5))
    inputs = inputs_with(tmp_path, FIRST + five)
    names = set()
    for seed in range(5):
        found = asked(inputs, seed=seed)
        names |= {context.name for context in found}
        assert len(found) == 3
        assert len(asked(inputs, wanted=2, seed=seed)) == 2
    assert len(names) == 5, "of every function at times"


def test_a_prompt_that_is_too_long_is_said_and_does_not_count(tmp_path: Path) -> None:
    short, long = FIRST + SECOND, f"// {'x' * 500}\n" + FIRST + SECOND
    inputs = inputs_with(tmp_path, long, short, long)
    size = min(context.length for context in asked(inputs))
    for seed in range(6):
        found = asked(inputs, most_tokens=size + 16, wanted=1, seed=seed)
        assert sum(context.reason is None for context in found) == 1
        assert all(context.reason for context in asked(inputs, most_tokens=size + 15, wanted=1, seed=seed))


def test_neither_name_begins_with_the_other() -> None:
    """As tokens they may be equally long."""
    text = FIRST.replace("delta", "counter").replace("alpha", "number") + SECOND.replace("gamma", "count")
    tokenizer = Tokenizer.train([b"int count counter count counter number number " * 200], 320)
    sizes = {tokenizer.encode(name).size for name in (b" count", b" counter", b" number")}
    assert len(sizes) == 1
    raw = text.encode()
    known = [_Known(function, locals_of(raw, function)) for function in functions(raw)]
    inputs = SuiteInput(*[tokenizer if name == "tokenizer" else None for name in SuiteInput._fields])  # type: ignore[arg-type]
    found = [_pair_in(inputs, raw, known, 1, random.Random(seed)) for seed in range(30)]
    assert {(right, wrong) for _, _, right, wrong in filter(None, found)} == {(b"count", b"number")}
