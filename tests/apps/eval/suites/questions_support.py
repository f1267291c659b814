"""A small corpus through the real pipeline, and engines: a uniform one, and the real one over a small model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from apps.eval.suites.suite import Engines, SuiteInput, SuiteOptions
from libs.model import HybridLM, ModelConfig, preset
from libs.model.inference import Completion, Engine, EngineConfig, FinishReason, PrefixReport, Sampling, Scored
from libs.model.text.shards import DataDir, seeded_permutation

OPTIONS = SuiteOptions(
    contexts=None, span_tokens=64, ablation_documents=32, max_tokens=65_536, batch_documents=1, items=None, seed=0,
    strict_contexts=True,
)  # fmt: skip
REPORT = PrefixReport(0, 0, 0, None)


class UniformEngine:
    """Every token is as likely as any other, and the greedy one is `speaks`: a model that knows nothing."""

    def __init__(self, vocab_size: int, speaks: int = 40) -> None:
        self._logprob, self._speaks = -math.log(vocab_size), speaks
        self.requests: list[tuple[int, ...]] = []

    @property
    def counters(self) -> Mapping[str, int]:
        names = ("prompt_tokens", "matched_tokens", "skipped_tokens", "computed_tokens")
        return dict.fromkeys(names, sum(map(len, self.requests)))

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sequence[Sampling]) -> list[Completion]:
        self.requests += [tuple(prompt) for prompt in prompts]
        return [
            Completion(len(p), (self._speaks,) * s.max_new_tokens, (self._logprob,) * s.max_new_tokens,
                       FinishReason.LENGTH, REPORT)
            for p, s in zip(prompts, sampling, strict=True)
        ]  # fmt: skip

    def score(self, items: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Scored]:
        self.requests += [tuple(context) for context, _ in items]
        return [Scored((self._logprob,) * len(answer), False, REPORT) for _, answer in items]

    def checkpoint(self, name: str, prompt: Sequence[int]) -> None:
        raise AssertionError("only with snapshots")

    def close(self) -> None:
        pass


def uniform(data: DataDir) -> Engines:
    return Engines(lambda _: UniformEngine(data.tokenizer.vocab_size), "off")


def small_model(vocab_size: int, seed: int = 3) -> HybridLM:
    model = HybridLM(ModelConfig.parse({**preset("cpu_tiny").model_dump(), "vocab_size": vocab_size}))
    model.reset_parameters(seed)
    with torch.no_grad():  # far from the flat start, so that wrong targets would show
        model.embedding.weight.mul_(20)
    return model.eval()


def real_engines(model: HybridLM, *, max_batch: int = 8, mode: str = "off") -> Engines:
    return Engines(lambda most: Engine(model, EngineConfig(max_batch=max_batch, max_tokens=most), weights="w"), mode)


def inputs_of(path: Path, engines: Engines | None = None) -> SuiteInput:
    data = DataDir.open(path)
    documents = data.documents("valid")
    drawn = seeded_permutation(len(documents), 0).tolist()
    model = small_model(data.tokenizer.vocab_size)
    return SuiteInput(model, engines or uniform(data), data.tokenizer, documents, data.metadata("valid"), drawn, 128)
