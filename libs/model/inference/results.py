"""What the engine hands out: tokens as they come, completions and scores."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from libs.model.inference.prefix import PrefixReport

# The counters of an engine that has done nothing; reasons of misses and snapshots are added as they occur.
NO_COUNTS = dict.fromkeys(
    (
        *("requests", "prompt_tokens", "matched_tokens", "skipped_tokens", "computed_tokens", "generated_tokens"),
        *("drafted", "accepted", "steps", "peak_blocks", "block_steps"),
    ),
    0,
)


class FinishReason(StrEnum):
    """LENGTH: max_new_tokens. STOP: one of stop_ids."""

    LENGTH = "length"
    STOP = "stop"
    ABORTED = "aborted"


class Generated(NamedTuple):
    """One token of a request, as soon as there is one; logprob: natural, before temperature."""

    request: int
    token: int
    logprob: float
    finished: FinishReason | None


class Completion(NamedTuple):
    """A request's result; logprobs: natural, of each token in the distribution before temperature."""

    prompt_tokens: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: FinishReason
    report: PrefixReport


class Scored(NamedTuple):
    """logprobs: natural, one per continuation token. greedy: each of them is the most likely one."""

    logprobs: tuple[float, ...]
    greedy: bool
    report: PrefixReport
