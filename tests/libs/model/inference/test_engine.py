"""The whole engine over a tiny real model: the same bits with and without the cache, in any batch and order."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import libs.model.inference.engine
from libs.flags.errors import UserError
from libs.model import HybridLM
from libs.model.inference import (
    AuditFailed,
    CapacityError,
    Engine,
    EngineConfig,
    EngineStopped,
    FinishReason,
    MissReason,
    PagedKV,
    Sampling,
)
from libs.model.inference.lanes import PlainLane
from libs.model.inference.runner import Runner, Step, pieces
from libs.model.inference.sampler import sample
from libs.model.inference.state_slots import StateSlots
from tests.libs.model.inference.conftest import BuildEngine, ids

B = 16
GRID = 64
GREEDY = Sampling(max_new_tokens=5)
WARM = Sampling(max_new_tokens=3, temperature=0.9, top_k=20, top_p=0.95, seed=7)
LENGTHS = (1, B - 1, B, B + 1, 2 * B - 1, 2 * B, 2 * B + 1, GRID, GRID + 1, 2 * GRID, 2 * GRID + B + 1, 300)
CACHED = [("memory_only", {"prefill_chunk": GRID}), ("snapshots", {"max_batch": 2})]


def plain(engine: Engine, prompt: list[int], sampling: Sampling) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The slow, obviously right way: no slots, no blocks, no batch, no cache; the same pieces and the same tile."""
    runner = Runner(engine.model, int(engine.choices["row_tile"].value))
    lane = PlainLane(engine.model.config, torch.float32, torch.device("cpu"))
    for start, end in pieces(0, len(prompt), engine.grid):
        hidden = runner.prefill(lane, prompt[start:end], start)
    found = [sample(runner.logits(hidden[-1:])[0], sampling, 0)]
    while len(found) < sampling.max_new_tokens:
        at = len(prompt) + len(found) - 1
        decoded = runner.decode([Step(lane, (found[-1].token,), at)])
        decoded.pending.commit([1])
        found.append(sample(decoded.logits[0], sampling, len(found)))
    return tuple(token for token, _ in found), tuple(logprob for _, logprob in found)


def bits(engine: Engine, prompts: list[list[int]], sampling: Any) -> list[tuple[Any, Any]]:
    return [(result.tokens, result.logprobs) for result in engine.generate(prompts, sampling)]


def follow_ups(n: int) -> list[list[int]]:
    """The second prompts of INFERENCE.md, test 1: repeat, extended by 1 and b, other at places of the last block."""
    prompt, last = ids(n, n), (n - 1) // B * B
    changed = [[*prompt[:at], (prompt[at] + 1) % 64, *prompt[at + 1 :]] for at in {last, min(last + 5, n - 1), n - 1}]
    return [ids(n, n + 1), prompt, [*prompt, 2], [*prompt, *ids(B, 9)], *changed]


@pytest.mark.parametrize("n", LENGTHS)
def test_on_equals_off_and_the_plain_way(engine: BuildEngine, n: int) -> None:
    texts = [ids(n, n), *follow_ups(n)]
    off = engine("off")
    wanted = [plain(off, text, WARM) for text in texts]
    assert bits(off, texts, WARM) == wanted
    for mode, options in CACHED:
        cached = engine(mode, audit_share=0.5, **options)
        assert [bits(cached, [text], WARM)[0] for text in texts] == wanted, mode
        assert bits(cached, texts[::-1], WARM) == wanted[::-1]
        cached.check()
        assert cached.usage.active == 0
        assert (cached.counters["matched_tokens"] > 0) == (cached.counters["audited"] > 0) == (n >= GRID)
        assert (cached.counters["skipped_tokens"] > 0) == (mode == "snapshots" and n >= GRID)


def test_order_batch_and_neighbours_change_nothing(engine: BuildEngine) -> None:
    texts = [ids(n, n) for n in (5, 70, 130, 33, 64, 200, 1, 90)]
    how = [Sampling(max_new_tokens=3 + i, temperature=0.5 * (i % 3), seed=i) for i in range(len(texts))]
    alone = engine(max_batch=1)
    wanted = [bits(alone, [text], one)[0] for text, one in zip(texts, how, strict=True)]
    source = random.Random(1)
    for _ in range(3):
        order = source.sample(range(len(texts)), len(texts))
        batch = engine("snapshots", max_batch=source.choice([2, 3, 8]), prefill_chunk=GRID * source.choice([1, 2]))
        found = bits(batch, [texts[i] for i in order], [how[i] for i in order])
        assert found == [wanted[i] for i in order]


