"""The measuring process of `fathom bench decode`: models, filled memory, contenders, samples.

Runs in a process whose gates are installed. Not for what is concluded (decode.py).
"""
# T tokens of context  S tokens of a phrase

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from apps.eval.bench.interleave import Contender, interleave
from libs.model import HybridLM, ModelConfig, dense_twin, preset
from libs.model.inference import (
    Engine,
    EngineConfig,
    PagedKV,
    Rollback,
    Sampling,
    StateSlots,
    kv_layout,
    state_layout,
)
from libs.model.inference.lanes import PagedLane
from libs.model.inference.row_tile import choose_row_tile
from libs.model.inference.runner import Runner, Step, grid_tokens, pieces

PHRASES, PHRASE_TOKENS = 24, 8
TRAIN_ROWS, TRAIN_TOKENS = 4, 96
# Output tokens of one sample: a single one takes milliseconds, which a busy machine blurs.
STEPS = 8


class DecodePlan(NamedTuple):
    """contexts: tokens before the timed one. new_tokens, requests: of a timed generation with and without drafts."""

    preset: str
    contexts: tuple[int, ...]
    rounds: int
    prefill_tokens: int
    speculation_preset: str
    train_steps: int
    draft_length: int
    requests: int
    new_tokens: int
    block_size: int
    threads: int
    seed: int


class Measured(NamedTuple):
    """Samples in seconds by contender; `differing`: numbers with drafts that are not those without, by rollback."""

    samples: dict[str, list[float]]
    what: dict[str, str]
    kv_bytes: dict[tuple[str, int], int]
    state_bytes: dict[str, int]
    tile: int
    drafts: dict[str, tuple[int, int]]
    differing: dict[str, int]
    rollback_bytes: dict[str, float]


class Filled:
    """One model with one request whose context is there without having been computed."""

    def __init__(self, model: HybridLM, tokens: int, block_size: int, runner: Runner, seed: int) -> None:
        self.runner, self.tokens = runner, tokens
        kv, states = kv_layout(model.config, torch.float32, block_size), state_layout(model.config, torch.float32)
        self.kv = PagedKV(kv, model="bench", blocks=kv.blocks_for(tokens + 1) + 1, share=False)
        self.slots = StateSlots(states, model="bench", max_batch=1)
        source, prompt = torch.Generator().manual_seed(seed), [0] * tokens
        self.lane = PagedLane(self.kv, self.slots, 0, self.slots.alloc())
        self.kv.add(0, prompt, upto=tokens + 1)
        for layer in kv.layers:
            k, v = (torch.randn(tokens, kv.kv_heads, kv.head_dim, generator=source) for _ in range(2))
            self.kv.write(layer, 0, 0, k, v)
        self.kv.complete(0, prompt)
        for layer in states.layers:
            parts = [torch.rand(1, *part.shape, generator=source) for part in states.recurrent]
            self.slots.write_rows(layer, [self.lane.slot], parts)

    def steps(self) -> None:
        """STEPS output tokens; the request is not moved, so that all are of the same context."""
        for _ in range(STEPS):
            self.runner.decode([Step(self.lane, (1,), self.tokens)])

    @property
    def kv_bytes(self) -> int:
        """Of the blocks of this many tokens."""
        return self.kv.layout.nbytes(self.kv.layout.blocks_for(self.tokens))


def measure(plan: DecodePlan) -> Measured:
    """Everything, interleaved: a slow phase of the machine falls on all contenders."""
    hybrid = preset(plan.preset)
    models = {"hybrid": HybridLM(hybrid), "twin": HybridLM(dense_twin(hybrid))}
    contenders, what = list[Contender](), dict[str, str]()
    kv_bytes, state_bytes = dict[tuple[str, int], int](), dict[str, int]()

    def add(name: str, run: Callable[[], object], meaning: str) -> None:
        contenders.append(Contender(name, run, plan.rounds, True))
        what[name] = meaning

    for name, model in models.items():
        model.eval()
        runner = Runner(model, int(choose_row_tile(model).value))
        for tokens in plan.contexts:
            filled = Filled(model, tokens, plan.block_size, runner, plan.seed)
            add(f"{name}_T{tokens}", filled.steps, f"{STEPS} output tokens after {tokens}")
            kv_bytes[name, tokens] = filled.kv_bytes
        state_bytes[name] = state_layout(model.config, torch.float32).nbytes(1)
        add(f"prefill_{name}", _prefill(model, runner, plan), f"prompt of {plan.prefill_tokens} tokens")
    drafting = Drafting(plan)
    for label, run in drafting.runs().items():
        add(label, run, f"{plan.requests} requests of {plan.new_tokens} new tokens, together")
    samples = interleave(contenders, seed=plan.seed, on_sample=lambda name, seconds: None)
    return Measured(
        samples, what, kv_bytes, state_bytes, runner.tile, drafting.drafts(), drafting.differing(), drafting.bytes()
    )


