"""The generator against a reader of C++ declarations that shares no code with it; the suite against a model that knows
nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from apps.eval.results import QuestionScores
from apps.eval.suites.haystack import NO_IDS
from apps.eval.suites.needle import MEANING, answers, run
from apps.eval.suites.needle_items import CHOICES, KINDS, Context, contexts
from apps.eval.suites.suite import SuiteInput
from libs.flags.errors import UserError
from libs.model.text.document import read_sections
from tests.apps.eval.suites.questions_support import OPTIONS, inputs_of

LENGTHS = (1024, 4096)


@pytest.fixture(scope="module")
def inputs(cpp_dir: Path) -> SuiteInput:
    return inputs_of(cpp_dir)


@pytest.fixture(scope="module")
def made(inputs: SuiteInput) -> list[Context]:
    found = [context for context in contexts(inputs, LENGTHS, 2, 0) if context.reason is None]
    assert {context.kind for context in found} == set(KINDS)
    assert {context.length for context in found} == set(LENGTHS)
    return found


def code_of(inputs: SuiteInput, context: Context) -> str:
    return "\n".join(s.code.decode() for s in read_sections(inputs.tokenizer, context.ids))


def value_of(code: str, name: str) -> list[str]:
    """Every value that declarations in `code` give the name, by patterns alone. Follows aliases."""
    if "::" in name:
        scope, inner = name.split("::")
        spaces = re.findall(rf"^\s*namespace {scope} {{ (.*) }}$", code, re.M)
        if spaces:
            return [value for space in spaces for value in value_of(space, inner)]
        (target,) = re.findall(rf"^\s*(?:using {scope} = (\w+);|struct {scope} {{.*)$", code, re.M)
        if target:
            return value_of(code, f"{target}::{inner}")
        return re.findall(rf"struct {scope} {{ static constexpr int {inner} = (\d+); }};", code)
    found = re.findall(rf"^\s*static constexpr (?:int|auto) {name}(?:\[\])? = {{?([\w, ]+?)}}?;$", code, re.M)
    found += re.findall(rf"^\s*#define {name} (\w+)$", code, re.M)
    return [value for f in found for value in ([f] if f[0].isdigit() else value_of(code, f))]


def test_the_answer_is_what_the_text_says(inputs: SuiteInput, made: list[Context]) -> None:
    for context in made:
        code = code_of(inputs, context)
        for needle in context.needles:
            asked = re.search(r"static_assert\((?:same\()?([\w:]+)(?: == |, \{)$", needle.fact.ask.decode())
            assert asked, needle.fact.ask
            assert value_of(code, asked[1]) == [needle.fact.answer.decode()], needle.item
            assert needle.choices[0] == needle.fact.answer
            assert len(set(needle.choices)) == CHOICES
            assert code.count(needle.fact.line.decode()) == 1
            if context.kind in ("alias_using", "alias_auto", "alias_macro"):
                assert needle.fact.answer.decode() not in asked[0]
                lines = [needle.fact.line, *needle.fact.later]
                places = [code.index(line.decode()) for line in lines]
                assert places == sorted(places), "an alias stands before what it names"


def test_needles_lie_where_they_say(inputs: SuiteInput, made: list[Context]) -> None:
    for context in made:
        assert int(context.ids.size) < context.length
        assert context.ids.size > 0.6 * context.length
        for needle in context.needles:
            start = round(needle.placed * context.ids.size)
            line = inputs.tokenizer.encode(needle.fact.line).size
            around = inputs.tokenizer.decode(context.ids[start : start + line + 2])
            assert needle.fact.line[:20] in around, (needle.fact.line, around)
            assert abs(needle.placed - needle.depth) < (0.3 if context.length == 1024 else 0.15), needle.item


def test_lines_are_put_in_without_changing_other_tokens(inputs: SuiteInput, made: list[Context]) -> None:
    """The ids are those that encoding each section's whole text gives."""
    for context in made[:10]:
        for section in read_sections(inputs.tokenizer, context.ids):
            alone = inputs.tokenizer.encode(section.code)
            assert any(
                (context.ids[i : i + alone.size] == alone).all() for i in range(context.ids.size - alone.size + 1)
            ), section.path


