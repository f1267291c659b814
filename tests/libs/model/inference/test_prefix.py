"""What a request skips, what it shares, why not more, and that outputs are the same with the cache as without."""

from __future__ import annotations

import pytest
import torch

from libs.flags.errors import UserError
from libs.model.inference import CapacityError, MissReason, PrefixMode, StateSlots
from libs.model.inference.state_slots import StateSlots as Slots
from tests.libs.model.inference.toy import NO_STATE, VOCAB, Engine, continued

B = 16
CACHING = [PrefixMode.MEMORY_ONLY, PrefixMode.SNAPSHOTS]
LENGTHS = [1, B - 1, B, B + 1, 2 * B - 1, 2 * B, 2 * B + 1, 5 * B + 1, 7 * B]


def text(n: int, kind: int = 0) -> list[int]:
    return [(i * i + i // 5 + kind) % VOCAB for i in range(n)]


def change(prompt: list[int], at: int) -> list[int]:
    return [*prompt[:at], (prompt[at] + 1) % VOCAB, *prompt[at + 1 :]]


def follow_ups(n: int) -> dict[str, list[int]]:
    """The second prompts of INFERENCE.md, test 1."""
    prompt, last = text(n), (n - 1) // B * B
    changed = {"first": last, "inside": min(last + 5, n - 1), "last": min(last + B - 1, n - 1)}
    return {
        "cold": text(n, 1), "repeat": prompt, "extend by 1": [*prompt, 2], "extend by b": [*prompt, *text(B, 1)],
        **{f"diverge at {name}": change(prompt, at) for name, at in changed.items()},
    }  # fmt: skip


@pytest.mark.parametrize("mode", CACHING)
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("budget", [1 << 30, 24])
def test_on_equals_off(mode: PrefixMode, n: int, budget: int) -> None:
    for name, prompt in follow_ups(n).items():
        on, off = Engine(mode, blocks=40), Engine(PrefixMode.OFF, blocks=40)
        for step, tokens in enumerate((text(n), prompt, prompt)):
            found, report = on.generate(tokens, 5, budget=budget)
            plain, reference = off.generate(tokens, 5, budget=budget)
            assert found == plain == continued(tokens, 5), (name, step)
            # The last of the five outputs is read and never run.
            assert report.skipped + report.computed == reference.computed == len(tokens) + 4
            assert reference[:2] == (0, 0)
            assert reference.reason is MissReason.OFF
            assert report.skipped < len(tokens)
            if mode is PrefixMode.MEMORY_ONLY:
                assert report.skipped == 0
            on.check()
        assert report.matched == len(prompt) // B * B
        if mode is PrefixMode.SNAPSHOTS:
            assert report.skipped == (len(prompt) - 1) // B * B


@pytest.mark.parametrize(("block", "skipped"), [(16, 640), (64, 640), (256, 512)])
def test_an_exact_repeat_of_644_tokens(block: int, skipped: int) -> None:
    engine = Engine(PrefixMode.SNAPSHOTS, block_size=block, blocks=100, max_batch=10, max_snapshot_bytes=1 << 20)
    prompt = text(644)
    _, first = engine.generate(prompt, 3)
    assert first.skipped == 0
    for _ in range(9):
        found, report = engine.generate(prompt, 3)
        assert found == continued(prompt, 3)
        assert (report.skipped, report.computed, report.reason) == (skipped, 646 - skipped, None)
    counters = engine.cache.counters
    assert counters["skipped_tokens"] == 9 * skipped
    assert counters["computed_tokens"] == 646 + 9 * (646 - skipped)
    assert counters["snapshots_captured"] == 1
    assert block == 256 or skipped / 644 > 0.99


def test_memory_only_runs_every_token_and_writes_beside() -> None:
    engine = Engine(PrefixMode.MEMORY_ONLY, blocks=40)
    prompt = text(5 * B + 3)
    requests = [engine.submit(prompt, upto=B) for _ in range(2)]
    engine.prefill(requests[0])
    third = engine.submit(prompt, upto=B)
    bits = engine.kv._v.clone()
    while not engine.prefill(third, 24):
        pass
    shared = torch.tensor(engine.kv.table(third)[:5])
    rows = (shared[:, None] * B + torch.arange(B)).flatten()
    assert engine.kv.write_table(third)[:5] == (0,) * 5
    assert torch.equal(engine.kv._v[:, rows], bits[:, rows])
    assert engine.kv.usage.active == 6 + 1 + 1
    assert engine.cache.release(third) == (5 * B, 0, len(prompt), MissReason.MEMORY_ONLY)


def test_every_miss_has_its_reason() -> None:
    engine = Engine(PrefixMode.SNAPSHOTS, blocks=60)
    prompt = text(6 * B + 4)

    def report(tokens: list[int]) -> tuple[int, int, MissReason | None]:
        found, got = engine.generate(tokens, 2)
        assert found == continued(tokens, 2)
        return got.matched, got.skipped, got.reason

    assert report(text(B)) == (0, 0, MissReason.TOO_SHORT)
    engine.cache.clear()
    assert report(prompt) == (0, 0, MissReason.UNKNOWN_PREFIX)
    assert report(prompt) == (6 * B, 6 * B, None)
    assert report(change(prompt, 3 * B + 1)) == (3 * B, 0, MissReason.NO_STATE)
    assert report([*prompt, *text(4 * B)]) == (6 * B, 6 * B, MissReason.DIVERGED)
    spoil(engine, 6 * B)
    assert report(prompt) == (6 * B, 0, MissReason.RESTORE_FAILED)
    assert report(prompt) == (6 * B, 6 * B, None)
    counters = engine.cache.counters
    found = {name.removeprefix("miss."): count for name, count in counters.items() if name.startswith("miss.")}
    assert found == {"too_short": 1, "unknown_prefix": 1, "no_state": 1, "diverged": 1, "restore_failed": 1}
    assert counters["snapshots_refused"] == 1


def spoil(engine: Engine, tokens: int, *, cut: bool = False) -> None:
    """Flip a bit of, or cut, the kept states at this count."""
    for block, snapshot in engine.cache._snapshots.items():
        if snapshot.tokens == tokens:
            blob = bytearray(snapshot.blob)
            blob[-1] ^= 1
            engine.cache._snapshots[block] = snapshot._replace(blob=bytes(blob))


def test_a_refused_state_falls_back_to_an_earlier_one() -> None:
    engine = Engine(PrefixMode.SNAPSHOTS, blocks=60)
    short, long = text(2 * B + 1), text(5 * B + 1)
    engine.generate(short, 1)
    engine.generate(long, 1)
    spoil(engine, 5 * B)
    found, report = engine.generate(long, 6)
    assert found == continued(long, 6)
    assert (report.skipped, report.reason) == (2 * B, MissReason.RESTORE_FAILED)


class Breaks(Slots):
    """A device that fails in the middle of a restore."""

    def restore(self, slot: int, blob: bytes) -> int:
        self._states["hash"][:, slot] = 99
        raise RuntimeError("device lost")


def test_an_error_while_admitting_leaves_nothing_behind() -> None:
    engine = Engine(PrefixMode.SNAPSHOTS, slots_type=Breaks)
    prompt = text(3 * B + 1)
    engine.generate(prompt, 2)
    with pytest.raises(RuntimeError, match="device lost"):
        engine.submit(prompt)
    assert engine.slots.active == ()
    assert engine.kv.usage.active == 0
    engine.cache.check()
    with pytest.raises(CapacityError):
        engine.submit(text(400))
    assert engine.slots.active == ()
    with pytest.raises(UserError, match="empty"):
        engine.submit([])
    assert engine.slots.active == ()
    engine.cache.check()


@pytest.mark.parametrize("mode", [PrefixMode.OFF, *CACHING])
def test_an_abort_in_every_phase_frees_everything(mode: PrefixMode) -> None:
    prompt = text(4 * B + 2)
    for chunks in range(6):
        for drafts in ([], [1, 2]):
            engine = Engine(mode, blocks=40)
            engine.generate(prompt, 2)
            engine.cache.clear()
            request = engine.submit(prompt, upto=B)
            done = any(engine.prefill(request, B) for _ in range(chunks))
            if done:
                engine.decode(request, drafts)
            engine.finish(request)
            engine.check()
            assert engine.kv.usage.active == 0
            assert engine.slots.active == ()
            with pytest.raises(ValueError, match="already released"):
                engine.cache.release(request)


def test_boundaries_are_on_the_grid_too() -> None:
    engine = Engine(PrefixMode.SNAPSHOTS, blocks=60, grid=24)
    assert engine.cache.unit == 48
    prompt = text(7 * B)
    engine.generate(prompt, 1)
    for _ in range(2):
        found, report = engine.generate(prompt, 4)
        assert found == continued(prompt, 4)
        assert (report.matched, report.skipped, report.reason) == (7 * B, 96, None)


def test_kept_states_have_a_limit_and_go_with_their_blocks() -> None:
    engine = Engine(PrefixMode.SNAPSHOTS, blocks=60)
    engine.generate(text(B + 1), 1)
    one = engine.cache.snapshot_bytes
    engine = Engine(PrefixMode.SNAPSHOTS, blocks=9, max_snapshot_bytes=2 * one + 16)
    for kind in range(3):
        engine.generate(text(2 * B + 1, kind), 1)
        engine.check()
    assert engine.cache.counters["snapshots_dropped"] == 1
    assert engine.generate(text(2 * B + 1, 0), 1)[1].reason is not None
    # A prompt that takes every block: no state survives its own.
    engine.generate([*change(text(8 * B - 2), 0)], 1)
    engine.generate(text(2 * B + 1, 1), 1)
    assert engine.cache.snapshot_bytes <= 2 * one + 16
    engine.check()
    none = Engine(PrefixMode.SNAPSHOTS, max_snapshot_bytes=0)
    none.generate(text(3 * B), 1)
    assert none.generate(text(3 * B), 1)[1].reason is MissReason.NO_STATE


@pytest.mark.parametrize("mode", CACHING)
def test_without_recurrent_layers_any_boundary_will_do(mode: PrefixMode) -> None:
    engine = Engine(mode, blocks=60, layout=NO_STATE)
    prompt = text(5 * B)
    engine.generate(prompt, 3)
    for tokens, skipped in ((prompt, 4 * B), (change(prompt, 3 * B), 3 * B), (prompt[: 2 * B + 1], 2 * B)):
        found, report = engine.generate(tokens, 3)
        assert found == continued(tokens, 3, recurrent=False)
        assert report.skipped == (skipped if mode is PrefixMode.SNAPSHOTS else 0)
    assert engine.cache.snapshot_bytes == 0


@pytest.mark.parametrize("drafts_right", range(4))
@pytest.mark.parametrize("mode", [PrefixMode.OFF, *CACHING])
def test_verified_drafts_equal_plain_decode(mode: PrefixMode, drafts_right: int) -> None:
    """The first j of three drafts right, again and again over block ends; state and blocks as after plain decode."""
    prompt = text(B + 6)
    wanted = continued(prompt, 40)
    engine, plain = Engine(mode, blocks=40), Engine(PrefixMode.OFF, blocks=40)
    request, other = engine.submit(prompt), plain.submit(prompt)
    while not engine.prefill(request):
        pass
    while not plain.prefill(other):
        pass
    run = engine.running[request]
    while len(run.generated) < 36:
        at = len(run.generated)
        drafts = [token if j < drafts_right else (token + 1) % VOCAB for j, token in enumerate(wanted[at : at + 3])]
        assert engine.decode(request, drafts) == drafts_right + 1
        for _ in range(drafts_right + 1):
            plain.decode(other)
        engine.check()
        for name, tensor in engine.slots._states.items():
            assert torch.equal(tensor[:, run.slot], plain.slots._states[name][:, 0])
        assert len(engine.kv.table(request)) == len(plain.kv.table(other))
    assert run.generated == wanted[: len(run.generated)]
    # None of what was drafted and rejected can be found; what was generated can.
    engine.finish(request)
    text_now = [*prompt, *run.generated]
    known = len(engine.kv.match(text_now)) * B
    assert known == (0 if mode is PrefixMode.OFF else (len(text_now) - 1) // B * B)


def test_wrong_configs_are_refused() -> None:
    engine = Engine(PrefixMode.SNAPSHOTS)
    build = type(engine.cache)
    for options in ({"grid": 0}, {"max_snapshot_bytes": -1}):
        with pytest.raises(UserError, match="grid >= 1"):
            build(engine.kv, engine.slots, PrefixMode.SNAPSHOTS, **options)
    with pytest.raises(UserError, match="'off' with blocks that are shared"):
        build(engine.kv, engine.slots, PrefixMode.OFF)
    assert isinstance(engine.slots, StateSlots)
