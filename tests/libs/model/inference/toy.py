"""A toy model whose state is a rolling hash of all tokens seen, a small engine that runs it through the real managers,
and the oracle without any caching. One wrong, missing, repeated or foreign token changes every later output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from libs.model.inference import (
    KvLayout,
    PagedKV,
    PrefixCache,
    PrefixMode,
    PrefixReport,
    StateLayout,
    StatePart,
    StateSlots,
)
from libs.model.inference.runner import pieces

VOCAB = 3
MODULUS = (1 << 61) - 1
WINDOW = 4
MASK = (1 << 64) - 1
LAYOUT = StateLayout(
    (0, 3), (StatePart("hash", (1,), torch.int64), StatePart("count", (1,), torch.int64)), (3,),
    StatePart("conv", (1, WINDOW), torch.int64),
)  # fmt: skip
NO_STATE = StateLayout()
ATTENTION = 1


def kv_of(block_size: int = 16) -> KvLayout:
    return KvLayout((ATTENTION,), 1, 1, torch.int64, block_size)


def oracle(tokens: Sequence[int], *, recurrent: bool = True) -> int:
    """The token after `tokens`, computed from nothing but them."""
    first = second = count = attended = 0
    for position, token in enumerate(tokens):
        first = (first * 1_000_003 + token + 1) % MODULUS
        second = (second * 998_244_353 + first + token + 1) % MODULUS
        count += 1
        value = first if recurrent else token
        attended += (token * 31 + position + 1) * (position + 7) + 3 * value
    window = ([0] * WINDOW + list(tokens))[-WINDOW:]
    seen = sum((i + 2) * (token + 1) for i, token in enumerate(window))
    # Weighed, so that no part of the state is lost in the shift below.
    state = second + 1_700_021 * count + 100_003 * seen if recurrent else 0
    return (((attended + state) & MASK) >> 7) % VOCAB


def continued(prompt: Sequence[int], n: int, *, recurrent: bool = True) -> list[int]:
    """n greedy tokens."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(oracle(tokens, recurrent=recurrent))
    return tokens[len(prompt) :]


@dataclass
class Running:
    prompt: list[int]
    slot: int
    generated: list[int] = field(default_factory=list)
    checked: int = 0

    @property
    def text(self) -> list[int]:
        return self.prompt + self.generated


@dataclass(frozen=True)
class _State:
    first: int
    second: int
    counts: tuple[int, int]
    window: tuple[int, ...]