def test_requests_come_and_go(engine: BuildEngine) -> None:
    """Aborts in every phase, late arrivals: the others' tokens stay, and everything is released."""
    text = ids(150, 1)
    wanted = plain(engine(), text, Sampling(max_new_tokens=12))
    for when in range(9):
        running = engine("snapshots", prefill_chunk=GRID, max_batch=3)
        kept = running.submit(text, Sampling(max_new_tokens=12))
        doomed = running.submit(ids(140, 2), Sampling(max_new_tokens=30))
        tokens, step = [], 0
        while running.busy:
            tokens += [event for event in running.step() if event.request == kept]
            if step == when:
                running.abort(doomed)
                running.submit(ids(20, 3), GREEDY)
            running.check()
            step += 1
        assert (tuple(event.token for event in tokens), tuple(event.logprob for event in tokens)) == wanted
        assert [event.finished for event in tokens] == [None] * 11 + [FinishReason.LENGTH]
        assert running.usage.active == 0
        assert running._slots.active == ()
        running.abort(doomed)  # over already
        with pytest.raises(ValueError, match="never submitted"):
            running.abort(99)


def test_inactive_rows_keep_their_bits(engine: BuildEngine) -> None:
    running = engine(max_batch=3)
    for tensor in running._slots._states.values():
        tensor.fill_(7.0)
    running.generate([ids(70, 1)], GREEDY)
    for tensor in running._slots._states.values():
        assert bool((tensor[:, 1:] == 7.0).all())


def test_a_pool_too_small_for_all_at_once_still_serves_all(engine: BuildEngine) -> None:
    texts = [ids(100, seed) for seed in range(6)]
    wanted = bits(engine(), texts, GREEDY)
    for mode in ("off", "snapshots"):
        small = engine(mode, kv_blocks=9, max_batch=4)
        assert bits(small, texts, GREEDY) == wanted
        assert small.counters["peak_blocks"] <= 9
    with pytest.raises(UserError, match="needs 10 KV blocks, available are 9"):
        small.submit(ids(150, 1), GREEDY)
    with pytest.raises(UserError, match="max_tokens=512"):
        small.submit(ids(508, 1), GREEDY)


def test_scores_are_those_of_generation(engine: BuildEngine) -> None:
    """A greedy continuation's log-probabilities, context by context; the same bits in any order and mode."""
    contexts = [ids(n, n) for n in (1, 63, 64, 65, 129, 200)]
    tails = [ids(k, k) for k in (1, 2, 70)]
    items = [(context, tail) for context in contexts for tail in tails]
    off = engine("off")
    wanted = [(found.logprobs, found.greedy) for found in off.score(items)]
    for context, tail, (logprobs, _) in zip(*zip(*items, strict=True), wanted, strict=True):
        logits = off.model.logits(torch.tensor([[*context, *tail]]))[0].log_softmax(1)
        for i, (token, logprob) in enumerate(zip(tail, logprobs, strict=True)):
            assert logprob == pytest.approx(float(logits[len(context) + i - 1, token].detach()), abs=2e-4)
    for mode in ("memory_only", "snapshots"):
        cached = engine(mode, max_batch=2, prefill_chunk=GRID)
        order = random.Random(3).sample(range(len(items)), len(items))
        found = cached.score([items[i] for i in order])
        assert [(one.logprobs, one.greedy) for one in found] == [wanted[i] for i in order]
        if mode == "snapshots":
            assert cached.counters["skipped_tokens"] >= 2 * (64 + 128 + 192)
    greedy = off.generate([contexts[4]], Sampling(max_new_tokens=1))[0]
    scored = off.score([(contexts[4], list(greedy.tokens))])[0]
    assert scored.greedy
    assert scored.logprobs[0] == pytest.approx(greedy.logprobs[0], abs=1e-5)
    with pytest.raises(UserError, match="context is empty"):
        off.score([([], [1])])


def test_generate_leaves_the_events_of_others(engine: BuildEngine) -> None:
    running = engine()
    other = running.submit(ids(10, 1), GREEDY)
    running.generate([ids(20, 2)], Sampling(max_new_tokens=9))
    assert running.busy
    assert [event.request for event in running.step()] == [other] * 5
    assert not running.busy


