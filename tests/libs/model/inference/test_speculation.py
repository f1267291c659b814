"""Speculation: tokens, log-probabilities and states are those of plain decode, by bits (INFERENCE.md, test 5).

Drafts here are what the test wants them to be: right, wrong from some place on, or none."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from libs.model.inference import Engine, Sampling
from libs.model.inference.drafts import Drafter
from libs.model.inference.kv_blocks import PagedKV
from libs.model.inference.rollback import Rolled
from libs.model.inference.state_slots import StateSlots
from tests.libs.model.inference.conftest import BuildEngine, ids

J = 3
GREEDY = Sampling(max_new_tokens=16)
WARM = Sampling(max_new_tokens=16, temperature=1.0, seed=4)
PROMPT = ids(70, 5)


class Scripted:
    """Drafts from the known text: right for `right` tokens, then wrong; `right` may change from call to call."""

    def __init__(self, text: Sequence[int], right: Sequence[int], length: int | None = None) -> None:
        self.text, self.right, self.calls, self.length = list(text), right, 0, length

    def __call__(self, drafter: Drafter, row: int, text: Sequence[int], length: int) -> list[int]:
        right = self.right[self.calls % len(self.right)]
        self.calls += 1
        if self.length is not None:
            length = min(length, self.length)
        known = self.text[len(text) : len(text) + length]
        return [token if j < right else (token + 1) % 64 for j, token in enumerate(known)]


def states(engine: Engine) -> list[torch.Tensor]:
    """All parts of slot 0 as they are now."""
    return [tensor[:, 0].clone() for tensor in engine._slots._states.values()]


def run(engine: Engine, sampling: Sampling) -> tuple[list[tuple[int, float]], dict[int, list[torch.Tensor]]]:
    """Tokens, and the states by how many tokens they have absorbed."""
    engine.submit(PROMPT, sampling)
    events, seen = [], {}
    while engine.busy:
        events += [(event.token, event.logprob) for event in engine.step()]
        if engine._slots.active:
            seen[engine._slots.position(0)] = states(engine)
        engine.check()
    return events, seen


@pytest.mark.parametrize("rollback", ["replay", "snapshot"])
@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("mode", ["off", "snapshots"])
def test_drafts_change_nothing(
    engine: BuildEngine, monkeypatch: pytest.MonkeyPatch, rollback: str, sampling: Sampling, mode: str
) -> None:
    plain, by_count = run(engine(), sampling)
    text = [*PROMPT, *(token for token, _ in plain)]
    scripts = [[j] for j in range(J + 1)] + [[3, 0, 2, 1]]
    for right in scripts:
        monkeypatch.setattr(Drafter, "propose", _bound(text, right))
        drafting = engine(mode, speculate=True, draft_length=J, rollback=rollback)
        for _ in range(2 if mode == "snapshots" else 1):
            found, seen = run(drafting, sampling)
            assert found == plain, right
            for count, parts in seen.items():
                for part, wanted in zip(parts, by_count[count], strict=True):
                    assert torch.equal(part, wanted), (right, count)
        counters = drafting.counters
        assert counters["drafted"] > 0
        if len(right) == 1:
            assert (counters["accepted"] == 0) == (right == [0])
            assert right != [J] or counters["accepted"] == counters["drafted"]


def _bound(text: Sequence[int], right: Sequence[int], length: int | None = None) -> object:
    script = Scripted(text, right, length)

    def propose(self: Drafter, row: int, so_far: Sequence[int], wanted: int) -> list[int]:
        return script(self, row, so_far, wanted)

    return propose


def test_draft_no_draft_draft(engine: BuildEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = run(engine(), GREEDY)
    text = [*PROMPT, *(token for token, _ in plain)]
    whole, calls = _bound(text, [2]), [0]

    def propose(self: Drafter, row: int, so_far: Sequence[int], wanted: int) -> list[int]:
        calls[0] += 1
        return [] if calls[0] % 2 else whole(self, row, so_far, wanted)  # type: ignore[operator]

    monkeypatch.setattr(Drafter, "propose", propose)
    found, _ = run(engine("snapshots", speculate=True, draft_length=J), GREEDY)
    assert found == plain


def test_several_requests_with_the_models_own_drafts(engine: BuildEngine) -> None:
    """Random weights draft badly; the model of one repeated token drafts well. Neither changes a bit."""
    texts = [ids(n, n) for n in (20, 64, 70, 130)]
    wanted = [(r.tokens, r.logprobs) for r in engine().generate(texts, WARM)]
    for rollback in ("replay", "snapshot"):
        drafting = engine("snapshots", speculate=True, draft_length=2, rollback=rollback)
        assert [(r.tokens, r.logprobs) for r in drafting.generate(texts, WARM)] == wanted
        assert drafting.counters["drafted"] > 0
        drafting.check()
        assert drafting.usage.active == 0


def test_a_stop_inside_the_drafts_ends_there(engine: BuildEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = run(engine(), GREEDY)
    text = [*PROMPT, *(token for token, _ in plain)]
    stop = plain[5][0]
    how = Sampling(max_new_tokens=16, stop_ids=(stop,))
    wanted = engine().generate([PROMPT], how)
    monkeypatch.setattr(Drafter, "propose", _bound(text, [J]))
    found = engine("off", speculate=True, draft_length=J).generate([PROMPT], how)
    assert (found[0].tokens, found[0].logprobs, found[0].finish) == (
        wanted[0].tokens, wanted[0].logprobs, wanted[0].finish
    )  # fmt: skip


def test_rejected_drafts_are_never_offered(engine: BuildEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even generated tokens are: their keys have other bits than a prompt's."""
    plain, _ = run(engine(), GREEDY)
    text = [*PROMPT, *(token for token, _ in plain)]
    monkeypatch.setattr(Drafter, "propose", _bound(text, [0]))
    offered: list[tuple[int, ...]] = []
    whole = PagedKV.complete

    def complete(self: PagedKV, request: int, tokens: Sequence[int]) -> None:
        offered.append(tuple(tokens))
        whole(self, request, tokens)

    monkeypatch.setattr(PagedKV, "complete", complete)
    drafting = engine("snapshots", speculate=True, draft_length=J)
    run(drafting, GREEDY)
    assert [token for tokens in offered for token in tokens] == text[:-1]
    assert len(drafting._kv.match([*text, 0])) == 64 // 16


