"""Spans against the files they come from, and the judging of what is put back."""

from __future__ import annotations

from pathlib import Path

import pytest

from apps.eval.results import QuestionScores
from apps.eval.suites.completion import cut, run, syntax_valid
from apps.eval.suites.completion_items import ORDERS, SPANS, Item, items, prompt
from apps.eval.suites.cpp import error_count
from apps.eval.suites.haystack import NO_IDS
from apps.eval.suites.suite import SuiteInput
from libs.model.text.document import read_sections
from libs.model.text.tokenizer import FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX
from tests.apps.eval.suites.questions_support import OPTIONS, inputs_of


@pytest.fixture(scope="module")
def inputs(cpp_dir: Path) -> SuiteInput:
    return inputs_of(cpp_dir)


@pytest.fixture(scope="module")
def made(inputs: SuiteInput) -> list[Item]:
    found = [item for item in items(inputs, 16_384, 8, 0) if item.reason is None]
    assert {item.span for item in found} == set(SPANS)
    return found


def test_the_pieces_are_the_file(inputs: SuiteInput, made: list[Item]) -> None:
    for item in made:
        (section,) = read_sections(inputs.tokenizer, inputs.documents[item.document])
        assert item.before + item.middle + item.after == section.code


def test_prompts_read_back_at_their_sentinels(inputs: SuiteInput, made: list[Item]) -> None:
    special = inputs.tokenizer.special_ids
    for item in made:
        for order in ORDERS:
            ids = prompt(inputs, item, order)
            assert (ids[: item.head.size] == item.head).all()
            at = {name: ids.tolist().index(special[name]) for name in (FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE)}
            assert at[FIM_PREFIX] == item.head.size
            assert at[FIM_PREFIX] < at[FIM_SUFFIX] < at[FIM_MIDDLE]
            first = inputs.tokenizer.decode(ids[at[FIM_PREFIX] : at[FIM_SUFFIX]])
            second = inputs.tokenizer.decode(ids[at[FIM_SUFFIX] : at[FIM_MIDDLE]])
            last = inputs.tokenizer.decode(ids[at[FIM_MIDDLE] :])
            expected = (item.before, item.after, b"") if order == "psm" else (b"", item.after, item.before)
            assert (first, second, last) == expected


def test_spans_are_what_they_say(made: list[Item]) -> None:
    for item in made:
        if item.span == "line":
            assert b"\n" not in item.middle
            assert item.middle == item.middle.strip()
            assert item.before.rsplit(b"\n", 1)[-1].strip() == b""
            assert item.after.split(b"\n", 1)[0].strip() == b""
        if item.span == "block":
            assert item.before.endswith(b"{")
            assert item.after.startswith(b"}")
            assert item.middle.count(b"{") == item.middle.count(b"}")


def test_an_answer_is_cut_where_its_span_ends() -> None:
    assert cut(b"x = 1;\ny = 2;", "line", 3) == b"x = 1;"
    assert cut(b" if (a) { b(); } c(); } }", "block", 3) == b" if (a) { b(); } c(); "
    assert cut(b"no end", "block", 3) == b"no end"
    assert cut(b"f(x), g", "node", 4) == b"f(x)"


def test_syntax_is_judged_against_the_file_as_it_was() -> None:
    item = Item("i", 0, "line", NO_IDS, b"int f() {\n  ", b"return 1;", b"\n}\n", None)
    assert syntax_valid(item, b"return g(2);") == 1
    assert syntax_valid(item, b"return g(2;") == 0
    assert syntax_valid(item, b"}") == 0
    broken = item._replace(after=b"\n} ) ;\n")
    assert error_count(broken.before + broken.middle + broken.after) > 0
    assert syntax_valid(broken, b"return 2;") == 1


def test_longer_files_are_listed_and_the_rest_fits(inputs: SuiteInput) -> None:
    found = list(items(inputs, 2000, 6, 0))
    assert any(item.reason and "more than 2000" in item.reason for item in found)
    for item in found:
        if item.reason is None:
            assert all(prompt(inputs, item, order).size <= 2000 for order in ORDERS)
    assert [i.item for i in items(inputs, 2000, 6, 0)] == [i.item for i in found]


def test_the_suite_over_a_model_that_says_one_token_for_ever(inputs: SuiteInput) -> None:
    output = run(inputs, OPTIONS._replace(items=4), lambda *_: None)
    details = output.details
    assert isinstance(details, QuestionScores)
    assert {tuple(score.axes.values()) for score in details.cells} == {(s, o) for s in SPANS for o in ORDERS}
    by_order = {s.axes["order"]: s for s in details.totals if s.metric == "reference_bpb" and "order" in s.axes}
    assert by_order["psm"].estimate == by_order["spm"].estimate  # a uniform model does not see the order
    floor = [s for s in details.control if s.metric == "syntax_valid"]
    assert len(floor) == 1
    assert floor[0].estimate.value < 0.5, "random strings seldom pass for C++"
