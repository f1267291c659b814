"""Which KV block is free, cached or in use, and which full blocks follow which: the bookkeeping, without tensors.

A block is free (no holder, meaningless), active (one holder or more), or cached (no holder, but registered: its tokens
are known and a later request may take it). Registered blocks form chains: a block's key is its parent block and its own
tokens, and whoever holds a block holds its parent. So whatever descends from a cached block is cached too.
Not for requests (`kv_blocks`).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from libs.model.inference.journal import Journal
from libs.model.inference.resources import CapacityError

# Written to by whoever must not write where it reads; never read, never given out.
DUMMY = 0
ROOT = -1
# Heads of the two rings below.
_FREE, _CACHED = -1, -2
DIGEST_BITS = 256


class BlockUsage(NamedTuple):
    """Blocks by what they are; they add up to the pool."""

    free: int
    cached: int
    active: int
    dummy: int


class BlockPool:
    """Blocks 1..n-1 by number, and the dummy block 0.

    Free and cached blocks are rings through two dicts, oldest first, so that every change is an assignment that the
    journal can take back. In the cached ring a child always comes before its parent, because it was let go earlier.
    """

    def __init__(self, blocks: int, journal: Journal, *, name: bytes, hash_bits: int = DIGEST_BITS) -> None:
        """`name` starts every hash chain (model, dtype, block size); `hash_bits` of it are kept."""
        self._journal, self._blocks, self._hash_bits = journal, blocks, hash_bits
        self._root = hashlib.sha256(name).digest()
        ring = [_FREE, *range(1, blocks), _FREE]
        self._after: dict[int, int] = {**dict(pairwise(ring)), _CACHED: _CACHED}
        self._before: dict[int, int] = {**dict(pairwise(reversed(ring))), _CACHED: _CACHED}
        self._refs = dict.fromkeys(range(1, blocks), 0)
        # Registered blocks only:
        self._parent: dict[int, int] = {}
        self._tokens: dict[int, tuple[int, ...]] = {}
        self._digest: dict[int, bytes] = {}
        self._children: dict[int, int] = {}
        self._stamp: dict[int, int] = {}
        self._index: dict[int, tuple[int, ...]] = {}
        self._counts = {"free": blocks - 1, "cached": 0, "stamps": 0, "evicted": 0}

    @property
    def usage(self) -> BlockUsage:
        free, cached = self._counts["free"], self._counts["cached"]
        return BlockUsage(free, cached, self._blocks - 1 - free - cached, 1)

    @property
    def evicted(self) -> int:
        """Registered blocks that had to make room so far."""
        return self._counts["evicted"]

    def refs(self, block: int) -> int:
        return self._refs[block]

    def stamp(self, block: int) -> int | None:
        """A number that this registration of the block has alone; None while it is not registered."""
        return self._stamp.get(block)

    def find(self, parent: int, tokens: tuple[int, ...]) -> int | None:
        """The registered block with this parent and exactly these tokens."""
        for block in self._index.get(self._key(self._chain(parent, tokens)), ()):
            if self._parent[block] == parent and self._tokens[block] == tokens:
                return block
        return None

    def take(self) -> int:
        """A block for a new holder to write: a free one, or else the cached leaf that was let go longest ago.

        Raises:
            CapacityError: every block is in use.
        """
        block: int = self._after[_FREE]
        if block == _FREE:
            block = self._after[_CACHED]
            if block == _CACHED:
                raise CapacityError("KV blocks", needed=1, available=0)
            self._evict(block)
        self._unlink(block, "free")
        self._journal.put(self._refs, block, 1)
        return block

    def share(self, block: int) -> None:
        """One more holder of a registered block."""
        assert block in self._tokens, "only a full block with known tokens is shared"
        if not self._refs[block]:
            self._unlink(block, "cached")
        self._journal.put(self._refs, block, self._refs[block] + 1)

    def let_go(self, block: int) -> None:
        """One holder less. A request lets go of its blocks last one first."""
        assert self._refs[block] > 0, f"block {block} was released more often than it was taken"
        self._journal.put(self._refs, block, self._refs[block] - 1)
        if not self._refs[block]:
            kind = "cached" if block in self._tokens else "free"
            self._link(block, self._before[_CACHED if kind == "cached" else _FREE], kind)

    def register(self, block: int, parent: int, tokens: tuple[int, ...]) -> bool:
        """Make a full block findable; False when another block already is, under the same key."""
        assert self._refs[block] > 0, "registered by its holder"
        if self.find(parent, tokens) is not None:
            return False
        put, digest = self._journal.put, self._chain(parent, tokens)
        key, stamp = self._key(digest), self._counts["stamps"] + 1
        put(self._parent, block, parent)
        put(self._tokens, block, tokens)
        put(self._digest, block, digest)
        put(self._children, block, 0)
        put(self._counts, "stamps", stamp)
        put(self._stamp, block, stamp)
        put(self._index, key, (*self._index.get(key, ()), block))
        if parent != ROOT:
            put(self._children, parent, self._children[parent] + 1)
        return True

    def drop_cached(self) -> int:
        """Make every cached block free; how many there were."""
        dropped = self._counts["cached"]
        while self._after[_CACHED] != _CACHED:
            self._evict(self._after[_CACHED])
        return dropped

    def _evict(self, block: int) -> None:
        """Cached to free; the next to be taken."""
        assert not self._children[block], "leaves first: a cached child would be unreachable"
        parent, key, drop = self._parent[block], self._key(self._digest[block]), self._journal.drop
        if parent != ROOT:
            self._journal.put(self._children, parent, self._children[parent] - 1)
        rest = tuple(other for other in self._index[key] if other != block)
        if rest:
            self._journal.put(self._index, key, rest)
        else:
            drop(self._index, key)
        for registered in (self._parent, self._tokens, self._digest, self._children, self._stamp):
            drop(registered, block)
        self._journal.put(self._counts, "evicted", self._counts["evicted"] + 1)
        self._unlink(block, "cached")
        self._link(block, _FREE, "free")

    def _unlink(self, block: int, kind: str) -> None:
        before, after = self._before[block], self._after[block]
        self._journal.put(self._after, before, after)
        self._journal.put(self._before, after, before)
        self._journal.drop(self._after, block)
        self._journal.drop(self._before, block)
        self._journal.put(self._counts, kind, self._counts[kind] - 1)

    def _link(self, block: int, before: int, kind: str) -> None:
        """Into a ring, behind `before` (which may be the ring's head)."""
        after = self._after[before]
        self._journal.put(self._after, before, block)
        self._journal.put(self._before, block, before)
        self._journal.put(self._after, block, after)
        self._journal.put(self._before, after, block)
        self._journal.put(self._counts, kind, self._counts[kind] + 1)

    def _chain(self, parent: int, tokens: tuple[int, ...]) -> bytes:
        before = self._root if parent == ROOT else self._digest[parent]
        return hashlib.sha256(before + array("q", tokens).tobytes()).digest()

    def _key(self, digest: bytes) -> int:
        return int.from_bytes(digest, "big") >> (DIGEST_BITS - self._hash_bits)

    def _ring(self, head: int) -> Iterator[int]:
        block = self._after[head]
        while block != head:
            assert self._before[self._after[block]] == block, "a ring is broken"
            yield block
            block = self._after[block]

    def check(self, held: dict[int, int]) -> None:
        """Recompute everything from scratch, in O(pool).

        Args:
            held: how often each block is held, counted by the caller.

        Raises:
            AssertionError: reference counts, the partition into free, cached and active blocks, the order of eviction,
                chains or the index are not what they should be.
        """
        free, cached = list(self._ring(_FREE)), list(self._ring(_CACHED))
        active = {block for block, refs in self._refs.items() if refs}
        assert self._refs == {block: held.get(block, 0) for block in range(1, self._blocks)}, "reference counts"
        assert held.keys() <= self._refs.keys(), "a block that is not in the pool, or the dummy, is held"
        assert len(free) + len(cached) + len(active) + 1 == self._blocks, "free + cached + active + 1 dummy == pool"
        assert {*free, *cached, *active} == set(range(1, self._blocks)), "a block is in two places, or in none"
        assert (len(free), len(cached)) == self.usage[:2], "counts"
        assert self._after.keys() == self._before.keys() == {*free, *cached, _FREE, _CACHED}, "rings"
        registered = self._tokens.keys()
        assert set(cached) <= registered, "a cached block without tokens"
        assert not set(free) & registered, "a free block can be found"
        for mapping in (self._parent, self._digest, self._children, self._stamp):
            assert mapping.keys() == registered, "registered in part"
        assert len(set(self._stamp.values())) == len(registered), "stamps are used once"
        children = dict.fromkeys(registered, 0)
        for block in registered:
            parent = self._parent[block]
            assert self._digest[block] == self._chain(parent, self._tokens[block]), "hash chain"
            if parent != ROOT:
                children[parent] += 1
                assert self._refs[parent] >= (self._refs[block] > 0), "a block is held without its parent"
        assert children == self._children, "children"
        place = {block: number for number, block in enumerate(cached)}
        for block in cached:
            parent = self._parent[block]
            assert parent not in place or place[block] < place[parent], "a parent would be evicted before its child"
        found = sorted(block for blocks in self._index.values() for block in blocks)
        assert found == sorted(registered), "index"
        assert len({(self._parent[b], self._tokens[b]) for b in registered}) == len(found), "one key, two blocks"
