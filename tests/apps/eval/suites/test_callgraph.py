"""Items against the documents they come from, read back by other means."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from apps.eval.results import QuestionScores
from apps.eval.suites.callgraph import run
from apps.eval.suites.callgraph_items import CONTEXTS, Item, items
from apps.eval.suites.suite import SuiteInput
from libs.flags.errors import UserError
from libs.model.text.document import Role, read_sections
from tests.apps.eval.suites.questions_support import OPTIONS, inputs_of


@pytest.fixture(scope="module")
def inputs(cpp_dir: Path) -> SuiteInput:
    return inputs_of(cpp_dir)


@pytest.fixture(scope="module")
def made(inputs: SuiteInput) -> list[Item]:
    found = [item for item in items(inputs, 16_384, 12, 0) if item.reason is None]
    assert len(found) == 12
    return found


def target_of(inputs: SuiteInput, item: Item) -> tuple[str, str]:
    (section,) = [s for s in read_sections(inputs.tokenizer, inputs.documents[item.document]) if s.role is Role.TARGET]
    return section.path, section.code.decode()


def test_the_line_is_what_follows_in_the_document(inputs: SuiteInput, made: list[Item]) -> None:
    for item in made:
        path, code = target_of(inputs, item)
        for context in CONTEXTS:
            *around, last = read_sections(inputs.tokenizer, item.prompts[context])
            assert (last.role, last.path) == (Role.TARGET, path)
            before = last.code.decode()
            assert code.startswith(before)
            assert code[len(before) :].split("\n")[0].strip() == item.line.decode()
            assert before.split("\n")[-1].strip() == "", "the line is asked for from its first character"
            assert all(section.role is not Role.TARGET for section in around)


def test_contexts_hold_what_they_say(inputs: SuiteInput, made: list[Item]) -> None:
    for item in made:
        path, _ = target_of(inputs, item)
        sections = {c: read_sections(inputs.tokenizer, item.prompts[c])[:-1] for c in CONTEXTS}
        assert sections["none"] == []
        assert all(section.path == path for section in sections["same_file"])
        whole = [
            s for s in read_sections(inputs.tokenizer, inputs.documents[item.document]) if s.role is not Role.TARGET
        ]
        assert sections["full"] == whole
        assert sections["same_file"] == [s for s in whole if s.path == path]


def test_the_name_is_defined_in_another_file_and_nowhere_nearer(inputs: SuiteInput, made: list[Item]) -> None:
    for item in made:
        path, _ = target_of(inputs, item)
        name = item.name.decode()
        assert re.search(rf"\b{re.escape(name)}\s*(<[^;]*>)?\s*\(", item.line.decode()), "it is called in the line"
        full = read_sections(inputs.tokenizer, item.prompts["full"])
        defining = rf"\b{re.escape(name)}\s*\([^;]*?\)[^;{{}}]*{{"
        assert any(s.path != path and re.search(defining, s.code.decode(), re.S) for s in full), item
        assert name not in full[-1].code.decode(), "seen in the target already"


def test_too_long_is_listed_and_few_are_enough(inputs: SuiteInput) -> None:
    found = list(items(inputs, 500, 4, 0))
    long = [item for item in found if item.reason]
    assert long
    assert all("more than 500" in str(item.reason) for item in long)
    for item in found:
        if item.reason is None:
            assert max(prompt.size for prompt in item.prompts.values()) < 500
    assert [i.item for i in items(inputs, 500, 4, 0)] == [i.item for i in found]


def test_a_model_that_says_one_token_for_ever(inputs: SuiteInput) -> None:
    output = run(inputs, OPTIONS._replace(items=6), lambda *_: None)
    details = output.details
    assert isinstance(details, QuestionScores)
    assert output.scored == 6 * len(CONTEXTS)
    scores = {(score.axes.get("context"), score.metric): score for score in details.totals}
    for context in CONTEXTS:
        assert scores[context, "exact_match"].estimate.value == 0
        assert scores[context, "exact_match"].n == 6
    # The same uniform model sees the same line in every context, at the same price.
    values = {scores[context, "reference_bpb"].estimate.value for context in CONTEXTS}
    assert len(values) == 1
    against = {score.axes["against"]: score for score in details.control if score.metric == "exact_match"}
    assert against.keys() == {"random_string", "other_reference"}
    assert all(score.estimate.value == 0 for score in against.values())


def test_a_split_without_context_graphs_is_refused(inputs: SuiteInput) -> None:
    files = [i for i in inputs.drawn if inputs.metadata[i].kind == "file"]
    with pytest.raises(UserError, match="no context graph"):
        run(inputs._replace(drawn=files), OPTIONS, lambda *_: None)
