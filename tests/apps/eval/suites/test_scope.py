"""Pairs against a reader of scopes that shares no code with the generator; the suite against a uniform model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from apps.eval.results import QuestionScores
from apps.eval.suites.scope import run
from apps.eval.suites.scope_items import DISTANCES, Context, made_contexts, real_contexts
from apps.eval.suites.suite import SuiteInput
from libs.model.text.document import read_sections
from tests.apps.eval.suites.questions_support import OPTIONS, inputs_of


@pytest.fixture(scope="module")
def inputs(cpp_dir: Path) -> SuiteInput:
    return inputs_of(cpp_dir)


@pytest.fixture(scope="module")
def made(inputs: SuiteInput) -> list[Context]:
    found = list(made_contexts(inputs, (1024, 4096), 3, 0))
    assert all(context.reason is None for context in found)
    return found


@pytest.fixture(scope="module")
def real(inputs: SuiteInput) -> list[Context]:
    found = [context for context in real_contexts(inputs, 16_384, 20, 0) if context.reason is None]
    assert len(found) > 8
    return found


def code_of(inputs: SuiteInput, context: Context) -> str:
    return "\n".join(s.code.decode() for s in read_sections(inputs.tokenizer, context.ids))


def in_scope(code: str, ask: str, name: str) -> bool:
    """Whether made declarations make `name` visible where `ask` ends, by patterns alone."""
    member = re.search(r"\(const (\w+)& (\w+)\) \{\n  return \2\.$", ask)
    if member:
        return bool(re.search(rf"^\s*struct {member[1]} {{ int {name}; }};$", code, re.M))
    space = re.search(r"return (\w+)::$", ask)
    if space:
        return bool(re.search(rf"^\s*namespace {space[1]} {{ static int {name} = \d+; }}$", code, re.M))
    return bool(re.search(rf"^\s*static int {name} = \d+;", code, re.M))


def test_the_right_name_is_in_scope_and_the_wrong_one_is_not(inputs: SuiteInput, made: list[Context]) -> None:
    seen = set()
    for context in made:
        code = code_of(inputs, context)
        for item in context.items:
            ask = inputs.tokenizer.decode(item.prompt).decode()
            right, wrong = item.right.decode().strip(), item.wrong.decode().strip()
            if item.kind == "control":
                assert right not in code
                assert wrong not in code
                continue
            assert in_scope(code, ask, right), item
            assert not in_scope(code, ask, wrong), item
            assert code.count(right) == code.count(wrong) > 0, "both stand equally often"
            seen.add((item.kind, item.distance))
    assert {kind for kind, _ in seen} == {"out_of_scope", "shadowed", "namespace"}
    assert {distance for _, distance in seen} == {128, 512, 2048}


def test_either_name_comes_first(inputs: SuiteInput, made: list[Context]) -> None:
    first: dict[str, list[bool]] = {}
    for context in made:
        code = code_of(inputs, context)
        for item in context.items:
            if item.kind != "control":
                right, wrong = (code.index(name.decode().strip()) for name in (item.right, item.wrong))
                first.setdefault(item.kind, []).append(right < wrong)
    for kind, found in first.items():
        assert 0.1 < sum(found) / len(found) < 0.9, kind


def test_the_grid(inputs: SuiteInput) -> None:
    """Four contexts of a short length and one of a long one, two controls each, distances that leave room for text."""
    found = list(made_contexts(inputs, (2048, 8192), None, 0))
    assert [context.name for context in found] == ["2048/0", "2048/1", "2048/2", "2048/3", "8192/0"]
    for context in found[:4]:
        assert [item.kind for item in context.items].count("control") == 2
        assert {item.distance for item in context.items if item.distance is not None} == {128, 512}


def test_distances_are_about_what_they_say(inputs: SuiteInput, made: list[Context]) -> None:
    for context in made:
        for item in context.items:
            if item.distance is None or item.placed is None:
                continue
            longest = int(context.ids.size + item.prompt.size)
            assert longest <= context.length
            text = inputs.tokenizer.decode([*context.ids.tolist(), *item.prompt.tolist()])
            last = max(text.rfind(item.right.strip()), text.rfind(item.wrong.strip()))
            measured = inputs.tokenizer.encode(text[last:]).size
            assert abs(measured - item.placed) < 60 + 0.1 * item.placed, (item, measured)
            assert 0.2 * item.distance < item.placed < 2.5 * item.distance, item


@pytest.mark.parametrize("distance", [512, 2048])
def test_declarations_that_stand_nearer_are_allowed_for(made: list[Context], distance: int) -> None:
    placed = [i.placed for context in made for i in context.items if i.distance == distance and i.placed is not None]
    assert abs(sum(placed) / len(placed) / distance - 1) < 0.1


def enclosing_function(text: str, at: int) -> int:
    """Where the outermost brace-block that is open at `at` and follows a parameter list begins, by counting braces."""
    stack: list[int] = []
    clean = re.sub(r'"(?:\\.|[^"\\])*"|//[^\n]*|/\*.*?\*/', lambda m: " " * len(m[0]), text[:at], flags=re.S)
    for place, letter in enumerate(clean):
        if letter == "{":
            stack.append(place)
        elif letter == "}" and stack:
            stack.pop()
    heads = [place for place in stack if re.search(r"\)\s*(const|noexcept|override|-> \w+)?\s*$", clean[:place])]
    return min(heads, default=stack[-1] if stack else 0)


def rest_of_block(text: str, depth: int) -> str:
    """As far as `depth` open braces are closed."""
    for place, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if depth <= 0:
            return text[:place]
    return text


def test_real_pairs_are_the_files_own_text(inputs: SuiteInput, real: list[Context]) -> None:
    files = {}
    for index, meta in enumerate(inputs.metadata):
        files[index] = read_sections(inputs.tokenizer, inputs.documents[index])[0].code if meta.kind == "file" else b""
    for context in real:
        (item,) = context.items
        before = read_sections(inputs.tokenizer, item.prompt)[0].code
        file = files[context.documents[0]]
        assert file.startswith(before + item.right)
        following = file[len(before + item.right) :][:1]
        assert not re.match(rb"\w", following), "the whole name"
        assert inputs.tokenizer.encode(item.right).size == inputs.tokenizer.encode(item.wrong).size
        wrong, right = item.wrong.strip().decode(), item.right.strip().decode()
        text = before.decode()
        assert re.search(rf"\b{wrong}\b", text), "a name of the file"
        function = text[enclosing_function(text, len(text)) :]
        function += rest_of_block(file[len(before) :].decode(), function.count("{") - function.count("}"))
        assert not re.search(rf"\b{wrong}\b", function), "a name that the function uses may be a member or a global"
        assert re.search(rf"\b{right}\b", text[-6000:])


def test_pure(inputs: SuiteInput, made: list[Context], real: list[Context]) -> None:
    again = list(made_contexts(inputs, (1024, 4096), 3, 0))
    assert [c.ids.tobytes() for c in again] == [c.ids.tobytes() for c in made]
    names = [c.items[0].item for c in real_contexts(inputs, 16_384, 20, 0) if c.items]
    assert names == [c.items[0].item for c in real]


def test_too_long_prompts_are_listed(inputs: SuiteInput) -> None:
    found = list(real_contexts(inputs, 600, 6, 0))
    long = [context for context in found if context.reason]
    assert long
    assert all("more than 584" in str(c.reason) and str(c.length) in str(c.reason) for c in long)
    assert all(c.items[0].prompt.size <= 584 for c in found if c.items)


def test_a_model_that_knows_nothing_is_at_chance(inputs: SuiteInput) -> None:
    output = run(inputs, OPTIONS._replace(contexts=(1024, 4096), items=6), lambda *_: None)
    details = output.details
    assert isinstance(details, QuestionScores)
    by_kind = {score.axes["kind"]: score for score in details.totals if tuple(score.axes) == ("kind",)}
    assert by_kind["real"].estimate.value == 0.5  # equally many tokens: every pair is a tie
    for kind in ("out_of_scope", "shadowed", "namespace"):
        assert abs(by_kind[kind].estimate.value - 0.5) < 4 * 0.5 / by_kind[kind].n ** 0.5
    (control,) = details.control
    assert abs(control.estimate.value - 0.5) < 4 * 0.5 / control.n**0.5
    distances = {score.axes["distance"] for score in details.totals if "distance" in score.axes}
    assert distances <= set(DISTANCES)