def test_one_state_too_many_is_seen(engine: BuildEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutations of both ways back: the state after one token more than was accepted."""
    plain, _ = run(engine(), GREEDY)
    text = [*PROMPT, *(token for token, _ in plain)]
    monkeypatch.setattr(Drafter, "propose", _bound(text, [1]))
    commit, scatter = Rolled.commit, StateSlots.scatter_mtp_states

    def too_far(self: Rolled, accepted: Sequence[int]) -> None:
        commit(self, [min(n + 1, length) for n, length in zip(accepted, self._lengths, strict=True)])

    monkeypatch.setattr(Rolled, "commit", too_far)
    for rollback in ("replay", "snapshot"):
        assert run(engine("off", speculate=True, draft_length=J, rollback=rollback), GREEDY)[0] != plain
    monkeypatch.setattr(Rolled, "commit", commit)
    monkeypatch.setattr(
        StateSlots, "scatter_mtp_states", lambda self, lengths, slots=None: scatter(self, [1] * len(lengths), slots)
    )
    assert run(engine("off", speculate=True, draft_length=J, rollback="snapshot"), GREEDY)[0] != plain


def test_rollback_costs_what_is_said(engine: BuildEngine) -> None:
    """Replay logs the operands that move a state; snapshots keep whole states."""
    drafting = engine("off", speculate=True, draft_length=J, rollback="snapshot")
    assert drafting.plan.by_component["intermediate_states"] == 4 * (J + 1) * drafting._slots.layout.nbytes(1)
    replaying = engine("off", speculate=True, draft_length=J)
    assert replaying.plan.by_component["intermediate_states"] == 0
