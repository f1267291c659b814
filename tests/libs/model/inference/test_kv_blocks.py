"""Blocks of keys and values: who holds what, what is found, what is evicted; failed operations never happened."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from libs.flags.errors import UserError
from libs.model.inference import CapacityError, KvLayout, PagedKV, kv_blocks

B = 16
MANAGERS = Path(kv_blocks.__file__).parent
LAYOUT = KvLayout((1, 4), 2, 4, torch.float32, B)


def paged(blocks: int = 12, *, hash_bits: int = 256, share: bool = True, layout: KvLayout = LAYOUT) -> PagedKV:
    return PagedKV(layout, model="m", blocks=blocks, hash_bits=hash_bits, share=share)


def text(n: int, kind: int = 0) -> list[int]:
    return [(i * 7 + kind) % 50 for i in range(n)]


def run(kv: PagedKV, request: int, prompt: list[int], extra: int = 0) -> int:
    """Add a request and report its prompt and `extra` generated tokens as computed."""
    shared = kv.add(request, prompt)
    kv.complete(request, prompt)
    if extra:
        kv.reserve(request, len(prompt) + extra)
        kv.complete(request, [1] * extra)
    kv.check()
    return shared


def bookkeeping(kv: PagedKV) -> dict[str, Any]:
    """Everything but the tensors and the journal, as it is now."""
    pool = {name: value for name, value in vars(kv._pool).items() if name != "_journal"}
    return copy.deepcopy({"requests": kv._requests, **pool})


@pytest.mark.parametrize(("block", "alone", "shared"), [(256, 30, 12), (64, 110, 20), (16, 410, 50)])
def test_ten_prompts_of_644_tokens(block: int, alone: int, shared: int) -> None:
    """The published workload, in used blocks without the dummy: ten requests at a time, ten new tokens each."""
    layout = KvLayout((0,), 1, 2, torch.bfloat16, block)
    for share, peak in ((False, alone), (True, shared)):
        kv = paged(alone + 1, share=share, layout=layout)
        for request in range(10):
            # Nine of the ten new tokens are run; the tenth is only read. Room for all of them was asked for.
            kv.add(request, text(644), upto=644)
            kv.complete(request, text(644))
            kv.reserve(request, 654)
        kv.check()
        assert kv.usage.active == peak
    for request in range(10):
        kv.release(request)
    assert kv.usage.active == 0


def test_only_whole_computed_blocks_are_found() -> None:
    kv = paged()
    prompt = text(3 * B + 5)
    kv.add(0, prompt)
    assert kv.match(prompt) == ()
    kv.complete(0, prompt[: B - 1])
    assert kv.match(prompt) == ()
    kv.complete(0, prompt[B - 1 : B])
    table = kv.table(0)
    assert kv.match(prompt) == table[:1]
    kv.complete(0, prompt[B:])
    assert kv.match(prompt) == table[:3]
    assert kv.match(prompt[: 3 * B - 1]) == table[:2]
    assert kv.match([*prompt[: 2 * B - 1], 99, *prompt[2 * B :]]) == table[:1]
    assert kv.match([99, *prompt[1:]]) == ()
    # The same tokens under another parent are another block.
    assert kv.match(prompt[B:]) == ()
    assert kv.add(1, prompt) == 3 * B
    assert kv.table(1)[:3] == table[:3]
    assert kv.write_table(1) == (0, 0, 0, kv.table(1)[3])
    assert [kv._pool.refs(block) for block in (*table, kv.table(1)[3])] == [2, 2, 2, 1, 1]
    kv.check()


def test_generated_tokens_are_found_and_rejected_drafts_never() -> None:
    kv = paged()
    prompt = text(B - 2)
    run(kv, 0, prompt)
    kv.reserve(0, B + 20)
    held = len(kv.table(0))
    kv.complete(0, [7, 8])
    assert kv.trim(0) == held - 1 == 2
    assert kv.match([*prompt, 7, 8]) == kv.table(0)
    assert kv.match([*prompt, 7, 9]) == ()
    kv.check()


def test_a_continuation_finds_what_another_request_computed_meanwhile() -> None:
    kv = paged()
    prompt = text(4 * B + 1)
    assert kv.add(0, prompt) == 0
    assert kv.add(1, prompt, upto=B) == 0
    kv.complete(0, prompt[:B])
    # Its first block is its own twin, so what follows cannot be taken from another chain.
    assert kv.reserve(1, 2 * B) == 0
    assert kv.add(2, prompt, upto=B) == B
    kv.complete(0, prompt[B:])
    assert kv.reserve(2, 4 * B + 1) == 3 * B
    kv.complete(1, prompt[: 2 * B])
    assert kv.match(prompt) == kv.table(0)[:4]
    kv.check()
    for request in (0, 1, 2):
        kv.release(request)
    kv.check()
    assert kv.usage[:3] == (7, 4, 0)


@pytest.mark.parametrize("hash_bits", [1, 4, 256])
def test_a_short_hash_changes_nothing(hash_bits: int) -> None:
    kv = paged(60, hash_bits=hash_bits)
    for kind in range(12):
        assert run(kv, kind, text(4 * B, kind)) == 0
    for kind in range(12):
        assert kv.match(text(4 * B, kind)) == kv.table(kind)


def test_leaves_go_first_and_the_longest_unused_of_them() -> None:
    kv = paged(9)
    long, other = text(4 * B), text(2 * B, 3)
    run(kv, 0, long)
    run(kv, 1, other)
    kv.release(0)
    kv.release(1)
    assert kv.usage[:3] == (2, 6, 0)
    kv.add(2, text(4 * B, 9))
    # Two were free; the two that had to go are the ends of the chain that was let go first.
    assert len(kv.match(long)) == 2
    assert len(kv.match(other)) == 2
    kv.check()
    kv.release(2)
    run(kv, 3, long[: 2 * B])
    kv.release(3)
    kv.add(4, text(6 * B, 11))
    # The chain that was used again outlives the other.
    assert len(kv.match(long)) == 2
    assert len(kv.match(other)) == 0
    assert kv.evicted == 4
    kv.check()
    assert kv.drop_cached() == 2
    kv.check()
    assert kv.match(long) == ()


def test_too_little_room_is_said_and_nothing_changes() -> None:
    kv = paged(9)
    run(kv, 0, text(4 * B))
    run(kv, 1, text(2 * B, 3))
    kv.release(1)
    before = bookkeeping(kv)
    with pytest.raises(CapacityError, match="needed 5, available 4") as caught:
        kv.add(2, text(5 * B, 9))
    assert (caught.value.needed, caught.value.available) == (5, 4)
    # Two of the six are found, and are then no longer there to be evicted.
    with pytest.raises(CapacityError, match="needed 3, available 2"):
        kv.add(2, [*text(2 * B, 3), *text(3 * B, 9)])
    with pytest.raises(CapacityError, match="needed 5, available 4"):
        kv.reserve(0, 9 * B)
    assert bookkeeping(kv) == before
    assert kv.add(2, text(4 * B, 9)) == 0
    kv.check()


def test_mistakes_are_refused_and_nothing_changes() -> None:
    kv = paged()
    prompt = text(2 * B + 3)
    run(kv, 0, prompt)
    kv.add(1, prompt, upto=2 * B)
    before = bookkeeping(kv)
    cases: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: kv.add(0, prompt), ValueError, "already holds"),
        (lambda: kv.add(7, []), UserError, "empty"),
        (lambda: kv.complete(1, [99]), ValueError, "not those of its prompt"),
        (lambda: kv.complete(1, prompt), ValueError, "35 tokens in 2 blocks"),
        (lambda: kv.complete(0, [1] * B), ValueError, "51 tokens in 3 blocks"),
        (lambda: kv.skip(1, 3 * B), ValueError, "cannot skip"),
        (lambda: kv.skip(1, B + 1), ValueError, "cannot skip"),
        (lambda: kv.skip(0, B), ValueError, "cannot skip"),
        (lambda: kv.release(7), ValueError, "never added, or already released"),
        (lambda: kv.read(0, 0, 3), ValueError, "no attention block"),
        (lambda: kv.read(1, 0, 3 * B + 1), ValueError, "49 tokens in 3 blocks"),
    ]
    for call, kind, match in cases:
        with pytest.raises(kind, match=match):
            call()
    assert bookkeeping(kv) == before
    kv.skip(1, B)
    assert kv.length(1) == B
    kv.release(0)
    with pytest.raises(ValueError, match="already released"):
        kv.release(0)
    kv.check()


def test_the_whole_prompt_is_never_skipped() -> None:
    kv = paged()
    run(kv, 0, text(2 * B))
    kv.add(1, text(2 * B))
    with pytest.raises(ValueError, match="cannot skip 32"):
        kv.skip(1, 2 * B)


def values(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = torch.randn(2, n, 2, 4, generator=torch.Generator().manual_seed(seed))
    return k, v


def test_what_is_written_is_read_and_shared_blocks_keep_their_bits() -> None:
    kv = paged()
    prompt = text(2 * B + 5)
    kv.add(0, prompt)
    wanted = {layer: values(len(prompt), layer) for layer in (1, 4)}
    for layer, (k, v) in wanted.items():
        kv.write(layer, 0, 0, k[:20], v[:20])
        kv.write(layer, 0, 20, k[20:], v[20:])
    kv.complete(0, prompt)
    assert kv.add(1, prompt) == 2 * B
    for layer in (1, 4):
        kv.write(layer, 1, 0, *values(len(prompt), 77))
    for layer, (k, v) in wanted.items():
        for got, want in zip(kv.read(layer, 0, len(prompt)), (k, v), strict=True):
            assert torch.equal(got, want)
        got_k, _ = kv.read(layer, 1, len(prompt))
        assert torch.equal(got_k[: 2 * B], k[: 2 * B])
        assert torch.equal(got_k[2 * B :], values(len(prompt), 77)[0][2 * B :])
    for call, match in (
        (lambda: kv.write(1, 0, 3, *values(1, 0)), "all between the 37 that are complete"),
        (lambda: kv.write(1, 1, 40, *values(9, 0)), "end of its 3 blocks"),
        (lambda: kv.write(1, 1, 0, *(part.bfloat16() for part in values(2, 0))), "keys must be"),
        (lambda: kv.write(1, 1, 0, values(2, 0)[0], values(3, 0)[0]), "values must be"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


class Injected(Exception):
    """Raised in the middle of an operation."""


def raising_at(line: int, call: Callable[[], object]) -> bool:
    """Run `call`, raising before the line-th line of the managers' own code; whether it came that far."""
    left = line

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if Path(frame.f_code.co_filename).parent != MANAGERS:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                sys.settrace(None)
                raise Injected
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Injected:
        return True
    finally:
        sys.settrace(before)
    return False