def test_a_distractor_differs_in_one_character_and_lies_in_the_context(inputs: SuiteInput, made: list[Context]) -> None:
    seen = 0
    for context in made:
        if context.kind != "distractor":
            continue
        for needle in context.needles:
            (decoy,) = needle.fact.decoys
            ours, theirs = (line.split(b" = ")[0] for line in (needle.fact.line, decoy))
            assert len(ours) == len(theirs)
            assert sum(a != b for a, b in zip(ours, theirs, strict=True)) == 1
            assert decoy.decode() in code_of(inputs, context)
            assert decoy.split(b" = ")[1].rstrip(b";") in needle.choices[1:]
            seen += 1
    assert seen > 4


def test_the_other_namespace_has_the_same_name_and_another_value(inputs: SuiteInput, made: list[Context]) -> None:
    for context in (c for c in made if c.kind == "namespace"):
        for needle in context.needles:
            pattern = rb"namespace (\w+) \{ static constexpr int (\w+) = (\d+); \}"
            ours, theirs = re.fullmatch(pattern, needle.fact.line), re.fullmatch(pattern, needle.fact.decoys[0])
            assert ours
            assert theirs
            assert ours[1] != theirs[1]
            assert ours[2] == theirs[2]
            assert ours[3] != theirs[3]


def test_a_control_asks_for_a_name_that_is_nowhere(inputs: SuiteInput, made: list[Context]) -> None:
    controls = [context for context in made if context.control]
    assert controls
    for context in controls:
        ask, choices = context.control or (b"", ())
        code = code_of(inputs, context)
        name = ask.decode().split("(")[1].split(" ")[0]
        assert name not in code
        assert not any(choice.decode() in code for choice in choices)


def test_the_same_seed_gives_the_same_contexts(inputs: SuiteInput, made: list[Context]) -> None:
    again = [context for context in contexts(inputs, LENGTHS, 2, 0) if context.reason is None]
    assert [(c.name, c.ids.tobytes(), c.needles) for c in again] == [(c.name, c.ids.tobytes(), c.needles) for c in made]
    other = [context for context in contexts(inputs, LENGTHS, 2, 1) if context.reason is None]
    assert {c.ids.tobytes() for c in other}.isdisjoint({c.ids.tobytes() for c in made})


def test_a_length_that_cannot_be_filled_is_excluded_with_its_reason(inputs: SuiteInput) -> None:
    found = list(contexts(inputs, (1 << 22,), 1, 0))
    assert all(context.reason is not None and not context.needles for context in found)
    assert "no text of 4194304 tokens" in str(found[0].reason)
    with pytest.raises(UserError, match="nothing to ask"):
        run(inputs, OPTIONS._replace(contexts=(1 << 22,), max_tokens=1 << 23), lambda *_: None)
    with pytest.raises(UserError, match="exceeds --max-tokens"):
        run(inputs, OPTIONS._replace(contexts=(4096,), max_tokens=2048), lambda *_: None)


def test_a_model_that_knows_nothing_is_at_chance(inputs: SuiteInput) -> None:
    output = run(inputs, OPTIONS._replace(contexts=(1024,), items=6), lambda *_: None)
    details = output.details
    assert isinstance(details, QuestionScores)
    assert details.metrics.keys() == MEANING.keys()
    overall = {score.metric: score for score in details.totals if not score.axes}
    assert overall["exact_match"].estimate.value == 0
    n = overall["choice"].n
    assert n == output.scored > 80
    # Values differ in their number of tokens, so single questions are not ties; on average nothing is preferred.
    assert abs(overall["choice"].estimate.value - 1 / CHOICES) < 4 * (0.25 * 0.75 / n) ** 0.5
    control = {score.metric: score for score in details.control}["choice"]
    assert abs(control.estimate.value - 1 / CHOICES) < 4 * (0.25 * 0.75 / control.n) ** 0.5
    assert {tuple(score.axes) for score in details.cells} == {("length", "depth")}
    assert sum(score.n for score in details.cells if score.metric == "choice") == n
    assert len(output.items) == n + control.n


@pytest.mark.parametrize(
    ("spoken", "right"),
    [
        (b"48213);", True),
        (b" 48213,", True),
        (b"48213", True),
        (b"482137", False),
        (b"4821", False),
        (b"x48213", False),
    ],
)
def test_an_answer_ends_where_the_number_ends(spoken: bytes, right: bool) -> None:
    assert answers(spoken, b"48213") is right


def test_no_ids_are_no_ids() -> None:
    assert NO_IDS.size == 0