def test_stop_ids_end_a_request(engine: BuildEngine) -> None:
    free = engine().generate([ids(30, 1)], Sampling(max_new_tokens=9))[0]
    stop = free.tokens[3]
    first = free.tokens.index(stop)
    stopped = engine().generate([ids(30, 1)], Sampling(max_new_tokens=9, stop_ids=(stop,)))[0]
    assert stopped.tokens == free.tokens[: first + 1]
    assert stopped.finish is FinishReason.STOP


def test_the_plan_is_the_bytes(engine: BuildEngine) -> None:
    for options in ({}, {"kv_blocks": 11}, {"draft_length": 2}, {"draft_length": 2, "rollback": "snapshot"}):
        built = engine("snapshots", speculate=True, **options)
        real = {
            "kv_blocks": built._kv.nbytes,
            "states": sum(t.untyped_storage().nbytes() for t in built._slots._states.values()),
            "intermediate_states": sum(t.untyped_storage().nbytes() for t in built._slots._intermediate.values()),
            "draft_windows": 0 if built._drafter is None else built._drafter.nbytes,
        }
        assert built.plan.by_component == real
        assert built.plan.total == sum(real.values())
        assert built.plan == built.config.plan(built.model.config, torch.float32)
    with pytest.raises(CapacityError) as refused:
        built.plan.require(built.plan.total - 1)
    assert (refused.value.needed, refused.value.available) == (built.plan.total, built.plan.total - 1)