def busy() -> PagedKV:
    """Free, cached and active blocks, and prompts of which a part is cached."""
    kv = paged(11)
    run(kv, 0, text(3 * B))
    run(kv, 1, text(2 * B, 5), extra=3)
    kv.release(0)
    kv.add(2, text(2 * B + 2, 8))
    return kv


OPERATIONS: dict[str, Callable[[PagedKV], object]] = {
    # One block is found, one is free, and one of the cached has to go.
    "add": lambda kv: kv.add(9, [*text(B), *text(2 * B, 30)]),
    "reserve": lambda kv: kv.reserve(1, 5 * B),
    "complete": lambda kv: kv.complete(2, text(2 * B + 2, 8)),
    "release": lambda kv: kv.release(1),
    "drop_cached": lambda kv: kv.drop_cached(),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_exception_anywhere_leaves_everything_as_before(name: str) -> None:
    kv, line = busy(), 1
    before = bookkeeping(kv)
    while raising_at(line, lambda: OPERATIONS[name](kv)):
        assert bookkeeping(kv) == before, f"line {line} of {name}"
        kv.check()
        line += 1
    assert line > 20
    kv.check()
    assert bookkeeping(kv) != before


def test_the_injection_finds_an_operation_without_a_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    kv = busy()
    monkeypatch.setattr(type(kv._journal), "_take_back", lambda self: None)
    before, line, differs = bookkeeping(kv), 1, 0
    while not differs and raising_at(line, lambda: kv.add(9, text(B, 30))):
        differs += bookkeeping(kv) != before
        line += 1
    assert differs


def test_the_check_sees_what_is_wrong() -> None:
    """Each invariant broken by hand."""

    def leak(kv: PagedKV) -> None:
        kv._pool._refs[kv.table(1)[0]] += 1

    def lose(kv: PagedKV) -> None:
        kv._requests[1].blocks.pop()
        kv._requests[1].owned.pop()

    def rename(kv: PagedKV) -> None:
        block = kv.table(1)[0]
        kv._pool._tokens[block] = tuple(text(B, 44))

    def unlink(kv: PagedKV) -> None:
        pool = kv._pool
        first = pool._after[-1]
        pool._after[-1] = pool._after.pop(first)
        pool._before[pool._after[-1]] = -1
        del pool._before[first]

    def reorder(kv: PagedKV) -> None:
        ring, cached = kv._pool, list(kv._pool._ring(-2))
        order = [-2, *reversed(cached), -2]
        for before, after in pairwise(order):
            ring._after[before], ring._before[after] = after, before

    for breaks in (leak, lose, rename, unlink, reorder):
        kv = busy()
        kv.check()
        breaks(kv)
        with pytest.raises(AssertionError):
            kv.check()
