"""Keys and values of the requests in flight, in blocks that requests with equal prefixes share.

Every operation is all or nothing. What a request may find here is only what was reported as computed (`complete`).
Not for deciding what need not be computed again (`prefix`), nor for attention itself.
"""
# L attention layers  T tokens  G kv heads  K head width

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from libs.flags.errors import UserError
from libs.model.inference.block_pool import DIGEST_BITS, DUMMY, ROOT, BlockPool, BlockUsage
from libs.model.inference.journal import Journal
from libs.model.inference.layout import KvLayout
from libs.model.inference.resources import CapacityError, NotCopyable


@dataclass
class _Request:
    """prompt: all of it, from the start. common: how many of its tokens may lie in blocks that are shared or offered;
    None: all there are, generated ones too. tokens: those whose keys and values exist (their kernels have completed).
    owned: per block, whether this request writes it; the others were found."""

    prompt: tuple[int, ...]
    common: int | None = None
    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    owned: list[bool] = field(default_factory=list)


class PagedKV(NotCopyable):
    """Blocks of keys and values, with reference counts, a hash chain over full blocks, and eviction of the cached.

    Attributes:
        nbytes: of both tensors.
    """

    def __init__(
        self,
        layout: KvLayout,
        *,
        model: str,
        blocks: int,
        device: torch.device | str = "cpu",
        share: bool = True,
        hash_bits: int = DIGEST_BITS,
    ) -> None:
        """Allocate, zero-initialised.

        Args:
            model: fingerprint; with dtype and block size it starts every hash chain.
            blocks: all of them, the dummy included. share: find and offer equal prefixes at all.
            hash_bits: kept of each hash. Results do not depend on it, for tokens are compared on every hit.

        Raises:
            UserError: fewer than 2 blocks, or hash_bits outside 1..256; before anything is allocated.
        """
        if blocks < 2 or not 1 <= hash_bits <= DIGEST_BITS:
            raise UserError(f"need blocks >= 2 (one is the dummy) and hash_bits in 1..256, got {blocks}, {hash_bits}")
        self.layout, self.blocks, self.share = layout, blocks, share
        shape = (len(layout.layers), blocks * layout.block_size, layout.kv_heads, layout.head_dim)
        self._k = torch.zeros(shape, dtype=layout.dtype, device=device)
        self._v = torch.zeros(shape, dtype=layout.dtype, device=device)
        self.nbytes = self._k.untyped_storage().nbytes() + self._v.untyped_storage().nbytes()
        assert self.nbytes == layout.nbytes(blocks), "the plan is not what was allocated"
        self._journal = Journal()
        name = json.dumps([model, str(layout.dtype), layout.block_size]).encode()
        self._pool = BlockPool(blocks, self._journal, name=name, hash_bits=hash_bits)
        self._requests: dict[int, _Request] = {}

    @property
    def device(self) -> torch.device:
        return self._k.device

    @property
    def usage(self) -> BlockUsage:
        return self._pool.usage

    @property
    def requests(self) -> tuple[int, ...]:
        """Requests that hold blocks, rising."""
        return tuple(sorted(self._requests))

    @property
    def evicted(self) -> int:
        """Registered blocks that had to make room so far."""
        return self._pool.evicted

    def match(self, prompt: Sequence[int]) -> tuple[int, ...]:
        """The registered blocks that hold the longest known prefix of whole blocks; changes nothing."""
        found: list[int] = []
        tokens = tuple(prompt)
        while (block := self._find(tokens, len(found), found[-1] if found else ROOT)) is not None:
            found.append(block)
        return tuple(found)

    def stamp(self, block: int) -> int | None:
        """A number that lasts as long as the block keeps its registered tokens; None when it has none."""
        return self._pool.stamp(block)

    def add(self, request: int, prompt: Sequence[int], *, upto: int | None = None, common: int | None = None) -> int:
        """Start a request: take blocks for its first `upto` tokens (by default the whole prompt); share all known.

        Args:
            common: blocks beyond so many tokens are neither shared nor offered. For a runner whose keys and values have
                the same bits in every request with the same prefix only up to there. None: no such limit.

        Returns:
            Tokens in blocks that are shared.

        Raises:
            CapacityError: too few blocks, with how many; nothing was changed. UserError: an empty prompt.
            ValueError: the request is already there.
        """
        if request in self._requests:
            raise ValueError(f"request {request} already holds blocks")
        if not prompt:
            raise UserError("the prompt is empty; give at least one token")
        tokens = tuple(prompt)
        goal = len(tokens) if upto is None else upto

        def work() -> int:
            self._journal.put(self._requests, request, _Request(tokens, common))
            return self._reserve(self._requests[request], goal)

        return self._journal.atomically(work)

    def reserve(self, request: int, total: int) -> int:
        """Take blocks for a request's first `total` tokens, beyond those it has; known ones are shared here too.

        Returns:
            Tokens in blocks that are newly shared.

        Raises:
            CapacityError: as `add`.
        """
        entry = self._entry(request)
        return self._journal.atomically(lambda: self._reserve(entry, total))

    def skip(self, request: int, tokens: int) -> None:
        """Take the keys and values of the first tokens of the prompt as computed. Whole shared blocks, at the start
        only, and never the whole prompt. Raises ValueError otherwise."""
        entry = self._entry(request)
        blocks, rest = divmod(tokens, self.layout.block_size)
        shared = blocks <= len(entry.blocks) and not any(entry.owned[:blocks])
        if entry.tokens or rest or tokens >= len(entry.prompt) or not shared:
            raise ValueError(f"request {request} cannot skip {tokens} tokens: they are not all in blocks it shares")
        self._journal.atomically(lambda: self._journal.replace_tail(entry.tokens, 0, entry.prompt[:tokens]))

    def complete(self, request: int, tokens: Sequence[int]) -> None:
        """The next tokens' keys and values are in their blocks: full blocks can be found from now on.

        Only tokens that stay: a rejected draft is never reported. Raises ValueError for tokens without a block, or
        other than the prompt's.
        """
        entry, new = self._entry(request), tuple(tokens)
        start = len(entry.tokens)
        expected = entry.prompt[start : start + len(new)]
        if new[: len(expected)] != expected:
            raise ValueError(f"request {request}: tokens {start}.. are not those of its prompt")
        if start + len(new) > len(entry.blocks) * self.layout.block_size:
            raise ValueError(f"request {request}: {start + len(new)} tokens in {len(entry.blocks)} blocks")

        def work() -> None:
            self._journal.replace_tail(entry.tokens, start, new)
            for i in range(start // self.layout.block_size, len(entry.tokens) // self.layout.block_size):
                self._register(entry, i)

        self._journal.atomically(work)

    def trim(self, request: int) -> int:
        """Let go of blocks that neither a completed nor a prompt token needs (those of rejected drafts); how many."""
        entry = self._entry(request)
        keep = self.layout.blocks_for(max(len(entry.tokens), len(entry.prompt)))
        spare = entry.blocks[keep:]

        def work() -> int:
            self._journal.replace_tail(entry.blocks, keep, ())
            self._journal.replace_tail(entry.owned, keep, ())
            for block in reversed(spare):
                self._pool.let_go(block)
            return len(spare)

        return self._journal.atomically(work)

    def release(self, request: int) -> None:
        """The request is over, or aborted: registered blocks stay cached. Raises ValueError for an unknown request, as
        after a first release."""
        entry = self._entry(request)

        def work() -> None:
            self._journal.drop(self._requests, request)
            for block in reversed(entry.blocks):
                self._pool.let_go(block)

        self._journal.atomically(work)

    def drop_cached(self) -> int:
        """Forget every prefix that no request holds; how many blocks that frees."""
        return self._journal.atomically(self._pool.drop_cached)

    def length(self, request: int) -> int:
        """Tokens completed."""
        return len(self._entry(request).tokens)

    def table(self, request: int) -> tuple[int, ...]:
        """Blocks to read from, in order of tokens."""
        return tuple(self._entry(request).blocks)

    def write_table(self, request: int) -> tuple[int, ...]:
        """Blocks to write to: the dummy in place of those that were found, so that what others read keeps its bits."""
        entry = self._entry(request)
        return tuple(block if own else DUMMY for block, own in zip(entry.blocks, entry.owned, strict=True))

    def write(self, layer: int, request: int, start: int, k_TGK: Tensor, v_TGK: Tensor) -> None:
        """Store keys and values of the tokens from `start` on in one attention block of the model.

        Raises:
            ValueError: tokens that are already complete or have no block, or another shape or dtype.
        """
        entry, index = self._entry(request), self._layer(layer)
        expected = (len(k_TGK), self.layout.kv_heads, self.layout.head_dim)
        for name, part in (("keys", k_TGK), ("values", v_TGK)):
            if part.shape != expected or part.dtype != self.layout.dtype:
                raise ValueError(f"{name} must be {expected} {self.layout.dtype}, got {tuple(part.shape)} {part.dtype}")
        end = start + len(k_TGK)
        if start < len(entry.tokens) or end > len(entry.blocks) * self.layout.block_size:
            raise ValueError(
                f"request {request}: tokens {start}..{end} are not all between the {len(entry.tokens)} that are "
                f"complete and the end of its {len(entry.blocks)} blocks"
            )
        places = self._places(self.write_table(request), start, end)
        self._k[index, places] = k_TGK
        self._v[index, places] = v_TGK

    def read(self, layer: int, request: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values (T, G, K) of a request's first `end` tokens, copied out of their blocks. Raises ValueError
        past its last block."""
        entry, index = self._readable(request, end), self._layer(layer)
        places = self._places(tuple(entry.blocks), 0, end)
        return self._k[index, places], self._v[index, places]

    def view(self, layer: int, request: int, end: int) -> tuple[Tensor, Tensor]:
        """As `read`, to be used before the next write: not a copy where the blocks lie one after the other."""
        entry, index = self._readable(request, end), self._layer(layer)
        size = self.layout.block_size
        used = entry.blocks[: self.layout.blocks_for(end)]
        starts = [0, *(i for i in range(1, len(used)) if used[i] != used[i - 1] + 1)]
        spans = [(used[i], j - i) for i, j in zip(starts, [*starts[1:], len(used)], strict=True) if used]

        def joined(of: Tensor) -> Tensor:
            runs = [of[index, first * size : (first + count) * size] for first, count in spans]
            return (runs[0] if len(runs) == 1 else torch.cat(runs) if runs else of[index, :0])[:end]

        return joined(self._k), joined(self._v)

    def _readable(self, request: int, end: int) -> _Request:
        entry = self._entry(request)
        if not 0 <= end <= len(entry.blocks) * self.layout.block_size:
            raise ValueError(f"request {request}: {end} tokens in {len(entry.blocks)} blocks")
        return entry

    def check(self) -> None:
        """All invariants, recomputed in O(pool). Raises AssertionError."""
        held = Counter(block for entry in self._requests.values() for block in entry.blocks)
        self._pool.check(dict(held))
        for entry in self._requests.values():
            size = self.layout.block_size
            parent: int | None = ROOT
            assert len(entry.blocks) == len(entry.owned), "owners"
            assert len(entry.tokens) <= len(entry.blocks) * size, "more tokens than blocks"
            text = (*entry.tokens, *entry.prompt[len(entry.tokens) :])
            for i, (block, own) in enumerate(zip(entry.blocks, entry.owned, strict=True)):
                tokens = text[i * size : (i + 1) * size]
                found = self._pool.find(parent, tokens) if parent is not None and len(tokens) == size else None
                registered = self._pool.stamp(block) is not None
                assert registered == (found == block), "registered under another key"
                assert own or registered, "a shared block that nobody can find"
                assert not (own and registered) or (i + 1) * size <= len(entry.tokens), "found before it was computed"
                parent = block if registered else None

    def _entry(self, request: int) -> _Request:
        if request not in self._requests:
            raise ValueError(f"request {request} holds no blocks: never added, or already released")
        return self._requests[request]

    def _layer(self, layer: int) -> int:
        if layer not in self.layout.layers:
            raise ValueError(f"block {layer} of the model is no attention block (those are {self.layout.layers})")
        return self.layout.layers.index(layer)

    def _find(self, prompt: tuple[int, ...], i: int, parent: int) -> int | None:
        """The registered block that holds the prompt's i-th block of tokens, if that is whole."""
        size = self.layout.block_size
        if not self.share or (i + 1) * size > len(prompt):
            return None
        return self._pool.find(parent, prompt[i * size : (i + 1) * size])

    def _reserve(self, entry: _Request, total: int) -> int:
        have, goal = len(entry.blocks), self.layout.blocks_for(total)
        shared: list[int] = []
        parent: int | None = entry.blocks[-1] if have else ROOT
        if have and self._pool.stamp(entry.blocks[-1]) is None:
            parent = None
        prompt = entry.prompt[: entry.common]
        # All that is known, also beyond the goal: it takes no memory, and a state may be kept there.
        while parent is not None:
            parent = self._find(prompt, have + len(shared), parent)
            if parent is not None:
                self._pool.share(parent)
                shared.append(parent)
        missing = max(0, goal - have - len(shared))
        available = self.usage.free + self.usage.cached
        if missing > available:
            raise CapacityError(f"KV blocks (of {self.blocks - 1})", needed=missing, available=available)
        fresh = [self._pool.take() for _ in range(missing)]
        self._journal.replace_tail(entry.blocks, have, [*shared, *fresh])
        self._journal.replace_tail(entry.owned, have, [False] * len(shared) + [True] * len(fresh))
        return len(shared) * self.layout.block_size

    def _register(self, entry: _Request, i: int) -> None:
        """Offer a full block, if its parent is on offer too: a chain never mixes blocks of different holders."""
        parent = entry.blocks[i - 1] if i else ROOT
        size = self.layout.block_size
        private = entry.common is not None and (i + 1) * size > entry.common
        if not self.share or private or not entry.owned[i] or (i and self._pool.stamp(parent) is None):
            return
        self._pool.register(entry.blocks[i], parent, tuple(entry.tokens[i * size : (i + 1) * size]))

    def _places(self, table: tuple[int, ...], start: int, end: int) -> Tensor:
        """(T,) rows of the tokens start..end in the tensors."""
        size = self.layout.block_size
        positions = torch.arange(start, end, device=self._k.device)
        blocks = torch.tensor(table, dtype=torch.int64, device=self._k.device)
        return blocks[positions // size] * size + positions % size
