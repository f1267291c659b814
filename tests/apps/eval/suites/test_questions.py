"""Asking the real engine: the same bits in any batch and order, with and without the cache; the refusal when not."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from apps.eval.suites import questions
from apps.eval.suites.needle import run as run_needle
from apps.eval.suites.questions import CacheDiffers, Question, Replies, ask_all, hash_questions
from apps.eval.suites.scope import run as run_scope
from apps.eval.suites.suite import Engines, SuiteInput
from libs.flags import installed
from libs.flags.facts import Facts
from libs.flags.installed import GateState, install
from libs.flags.resolve import resolve
from libs.model.inference import Scored
from tests.apps.eval.suites.questions_support import OPTIONS, UniformEngine, inputs_of, real_engines, small_model


@pytest.fixture
def gates(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def put(mode: str) -> None:
        monkeypatch.setattr(installed, "_PROCESS", GateState())
        install(resolve({"FATHOM_PREFIX_CACHE": mode}, Facts(state_slots=True)))

    return put


@pytest.fixture(scope="module")
def inputs(cpp_dir: Path) -> SuiteInput:
    return inputs_of(cpp_dir)


@pytest.fixture(scope="module")
def asked(inputs: SuiteInput) -> list[Question]:
    """Three shared contexts with three questions each, and four questions of their own."""
    ids = inputs.documents[0]
    found = [
        Question(
            item=f"{start}/{number}",
            shared=ids[start : start + 300],
            prompt=ids[start + 300 + 7 * number : start + 320 + 7 * number],
            choices=(ids[400:403], ids[500:501], ids[600:604]),
            new_tokens=4 if number else 0,
        )
        for start in (0, 40, 80)
        for number in range(3)
    ]
    found += [Question(f"alone/{n}", ids[:0], ids[: 50 + 30 * n], (ids[7:9],), 3, (int(ids[3]),)) for n in range(4)]
    return found


def ask(engines: Engines, asked: list[Question]) -> Replies:
    return ask_all(engines, asked, seed=0, on_progress=lambda *_: None)


def test_batch_order_and_cache_change_no_bit(
    inputs: SuiteInput, asked: list[Question], gates: Callable[[str], None]
) -> None:
    gates("off")
    plain = ask(real_engines(inputs.model, max_batch=8), asked)
    assert plain.use.skipped_tokens == plain.use.verified == 0
    assert any(any(value for value in reply.sums) for reply in plain.by_item.values())
    alone = ask(real_engines(inputs.model, max_batch=1), asked)
    assert alone.by_item == plain.by_item
    shuffled = list(asked)
    random.Random(0).shuffle(shuffled)
    assert shuffled != asked
    assert ask(real_engines(inputs.model, max_batch=3), shuffled).by_item == plain.by_item
    for mode in ("memory_only", "snapshots"):
        gates(mode)
        cached = ask(real_engines(inputs.model, mode=mode), asked)
        assert cached.by_item == plain.by_item
        assert cached.use.verified == questions.VERIFIED
        assert "same bits" in cached.use.note
        assert (cached.use.skipped_tokens > 0) == (mode == "snapshots")
    shared = sum(q.shared.size * (len(q.choices) + bool(q.new_tokens)) for q in asked)
    assert cached.use.skipped_tokens > 0.5 * shared


@pytest.mark.parametrize(("run", "items"), [(run_needle, 1), (run_scope, 1)])
def test_a_suite_gives_the_same_result_for_any_batch_and_with_the_cache(
    inputs: SuiteInput, gates: Callable[[str], None], run: Callable[..., object], items: int
) -> None:
    options = OPTIONS._replace(contexts=(600,), items=items)
    gates("off")
    results = [
        run(inputs._replace(engines=real_engines(inputs.model, max_batch=n)), options, lambda *_: None) for n in (1, 8)
    ]
    assert results[0] == results[1]
    gates("snapshots")
    cached = run(inputs._replace(engines=real_engines(inputs.model, mode="snapshots")), options, lambda *_: None)
    assert cached.items == results[0].items  # type: ignore[attr-defined]
    assert cached.metrics == results[0].metrics  # type: ignore[attr-defined]
    assert cached.details.prefix.skipped_tokens > 0  # type: ignore[attr-defined]


def test_another_model_gives_other_numbers(
    inputs: SuiteInput, asked: list[Question], gates: Callable[[str], None]
) -> None:
    """Or the equalities above would mean nothing."""
    gates("off")
    other = small_model(inputs.tokenizer.vocab_size, seed=4)
    assert ask(real_engines(inputs.model), asked).by_item != ask(real_engines(other), asked).by_item


class LyingCache(UniformEngine):
    """Numbers that depend on what was asked before: what a broken cache does."""

    def score(self, items):  # type: ignore[no-untyped-def]
        found = super().score(items)
        return [Scored(tuple(p - 1e-9 * len(self.requests) for p in s.logprobs), s.greedy, s.report) for s in found]

    def checkpoint(self, name, prompt):  # type: ignore[no-untyped-def]
        pass


def test_a_cache_that_changes_a_bit_stops_the_evaluation(asked: list[Question]) -> None:
    engines = Engines(lambda _: LyingCache(1024), "snapshots")
    with pytest.raises(CacheDiffers, match="with the prefix cache"):
        ask(engines, asked)
    honest = Engines(lambda _: LyingCache(1024), "off")
    assert ask(honest, asked).use.verified == 0


def test_the_hash_names_every_part_of_a_question(asked: list[Question]) -> None:
    known = hash_questions(asked)
    assert hash_questions(asked[::-1]) == known
    first, *rest = asked
    for change in ({"prompt": first.prompt[1:]}, {"choices": first.choices[:2]}, {"new_tokens": 9}, {"item": "x"}):
        assert hash_questions([first._replace(**change), *rest]) != known, change


def test_longest_counts_the_longest_answer(asked: list[Question]) -> None:
    assert asked[0].longest == 300 + 20 + 4
    assert asked[-1].longest == 50 + 90 + 3
    assert ask(Engines(lambda _: UniformEngine(9), "off"), []).by_item == {}
