"""A small real hybrid driven through slots and blocks: by bits what plain decode gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from libs.kernels.mimo import MimoState
from libs.model import HybridLM
from libs.model.attention import KvState
from libs.model.hybrid import LMState
from libs.model.inference import (
    PagedKV,
    PrefixCache,
    PrefixMode,
    StateSlots,
    kv_layout,
    model_fingerprint,
    state_layout,
    weights_digest,
)
from libs.model.pattern import LayerKind

PATTERN = "M-*M-*"
B = 16
PROMPT = 2 * B + 9


def tokens(n: int, seed: int) -> list[int]:
    return [int(t) for t in torch.randint(0, 64, (n,), generator=torch.Generator().manual_seed(seed))]


class Decoder:
    """One token at a time through the managers; no scheduler and no batching, so that nothing else can be at fault."""

    def __init__(self, model: HybridLM, mode: PrefixMode, slots_type: type[StateSlots] = StateSlots) -> None:
        name = model_fingerprint(model.config, weights_digest(model))
        self.model = model
        self.slots = slots_type(state_layout(model.config, torch.float32), model=name, max_batch=3)
        layout = kv_layout(model.config, torch.float32, B)
        self.kv = PagedKV(layout, model=name, blocks=20, share=mode is not PrefixMode.OFF)
        self.cache = PrefixCache(self.kv, self.slots, mode, grid=1)
        self.slot_of: dict[int, int] = {}

    def admit(self, request: int, prompt: list[int]) -> int:
        admitted = self.cache.admit(request, prompt)
        self.slot_of[request] = admitted.slot
        return admitted.start

    def step(self, request: int, token: int) -> Tensor:
        """Logits (V,) after one more token."""
        slot, done = self.slot_of[request], self.kv.length(request)
        self.cache.reserve(request, done + 1)
        before = []
        for block, kind in enumerate(self.model.config.layers.trunk):
            if kind is LayerKind.MAMBA:
                before.append(MimoState(*self.slots.read_rows(block, [slot])))
            elif kind is LayerKind.ATTENTION:
                before.append(KvState(*(part[None] for part in self.kv.read(block, request, done))))
            else:
                before.append(None)
        logits, after = self.model.step(torch.tensor([token]), LMState(tuple(before), done))
        for block, state in enumerate(after.layers):
            if isinstance(state, MimoState):
                self.slots.write_rows(block, [slot], state)
            elif isinstance(state, KvState):
                self.kv.write(block, request, done, state.k[0, done:], state.v[0, done:])
        self.cache.completed(request, [token])
        return logits[0]

    def run(self, request: int, text: list[int], prompt: int) -> dict[int, Tensor]:
        """Logits by token count, from wherever the cache let it start."""
        start = self.admit(request, text[:prompt])
        return {i + 1: self.step(request, text[i]) for i in range(start, len(text))}


def plain(model: HybridLM, text: list[int]) -> dict[int, Tensor]:
    """The same by `HybridLM.step`, from an empty state and without any manager."""
    mixer, attention = model.config.mixer, model.config.attention
    assert mixer is not None
    assert attention is not None
    empty = torch.zeros(1, 0, attention.kv_heads, attention.head_dim)
    zero = MimoState.zeros(
        1, mixer.nheads, mixer.headdim, mixer.d_state, mixer.mimo_rank, mixer.angles, "cpu", torch.float32
    )
    of = {LayerKind.MAMBA: zero, LayerKind.ATTENTION: KvState(empty, empty), LayerKind.MLP: None}
    state = LMState(tuple(of[kind] for kind in model.config.layers.trunk), 0)
    found = {}
    for i, token in enumerate(text):
        logits, state = model.step(torch.tensor([token]), state)
        found[i + 1] = logits[0]
    return found


@pytest.mark.parametrize("mode", list(PrefixMode))
def test_decode_through_the_managers_is_plain_decode(build: Callable[..., HybridLM], mode: PrefixMode) -> None:
    model = build(PATTERN)
    text, reference = tokens(PROMPT + 8, 1), {}
    reference = plain(model, text)
    decoder = Decoder(model, mode)
    for request in range(3):
        found = decoder.run(request, text, PROMPT)
        assert min(found) == (2 * B + 1 if mode is PrefixMode.SNAPSHOTS and request else 1)
        for count, logits in found.items():
            assert torch.equal(logits, reference[count]), (request, count)
        decoder.cache.check()
    # Reused slots and blocks, another text: as in a fresh process.
    for request in range(3):
        decoder.cache.release(request)
    other = tokens(PROMPT + 3, 2)
    reference = plain(model, other)
    for count, logits in decoder.run(7, other, PROMPT).items():
        assert torch.equal(logits, reference[count])


def test_inactive_and_neighbouring_slots_keep_their_bits(build: Callable[..., HybridLM]) -> None:
    decoder = Decoder(build(PATTERN), PrefixMode.OFF)
    for request in range(3):
        decoder.admit(request, tokens(PROMPT, request))
        for token in tokens(5, request):
            decoder.step(request, token)
    before = {name: tensor.clone() for name, tensor in decoder.slots._states.items()}
    decoder.step(1, tokens(PROMPT, 1)[5])
    for name, tensor in decoder.slots._states.items():
        assert torch.equal(tensor[:, [0, 2]], before[name][:, [0, 2]])
        assert not torch.equal(tensor[:, 1], before[name][:, 1])


def test_a_prefilled_state_fits_the_slots(build: Callable[..., HybridLM]) -> None:
    """What `prefill` hands over is what the layout says, in a bf16 model too: nothing is rounded on the way in."""
    for dtype in (torch.float32, torch.bfloat16):
        model = build(PATTERN, dtype=dtype)
        _, state = model.prefill(torch.tensor([tokens(PROMPT, 3)]))
        slots = StateSlots(state_layout(model.config, dtype), model="m", max_batch=2)
        slots.alloc()
        for block in slots.layout.layers:
            given = state.layers[block]
            assert isinstance(given, MimoState)
            slots.write_rows(block, [0], given)
            for part, kept in zip(given, slots.read_rows(block, [0]), strict=True):
                assert torch.equal(part, kept)
