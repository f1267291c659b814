"""One request: what was asked, how far it is, and the checks before it is queued.

Not for what runs when (`scheduler`) nor for running it (`engine`).
"""
# J tokens of a verification  V vocabulary

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from libs.flags.errors import UserError
from libs.model.inference.lanes import PagedLane
from libs.model.inference.sampler import Sampled, Sampling, sample


def token_ids(tokens: Sequence[int], what: str, vocab: int) -> tuple[int, ...]:
    """Plain integers. Raises UserError when there are none, or one that is no id: nothing is rounded or converted."""
    ids = tuple(_whole(token, what, vocab) for token in tokens)
    if not ids:
        raise UserError(f"the {what} is empty; give at least one token")
    wrong = next((token for token in ids if not 0 <= token < vocab), None)
    if wrong is not None:
        raise UserError(f"the {what} has token {wrong}; ids are 0 to {vocab - 1}")
    return ids


def _whole(token: object, what: str, vocab: int) -> int:
    try:
        if not isinstance(token, bool):
            return operator.index(token)  # type: ignore[arg-type]
    except TypeError:
        pass
    raise UserError(f"the {what} has {token!r}, which is no whole number; ids are 0 to {vocab - 1}")


@dataclass(eq=False)
class Request:
    """number: its name. sampling: None for a request that only scores its prompt. context: tokens of the prompt behind
    which the first output is wanted. continuation: what is scored; its last token is not run. row: of the batch."""

    number: int
    prompt: tuple[int, ...]
    context: int
    sampling: Sampling | None = None
    continuation: tuple[int, ...] = ()
    lane: PagedLane | None = None
    row: int = -1
    skipped: int = 0
    generated: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    greedy: bool = True

    @classmethod
    def to_generate(cls, prompt: Sequence[int], sampling: Sampling, *, vocab: int, max_tokens: int) -> Request:
        """Raises UserError for an empty prompt, a token that is none, or more than max_tokens."""
        tokens = token_ids(prompt, "prompt", vocab)
        if sampling.stop_ids:
            token_ids(sampling.stop_ids, "list of stop_ids", vocab)
        longest = len(tokens) + sampling.max_new_tokens
        if longest > max_tokens:
            raise UserError(
                f"{len(tokens)} prompt tokens and max_new_tokens={sampling.max_new_tokens} need {longest} tokens, "
                f"available are max_tokens={max_tokens}; shorten the prompt or ask for fewer"
            )
        return cls(-1, tokens, len(tokens), sampling)

    @classmethod
    def to_score(cls, context: Sequence[int], continuation: Sequence[int], *, vocab: int, max_tokens: int) -> Request:
        """Raises UserError as `to_generate`, for an empty continuation too."""
        before, after = token_ids(context, "context", vocab), token_ids(continuation, "continuation", vocab)
        longest = len(before) + len(after) - 1
        if longest > max_tokens:
            raise UserError(
                f"{len(before)} context and {len(after)} continuation tokens need {longest} tokens, available are "
                f"max_tokens={max_tokens}"
            )
        return cls(-1, before + after[:-1], len(before), continuation=after)

    @property
    def title(self) -> str:
        """For errors."""
        return f"request {self.number}"

    @property
    def needed_tokens(self) -> int:
        """Tokens whose keys and values it may come to hold: the last one generated is read and never run."""
        return len(self.prompt) + (0 if self.sampling is None else self.sampling.max_new_tokens - 1)


def verified(request: Request, tokens: Sequence[int], logits_JV: Tensor) -> list[Sampled]:
    """Outputs behind the tokens, as far as each token after the first is the output before it, and not past the end.

    What is drawn depends on the seed and the place alone, so a draft stays exactly when plain decode would give it.
    """
    sampling, found = request.sampling, list[Sampled]()
    assert sampling is not None, "a request that generates"
    for j, logits_V in enumerate(logits_JV):
        if j and (tokens[j] != found[-1].token or found[-1].token in sampling.stop_ids):
            break
        found.append(sample(logits_V, sampling, len(request.generated) + j, request.title))
    return found
