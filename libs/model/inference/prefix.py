"""The prefix cache: which part of a prompt need not be computed again, and what may be kept for later prompts.

memory_only shares blocks of keys and values, and every prompt token still runs. snapshots also skips: to a token count
at which keys and values of all attention layers and states of all recurrent layers exist, at exactly that count.
Not for running the model: whoever does, reports what is computed (`completed`).
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from libs.flags.errors import UserError
from libs.model.inference.blob import BlobRefused
from libs.model.inference.kv_blocks import PagedKV
from libs.model.inference.resources import NotCopyable
from libs.model.inference.state_slots import StateSlots


class PrefixMode(StrEnum):
    """The values of the gate `prefix_cache`."""

    OFF = "off"
    MEMORY_ONLY = "memory_only"
    SNAPSHOTS = "snapshots"


class MissReason(StrEnum):
    """Why a request skipped less than its prompt would allow."""

    OFF = "off"  # the cache is off
    TOO_SHORT = "too_short"  # no boundary before the prompt's last token
    UNKNOWN_PREFIX = "unknown_prefix"  # not even the first block is known
    MEMORY_ONLY = "memory_only"  # blocks are shared, and this mode never skips
    NO_STATE = "no_state"  # blocks are known further than any state
    RESTORE_FAILED = "restore_failed"  # a state was there and was refused
    DIVERGED = "diverged"  # known up to a block in the middle of the prompt


class PrefixReport(NamedTuple):
    """Tokens of one request: in shared blocks, not computed, computed (generated ones among them). reason: of the miss;
    None when no more could have been skipped."""

    matched: int
    skipped: int
    computed: int
    reason: MissReason | None


class Admission(NamedTuple):
    """slot: of the recurrent state. start: the first token to compute; the states are those after the tokens before."""

    slot: int
    start: int


class Pin(NamedTuple):
    """A prefix kept by name: request: the number under which its blocks are held. tokens: how many. block: its last."""

    request: int
    tokens: int
    block: int


class _Snapshot(NamedTuple):
    stamp: int
    tokens: int
    blob: bytes


@dataclass
class _Request:
    """context: tokens of the prompt that other requests are expected to begin with."""

    slot: int
    context: int
    matched: int
    skipped: int
    miss: MissReason | None
    computed: int = 0


class PrefixCache(NotCopyable):
    """Admits requests to a `PagedKV` and a `StateSlots` that it alone drives.

    Attributes:
        counters: requests, prompt_tokens, matched_tokens, skipped_tokens, computed_tokens; snapshots_captured, _used,
            _dropped, _refused; and miss.<reason>.
    """

    def __init__(
        self,
        kv: PagedKV,
        slots: StateSlots,
        mode: PrefixMode,
        *,
        grid: int = 1,
        max_snapshot_bytes: int = 1 << 30,
    ) -> None:
        """
        Args:
            grid: prefill works on multiples of this many tokens, counted from token 0, so skipping ends on one too.
            max_snapshot_bytes: of states kept; those used longest ago are dropped.

        Raises:
            UserError: grid < 1, negative bytes, or `kv` shares blocks in mode off, or does not in another.
        """
        if grid < 1 or max_snapshot_bytes < 0:
            raise UserError(f"need grid >= 1 and max_snapshot_bytes >= 0, got {grid} and {max_snapshot_bytes}")
        if kv.share != (mode is not PrefixMode.OFF):
            raise UserError(f"prefix cache {mode.value!r} with blocks that are {'' if kv.share else 'not '}shared")
        self._kv, self._slots, self.mode = kv, slots, mode
        # Boundaries are whole blocks and whole steps of the grid at once.
        self.unit = math.lcm(kv.layout.block_size, grid)
        self._max_bytes, self._bytes, self._evicted = max_snapshot_bytes, 0, 0
        self._snapshots: OrderedDict[int, _Snapshot] = OrderedDict()
        self._requests: dict[int, _Request] = {}
        self._pins: dict[str, Pin] = {}
        self.counters: Counter[str] = Counter()

    @property
    def snapshot_bytes(self) -> int:
        """Bytes of the states kept."""
        return self._bytes

    @property
    def max_snapshot_bytes(self) -> int:
        """Most bytes of states kept."""
        return self._max_bytes

    def admit(
        self,
        request: int,
        prompt: Sequence[int],
        *,
        upto: int | None = None,
        context: int | None = None,
        common: int | None = None,
    ) -> Admission:
        """Take a slot and the blocks of the first `upto` tokens (the whole prompt by default).

        With snapshots the slot then holds the state after `start` tokens; otherwise start is 0 and the state is zero.

        Args:
            context: tokens at the start of the prompt whose last output is wanted, so at most one less is skipped, and
                states are kept for others that begin with them. None: the whole prompt. common: see `PagedKV.add`.

        Raises:
            CapacityError: no slot or too few blocks; nothing was changed. UserError: an empty prompt.
        """
        wanted = len(prompt) if context is None else context
        slot = self._slots.alloc()
        try:
            matched = self._kv.add(request, prompt, upto=upto, common=common)
        except BaseException:
            self._slots.free(slot)
            raise
        try:
            start, failed = self._resume(request, slot, wanted, matched)
        except BaseException:
            self._kv.release(request)
            self._slots.free(slot)
            raise
        miss = self._miss(wanted, matched, start, failed)
        self._requests[request] = _Request(slot, wanted, matched, start, miss)
        self.counters.update(requests=1, prompt_tokens=len(prompt), matched_tokens=matched, skipped_tokens=start)
        if miss is not None:
            self.counters[f"miss.{miss.value}"] += 1
        return Admission(slot, start)

    def reserve(self, request: int, total: int) -> None:
        """Blocks for a continuation chunk or for generated tokens. What is known by now is shared here too, and is
        computed nevertheless: the state is further back. Raises CapacityError."""
        entry = self._entry(request)
        shared = self._kv.reserve(request, total)
        entry.matched += shared
        self.counters["matched_tokens"] += shared

    def completed(self, request: int, tokens: Sequence[int]) -> None:
        """These next tokens are computed: their keys and values are in the blocks, and the slot's state includes them.

        Blocks they fill can be found from now on. At some boundaries the state is kept, so a prefill must report at
        every multiple of the grid.
        """
        entry = self._entry(request)
        self._kv.complete(request, tokens)
        self._slots.advance(entry.slot, len(tokens))
        entry.computed += len(tokens)
        self.counters["computed_tokens"] += len(tokens)
        if self._kv.length(request) in self._points(entry.context):
            self.capture(request)

    def is_hit(self, request: int) -> bool:
        """Whether it shares blocks or skipped tokens."""
        return self._entry(request).matched > 0

    def capture(self, request: int) -> bool:
        """Keep the state of a request where it stands, for later prompts; whether there was anything to keep.

        Nothing is kept between boundaries, in modes without snapshots, without recurrent layers, under blocks that
        nobody can find (a twin computed them first), or where a state is kept already.
        """
        entry, done = self._entry(request), self._kv.length(request)
        if self.mode is not PrefixMode.SNAPSHOTS or not self._slots.num_layers or not done or done % self.unit:
            return False
        assert self._slots.position(entry.slot) == done, "the state and the keys are at different tokens"
        self._forget_evicted()
        block = self._kv.table(request)[done // self._kv.layout.block_size - 1]
        stamp = self._kv.stamp(block)
        if stamp is None or block in self._snapshots:
            return False
        blob = self._slots.capture(entry.slot)
        if len(blob) > self._max_bytes:
            return False
        self._snapshots[block] = _Snapshot(stamp, done, blob)
        self._bytes += len(blob)
        pinned = {pin.block for pin in self._pins.values()}
        while self._bytes > self._max_bytes:
            self._drop(next(kept for kept in self._snapshots if kept not in pinned))
        self.counters["snapshots_captured"] += 1
        return True

    def trim(self, request: int) -> int:
        """Let go of the blocks of rejected drafts; how many."""
        self._entry(request)
        return self._kv.trim(request)

    def release(self, request: int) -> PrefixReport:
        """The request is over, or aborted in any phase. Raises ValueError for an unknown one."""
        entry = self._entry(request)
        self._kv.release(request)
        self._slots.free(entry.slot)
        del self._requests[request]
        return PrefixReport(entry.matched, entry.skipped, entry.computed, entry.miss)

    @property
    def pins(self) -> Mapping[str, Pin]:
        """Prefixes kept by name."""
        return dict(self._pins)

    def state_at(self, pin: Pin) -> bytes | None:
        """The state kept at the end of a pinned prefix; None without recurrent layers, or when it was refused since."""
        kept = self._snapshots.get(pin.block)
        return None if kept is None else kept.blob

    def pin(self, request: int, name: str) -> bool:
        """Keep the blocks and the state of a request under a name and end it; whether there was a state to keep.

        It must stand at a boundary, under blocks that others can find. When there is none, the request goes on.
        """
        entry, done = self._entry(request), self._kv.length(request)
        assert name not in self._pins, "one prefix per name"
        assert done, "a prefix has tokens"
        assert done % self.unit == 0, "a prefix ends on a boundary"
        block = self._kv.table(request)[done // self._kv.layout.block_size - 1]
        if self._kv.stamp(block) is None or (self._slots.num_layers and block not in self._snapshots):
            return False
        self._slots.free(entry.slot)
        del self._requests[request]
        self._pins[name] = Pin(request, done, block)
        return True

    def unpin(self, name: str) -> None:
        """Its blocks and its state become cache like any other."""
        self._kv.release(self._pins.pop(name).request)

    def clear(self) -> None:
        """Forget every prefix that no request holds, pinned ones too, and all states kept."""
        for name in list(self._pins):
            self.unpin(name)
        self._kv.drop_cached()
        for block in list(self._snapshots):
            self._drop(block)

    def check(self) -> None:
        """All invariants of this and of the blocks, in O(pool). Raises AssertionError."""
        self._kv.check()
        held = (*self._requests, *(pin.request for pin in self._pins.values()))
        assert self._kv.requests == tuple(sorted(held)), "requests"
        assert self._bytes == sum(len(snapshot.blob) for snapshot in self._snapshots.values()), "bytes"
        assert self._bytes <= self._max_bytes, "more states than allowed"
        if self._slots.num_layers:
            assert self._slots.active == tuple(sorted(entry.slot for entry in self._requests.values())), "slots"
            for request, entry in self._requests.items():
                assert self._slots.position(entry.slot) == self._kv.length(request), "state and keys differ in count"
        for request, entry in self._requests.items():
            assert entry.skipped + entry.computed == self._kv.length(request), "tokens are skipped or computed"

    def _resume(self, request: int, slot: int, prompt: int, matched: int) -> tuple[int, bool]:
        """Put the slot behind as many tokens as possible: (that count, whether a state was refused on the way)."""
        if self.mode is not PrefixMode.SNAPSHOTS:
            return 0, False
        self._forget_evicted()
        table, size, failed = self._kv.table(request), self._kv.layout.block_size, False
        # At least one token is computed: without it there are no logits.
        for tokens in range(min(matched, prompt - 1) // self.unit * self.unit, 0, -self.unit):
            if self._slots.num_layers:
                block = table[tokens // size - 1]
                snapshot = self._snapshots.get(block)
                if snapshot is None:
                    continue
                if not self._restored(slot, snapshot, tokens):
                    failed = True
                    self._drop(block)
                    self.counters["snapshots_refused"] += 1
                    continue
                self._snapshots.move_to_end(block)
                self.counters["snapshots_used"] += 1
            self._kv.skip(request, tokens)
            return tokens, failed
        return 0, failed

    def _restored(self, slot: int, snapshot: _Snapshot, tokens: int) -> bool:
        """Whether the slot now holds the state after exactly that many tokens; if not, it is as new."""
        try:
            if snapshot.tokens == tokens and self._slots.restore(slot, snapshot.blob) == tokens:
                return True
        except BlobRefused:
            pass
        self._slots.clear(slot)
        return False

    def _miss(self, prompt: int, matched: int, start: int, failed: bool) -> MissReason | None:
        best = (prompt - 1) // self.unit * self.unit
        known = min(matched // self.unit * self.unit, best)
        reasons = (
            (self.mode is PrefixMode.OFF, MissReason.OFF),
            (best == 0, MissReason.TOO_SHORT),
            (matched == 0, MissReason.UNKNOWN_PREFIX),
            (self.mode is PrefixMode.MEMORY_ONLY, MissReason.MEMORY_ONLY),
            (failed, MissReason.RESTORE_FAILED),
            (start < known, MissReason.NO_STATE),
            (start < best, MissReason.DIVERGED),
        )
        return next((reason for holds, reason in reasons if holds), None)

    def _points(self, prompt: int) -> set[int]:
        """Counts at which a state is worth keeping: the last boundary that the same prompt could skip to, and the
        last one that a longer prompt could."""
        if self.mode is not PrefixMode.SNAPSHOTS or not self._slots.num_layers:
            return set()
        return {(prompt - 1) // self.unit * self.unit, prompt // self.unit * self.unit} - {0}

    def _forget_evicted(self) -> None:
        """Drop states whose blocks were evicted since the last look."""
        if self._evicted == self._kv.evicted:
            return
        self._evicted = self._kv.evicted
        for block, snapshot in list(self._snapshots.items()):
            if self._kv.stamp(block) != snapshot.stamp:
                self._drop(block)

    def _drop(self, block: int) -> None:
        self._bytes -= len(self._snapshots.pop(block).blob)
        self.counters["snapshots_dropped"] += 1

    def _entry(self, request: int) -> _Request:
        if request not in self._requests:
            raise ValueError(f"request {request} was not admitted, or is already released")
        return self._requests[request]
