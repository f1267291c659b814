"""Questions to the engine: several choices or a free answer after a context that other questions may share.

Here is how they are asked, counted, and asked again without the cache. Not for making them (each suite's own
generator) nor for judging answers (scoring.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from apps.eval.results import PrefixUse
from apps.eval.suites.suite import Engines, Respondent
from libs.model.inference.engine import Sampling
from libs.model.text.shards import seeded_permutation

VERIFIED = 3  # questions asked again without the cache
_TOGETHER = 16  # questions without a shared context that are handed over together
OFF = "off"
SNAPSHOTS = "snapshots"
_COUNTED = ("prompt_tokens", "matched_tokens", "skipped_tokens", "computed_tokens")


class CacheDiffers(RuntimeError):
    """The prefix cache changed an answer: a fault of the engine, and no result is written."""


class Question(NamedTuple):
    """One question. All ids are int32 arrays.

    item: its name, unique in the suite. shared: context that further questions may begin with, or empty.
    prompt: what follows it; not empty. choices: continuations to be scored. new_tokens: greedy tokens to be generated,
    0 for none. stop_ids: tokens that end the answer.
    """

    item: str
    shared: NDArray[np.int32]
    prompt: NDArray[np.int32]
    choices: tuple[NDArray[np.int32], ...] = ()
    new_tokens: int = 0
    stop_ids: tuple[int, ...] = ()

    @property
    def context(self) -> list[int]:
        """Everything before the answer."""
        whole: list[int] = np.concatenate([self.shared, self.prompt]).tolist()
        return whole

    @property
    def longest(self) -> int:
        """Tokens of the question with its longest answer."""
        answer = max([self.new_tokens, *(choice.size for choice in self.choices)])
        return int(self.shared.size + self.prompt.size + answer)


class Reply(NamedTuple):
    """logprobs: per choice, one natural logarithm per token. tokens: what was generated, stop token included."""

    logprobs: tuple[tuple[float, ...], ...]
    tokens: tuple[int, ...]

    @property
    def sums(self) -> list[float]:
        """log-likelihood of each choice, in nats."""
        return [float(np.sum(row)) for row in self.logprobs]


class Replies(NamedTuple):
    """by_item: the reply to each question, by its name."""

    by_item: dict[str, Reply]
    use: PrefixUse


def ask_all(
    engines: Engines, questions: Sequence[Question], *, seed: int, on_progress: Callable[[int, int], None]
) -> Replies:
    """Ask every question. Questions with one shared context are asked together, so that a cache can help.

    With the mode snapshots the state after a shared context is kept on purpose (`checkpoint`), and a seeded sample is
    asked again of engines that know no prefix.

    Raises:
        CacheDiffers: an answer of the sample has other bits.
    """
    assert len({question.item for question in questions}) == len(questions), "names of items repeat"
    if not questions:
        return Replies(
            {}, PrefixUse(mode=engines.mode, verified=0, note="nothing was asked", **dict.fromkeys(_COUNTED, 0))
        )
    groups: dict[bytes, list[Question]] = {}
    for number, question in enumerate(questions):
        slab = f"alone {number // _TOGETHER}".encode()  # bounds what is held at once
        groups.setdefault(question.shared.tobytes() or slab, []).append(question)
    longest = max(question.longest for question in questions)
    engine = engines.open(longest)
    replies: dict[str, Reply] = {}
    try:
        for number, group in enumerate(groups.values()):
            if engines.mode == SNAPSHOTS and group[0].shared.size:
                engine.checkpoint(f"context {number}", group[0].shared.tolist())
            replies |= _ask(engine, group)
            on_progress(len(replies), len(questions))
        counted = {name: int(engine.counters[name]) for name in _COUNTED}
    finally:
        engine.close()
    verified, note = 0, "the cache was off: every token of every prompt was computed"
    if engines.mode != OFF:
        sample = [questions[i] for i in seeded_permutation(len(questions), seed)[:VERIFIED]]
        for question in sample:
            _refuse_difference(question, replies[question.item], _ask_cold(engines, question))
        verified, note = len(sample), "a seeded sample, asked again of engines that knew no prefix, had the same bits"
    return Replies(replies, PrefixUse(mode=engines.mode, verified=verified, note=note, **counted))


def _ask(engine: Respondent, group: Sequence[Question]) -> dict[str, Reply]:
    """Choices first, then what is generated; the order of requests changes no answer."""
    pairs = [(question.context, choice.tolist()) for question in group for choice in question.choices]
    scored = iter(engine.score(pairs) if pairs else [])
    spoken = [question for question in group if question.new_tokens]
    sampling = [Sampling(max_new_tokens=q.new_tokens, stop_ids=q.stop_ids) for q in spoken]
    completions = engine.generate([q.context for q in spoken], sampling) if spoken else []
    tokens = {q.item: c.tokens for q, c in zip(spoken, completions, strict=True)}
    return {
        question.item: Reply(
            tuple(tuple(next(scored).logprobs) for _ in question.choices), tuple(tokens.get(question.item, ()))
        )
        for question in group
    }


def _ask_cold(engines: Engines, question: Question) -> Reply:
    """The reply when every single request begins with an engine that knows nothing."""
    rows: list[tuple[float, ...]] = []
    parts = [question._replace(choices=(choice,), new_tokens=0) for choice in question.choices]
    parts += [question._replace(choices=())] if question.new_tokens else []
    tokens: tuple[int, ...] = ()
    for part in parts:
        engine = engines.open(question.longest)
        try:
            reply = _ask(engine, [part])[part.item]
        finally:
            engine.close()
        rows += reply.logprobs
        tokens = reply.tokens or tokens
    return Reply(tuple(rows), tokens)


def _refuse_difference(question: Question, cached: Reply, cold: Reply) -> None:
    if cached != cold:
        raise CacheDiffers(
            f"{question.item}: with the prefix cache {cached.sums} and tokens {cached.tokens}, without it {cold.sums} "
            f"and {cold.tokens}. No result is written; unset FATHOM_PREFIX_CACHE and report this"
        )


def hash_questions(questions: Iterable[Question]) -> str:
    """sha256 over names, contexts and choices of the questions, in the order of their names."""
    digest = hashlib.sha256()
    for question in sorted(questions, key=lambda q: q.item):
        parts = [question.shared, question.prompt, *question.choices]
        digest.update(f"{question.item} {[int(part.size) for part in parts]} {question.new_tokens}\n".encode())
        for part in parts:
            digest.update(part.astype("<i4").tobytes())
    return digest.hexdigest()