class Engine:
    """Runs requests one operation at a time; every output is the model's, through the managers."""

    def __init__(
        self,
        mode: PrefixMode,
        *,
        block_size: int = 16,
        blocks: int = 15,
        max_batch: int = 3,
        max_draft: int = 4,
        grid: int = 1,
        hash_bits: int = 256,
        max_snapshot_bytes: int = 1 << 20,
        layout: StateLayout = LAYOUT,
        slots_type: type[StateSlots] = StateSlots,
    ) -> None:
        self.slots = slots_type(layout, model="toy", max_batch=max_batch, max_draft=max_draft)
        self.kv = PagedKV(
            kv_of(block_size), model="toy", blocks=blocks, share=mode is not PrefixMode.OFF, hash_bits=hash_bits
        )
        self.cache = PrefixCache(self.kv, self.slots, mode, grid=grid, max_snapshot_bytes=max_snapshot_bytes)
        self.grid, self.recurrent, self.running, self._next = grid, bool(layout.layers), dict[int, Running](), 0

    def submit(self, prompt: Sequence[int], *, upto: int | None = None) -> int:
        request, self._next = self._next, self._next + 1
        admitted = self.cache.admit(request, prompt, upto=upto)
        self.running[request] = Running(list(prompt), admitted.slot)
        return request

    def prefill(self, request: int, budget: int = 1 << 30) -> bool:
        """One chunk of at most `budget` tokens (at least one step of the grid); whether the prompt is done."""
        run, done = self.running[request], self.kv.length(request)
        end = min(len(run.prompt), max((done + budget) // self.grid, done // self.grid + 1) * self.grid)
        self.cache.reserve(request, end)
        for start, stop in pieces(done, end, self.grid):
            tokens = run.prompt[start:stop]
            states = self._forward(request, tokens)
            if self.recurrent:
                self._store(run.slot, states[-1])
            self.cache.completed(request, tokens)
        if end == len(run.prompt):
            run.generated.append(self._output(request, end, states[-1]))
        return end == len(run.prompt)

    def decode(self, request: int, drafts: Sequence[int] = ()) -> int:
        """Run the last output and verify drafts after it; how many outputs that gave."""
        run, done = self.running[request], self.kv.length(request)
        tokens = [run.generated[-1], *drafts]
        self.cache.reserve(request, done + len(tokens))
        states = self._forward(request, tokens)
        outputs = [self._output(request, done + i + 1, state) for i, state in enumerate(states)]
        accepted = 1
        while accepted < len(tokens) and tokens[accepted] == outputs[accepted - 1]:
            accepted += 1
        if self.recurrent and drafts:
            views = self.slots.reshape_intermediate_states(1, len(tokens))
            for j, state in enumerate(states):
                views["hash"][:, 0, j, 0] = torch.tensor([state.first, state.second])
                views["count"][:, 0, j, 0] = torch.tensor(state.counts)
                views["conv"][0, 0, j, 0] = torch.tensor(state.window)
            self.slots.scatter_mtp_states([accepted], [run.slot])
        elif self.recurrent:
            self._store(run.slot, states[0])
        self.cache.completed(request, tokens[:accepted])
        self.cache.trim(request)
        run.generated.extend(outputs[:accepted])
        return accepted

    def finish(self, request: int) -> PrefixReport:
        del self.running[request]
        return self.cache.release(request)

    def generate(self, prompt: Sequence[int], n: int, *, budget: int = 1 << 30) -> tuple[list[int], PrefixReport]:
        request = self.submit(prompt, upto=min(budget, len(prompt)))
        while not self.prefill(request, budget):
            pass
        while len(self.running[request].generated) < n:
            self.decode(request)
        generated = self.running[request].generated[:n]
        return generated, self.finish(request)

    def check(self) -> None:
        """Every invariant, and every output that is new since the last check."""
        self.cache.check()
        for run in self.running.values():
            for token in run.generated[run.checked :]:
                new = continued(run.prompt + run.generated[: run.checked], 1, recurrent=self.recurrent)
                assert [token] == new, "an output differs from the oracle's"
                run.checked += 1

    def _load(self, slot: int) -> _State:
        (first, count), (second, other) = (self.slots.read_rows(layer, [slot]) for layer in LAYOUT.layers)
        conv = self.slots.get_conv_state(3)
        assert conv is not None
        window = tuple(int(token) for token in conv[slot, 0])
        return _State(int(first), int(second), (int(count), int(other)), window)

    def _store(self, slot: int, state: _State) -> None:
        for layer, value, count in zip(LAYOUT.layers, (state.first, state.second), state.counts, strict=True):
            self.slots.write_rows(layer, [slot], [torch.tensor([[value]]), torch.tensor([[count]])])
        conv = self.slots.get_conv_state(3)
        assert conv is not None
        conv[slot, 0] = torch.tensor(state.window)

    def _forward(self, request: int, tokens: Sequence[int]) -> list[_State]:
        """States after each token; keys and values are written, nothing is reported."""
        start = self.kv.length(request)
        state = self._load(self.running[request].slot) if self.recurrent else _State(0, 0, (0, 0), (0,) * WINDOW)
        states, values = [], []
        for token in tokens:
            first = (state.first * 1_000_003 + token + 1) % MODULUS
            second = (state.second * 998_244_353 + first + token + 1) % MODULUS
            counts = (state.counts[0] + 1, state.counts[1] + 1)
            state = _State(first, second, counts, (*state.window[1:], token))
            states.append(state)
            values.append(first if self.recurrent else token)
        keys = [token * 31 + start + i + 1 for i, token in enumerate(tokens)]
        k, v = (torch.tensor(part).view(-1, 1, 1) for part in (keys, values))
        self.kv.write(ATTENTION, request, start, k, v)
        return states

    def _output(self, request: int, end: int, state: _State) -> int:
        k, v = (part.view(-1) for part in self.kv.read(ATTENTION, request, end))
        attended = int((k * torch.arange(7, end + 7) + 3 * v).sum())
        # A window that is not full holds zeros, which the oracle's padding is too.
        window = sum((i + 2) * (token + 1) for i, token in enumerate(state.window))
        memory = state.second + 1_700_021 * state.counts[1] + 100_003 * window if self.recurrent else 0
        return (((attended + memory) & MASK) >> 7) % VOCAB