def _prefill(model: HybridLM, runner: Runner, plan: DecodePlan) -> Callable[[], None]:
    """A whole prompt from an empty memory, in pieces of the grid."""
    prompt = torch.randint(
        model.config.vocab_size, (plan.prefill_tokens,), generator=torch.Generator().manual_seed(plan.seed)
    ).tolist()
    kv = kv_layout(model.config, torch.float32, plan.block_size)
    cache = PagedKV(kv, model="bench", blocks=kv.blocks_for(len(prompt)) + 1, share=False)
    slots = StateSlots(state_layout(model.config, torch.float32), model="bench", max_batch=1)
    lane = PagedLane(cache, slots, 0, slots.alloc())
    cache.add(0, prompt)

    def run() -> None:
        slots.clear_states()
        for start, end in pieces(0, len(prompt), grid_tokens(model.config)):
            runner.prefill(lane, prompt[start:end], start)

    return run


class Drafting:
    """A small model with one MTP depth, trained on random phrases, and engines with and without drafts over it."""

    def __init__(self, plan: DecodePlan) -> None:
        self._plan, self._source = plan, torch.Generator().manual_seed(plan.seed)
        config = preset(plan.speculation_preset)
        trunk = config.pattern.split("/")[0]
        self._model = HybridLM(ModelConfig.parse({**config.model_dump(), "pattern": f"{trunk}/*-"}))
        shape = (PHRASES, PHRASE_TOKENS)
        self._phrases = torch.randint(config.vocab_size, shape, generator=self._source)
        self._train()
        self._prompts = [self._text(1, 32)[0].tolist() for _ in range(plan.requests)]
        limits = {"max_batch": plan.requests, "max_tokens": 32 + plan.new_tokens, "block_size": plan.block_size}
        self._engines = {"plain": Engine(self._model, EngineConfig(**limits))}
        for how in Rollback:
            drafts = {"draft_length": plan.draft_length, "rollback": how}
            self._engines[how.value] = Engine(self._model, EngineConfig(**limits, **drafts))
        self._found: dict[str, object] = {}

    def _text(self, rows: int, tokens: int) -> torch.Tensor:
        picks = torch.randint(PHRASES, (rows, -(-tokens // PHRASE_TOKENS)), generator=self._source)
        return self._phrases[picks].flatten(1)[:, :tokens]

    def _train(self) -> None:
        optimizer = torch.optim.AdamW(self._model.parameters(), lr=3e-3)
        for _ in range(self._plan.train_steps):
            text = self._text(TRAIN_ROWS, TRAIN_TOKENS + 1)
            optimizer.zero_grad()
            torch.autograd.backward(self._model.loss(text[:, :-1], text[:, 1:]).loss)
            optimizer.step()
        self._model.eval()

    def runs(self) -> dict[str, Callable[[], None]]:
        """One generation each, by name."""

        def run(name: str) -> None:
            how = Sampling(max_new_tokens=self._plan.new_tokens)
            found = self._engines[name].generate(self._prompts, how)
            self._found[name] = [(one.tokens, one.logprobs) for one in found]

        return {name: lambda name=name: run(name) for name in self._engines}  # type: ignore[misc]

    def drafts(self) -> dict[str, tuple[int, int]]:
        """Drafted and accepted, by way of rollback, summed over all samples."""
        return {
            how.value: (self._engines[how.value].counters["drafted"], self._engines[how.value].counters["accepted"])
            for how in Rollback
        }

    def differing(self) -> dict[str, int]:
        """0 or 1 each: whether anything is other than with plain decode."""
        return {how.value: int(self._found[how.value] != self._found["plain"]) for how in Rollback}

    def bytes(self) -> dict[str, float]:
        """Held to go back, per draft token and layer with a state."""
        draft, layers = self._plan.draft_length + 1, state_layout(self._model.config, torch.float32)
        found = {}
        for how in Rollback:
            slots = StateSlots(layers, model="bench", max_batch=1, max_draft=draft)
            runner = Runner(self._model, 1, slots if how is Rollback.SNAPSHOT else None)
            kv = kv_layout(self._model.config, torch.float32, self._plan.block_size)
            cache = PagedKV(kv, model="bench", blocks=3, share=False)
            cache.add(0, [0], upto=draft)
            lane = PagedLane(cache, slots, 0, slots.alloc())
            pending = runner.decode([Step(lane, tuple(range(draft)), 0)]).pending
            found[how.value] = pending.nbytes / draft / layers.num_layers
        return found