def test_an_audit_finds_a_state_that_is_wrong(engine: BuildEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    audited, unaudited = engine("snapshots", audit_share=1.0), engine("snapshots")
    text = ids(130, 1)
    wanted = bits(unaudited, [text], GREEDY)
    assert bits(audited, [text], GREEDY) == wanted
    whole = StateSlots.restore

    def restore(self: StateSlots, slot: int, blob: bytes) -> int:
        found = whole(self, slot, blob)
        self._states["angle"][:, slot] = self._states["angle"][:, slot].bfloat16().float()
        return found

    monkeypatch.setattr(StateSlots, "restore", restore)
    assert bits(unaudited, [text], GREEDY) != wanted
    with pytest.raises(AuditFailed, match="angle of block 0"):
        audited.generate([text], GREEDY)
    with pytest.raises(EngineStopped, match="angle of block 0"):
        audited.step()


def test_the_same_prompt_at_the_same_time(engine: BuildEngine) -> None:
    """Twins: one computes, the others find it, for the queue admits them one by one."""
    texts = [ids(200, 1)] * 6
    wanted = bits(engine(), texts, GREEDY)
    for mode, skipped in (("memory_only", 0), ("snapshots", 5 * 192)):
        cached = engine(mode, max_batch=6)
        assert bits(cached, texts, GREEDY) == wanted
        assert cached.counters["matched_tokens"] == 5 * 192
        assert cached.counters["skipped_tokens"] == skipped
        assert cached.counters["peak_blocks"] == 12 + 6


@pytest.mark.parametrize("pattern", ["M-M-", "*-*-", "M*-"])
def test_other_patterns(engine: BuildEngine, pattern: str) -> None:
    texts = [ids(n, n) for n in (20, 130, 130, 65)]
    wanted = [plain(engine(pattern=pattern), text, WARM) for text in texts]
    for mode in ("off", "memory_only", "snapshots"):
        cached = engine(mode, pattern=pattern, audit_share=1.0)
        assert bits(cached, texts, WARM) == wanted
        assert cached.counters["skipped_tokens"] == (128 if mode == "snapshots" else 0)


def test_a_bf16_model(engine: BuildEngine, build: Callable[..., HybridLM]) -> None:
    model = build("M-*-", dtype=torch.bfloat16)
    texts = [ids(n, n) for n in (20, 130, 130, 65)]
    alone = engine("off", model=model, max_batch=1)
    wanted = [bits(alone, [text], WARM)[0] for text in texts]
    assert bits(engine("snapshots", model=model), texts, WARM) == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch": 0}, "max_batch=0"), ({"max_tokens": 0}, "max_tokens=0"), ({"block_size": 8}, "16 to 256"),
        ({"prefill_chunk": 100}, "multiple of the grid of 64"), ({"audit_share": 2.0}, "outside 0 to 1"),
        ({"draft_length": 2}, "FATHOM_MTP_SPECULATION=on"), ({"kv_blocks": 0}, "kv_blocks=0"),
        ({"no_such": 1}, "no_such"),
    ],
)  # fmt: skip
def test_wrong_configs_are_refused(engine: BuildEngine, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        engine(**options)


def test_what_cannot_be_asked(engine: BuildEngine) -> None:
    running = engine()
    for prompt, message in (([], "prompt is empty"), ([64], "token 64"), ([-1], "token -1")):
        with pytest.raises(UserError, match=message):
            running.submit(prompt, GREEDY)
    for token in (1.9, 2.0, "3", True, float("nan"), None):
        for ask in (
            running.submit,
            lambda ids, _: running.score([(ids, [1])]),
            lambda ids, _: running.score([([1], ids)]),
        ):
            with pytest.raises(UserError, match=f"has {token!r}, which is no whole number; ids are 0 to 63"):
                ask([5, token], GREEDY)
    whole = running.generate([[5, 3]], GREEDY)
    assert [one.tokens for one in running.generate([np.array([5, 3])], GREEDY)] == [one.tokens for one in whole]
    with pytest.raises(UserError, match="one for each"):
        running.generate([[1], [2]], [GREEDY])
    with pytest.raises(UserError, match="has none"):
        engine(speculate=True, pattern="M-*-", draft_length=1)
    assert not running.busy
    assert EngineConfig(max_tokens=5).prefill_chunk == 512


def test_a_short_hash_changes_nothing(engine: BuildEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four bits of hash: collisions everywhere, and tokens are compared."""
    texts = [ids(n, n % 5) for n in (130, 70, 200, 130, 90, 64, 200)]
    wanted = bits(engine(), texts, GREEDY)
    monkeypatch.setattr(libs.model.inference.engine, "PagedKV", functools.partial(PagedKV, hash_bits=4))
    for mode in ("memory_only", "snapshots"):
        short = engine(mode)
        assert bits(short, texts, GREEDY) == wanted
        short.check()


def test_a_state_that_cannot_be_restored_is_computed(engine: BuildEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    text = ids(200, 1)
    wanted = bits(engine(), [text], GREEDY)
    cached = engine("snapshots")
    assert bits(cached, [text], GREEDY) == wanted
    for block, kept in cached._cache._snapshots.items():
        cached._cache._snapshots[block] = kept._replace(blob=kept.blob[:-1] + bytes([kept.blob[-1] ^ 1]))
    (found,) = cached.generate([text], GREEDY)
    assert [(found.tokens, found.logprobs)] == wanted
    assert (found.report.skipped, found.report.reason) == (0, MissReason.RESTORE_FAILED)
    assert bits(cached, [text], GREEDY) == wanted
    assert cached.counters["skipped_tokens"] == 192


def test_an_error_in_a_pass_stops_the_engine(engine: BuildEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    running, whole, calls = engine("snapshots"), Runner.prefill, [0]

    def prefill(self: Runner, lane: Any, tokens: Any, start: int) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 2:
            raise RuntimeError("device lost")
        return whole(self, lane, tokens, start)

    monkeypatch.setattr(Runner, "prefill", prefill)
    number = running.submit(ids(200, 1), GREEDY)
    with pytest.raises(RuntimeError, match="device lost"):
        running.step()
    with pytest.raises(EngineStopped, match="device lost"):
        running.step()
    running.check()
    running.abort(number)
    assert running.usage.active == 0
    assert running._slots.active == ()
    running.close()
    assert bits(running, [ids(200, 1)], GREEDY) == bits(engine(), [ids(200, 1)], GREEDY)


def test_a_long_prompt_does_not_stall_those_that_decode(engine: BuildEngine) -> None:
    running = engine(prefill_chunk=GRID, max_batch=2)
    first = running.submit(ids(10, 1), Sampling(max_new_tokens=6))
    running.submit(ids(500, 2), GREEDY)  # eight chunks
    rounds = [sum(event.request == first for event in running.step()) for _ in range(8)]
    assert rounds == [1, 0, 0, 0, 1, 0, 0, 0]
    assert running.waiting == 0
    assert running.counters["steps"] == 8


def test_a_new_engine_counts_nothing(engine: BuildEngine) -> None:
    fresh = engine()
    assert set(fresh.counters.values()) == {0}
    assert fresh.counters["skipped_tokens"] == 0
    assert not fresh.busy
    assert fresh.step() == []
