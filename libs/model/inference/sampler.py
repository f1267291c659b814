"""From logits to a token: greedy, or temperature, top-k and top-p, drawn from the request's seed and the token's place.

A draw depends on nothing else, so a request gives the same tokens alone, in any batch, and behind verified drafts.
"""
# V vocabulary

from __future__ import annotations

import hashlib
import math
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from torch import Tensor

from libs.flags.errors import UserError
from libs.model.inference.resources import EngineStopped

# Below it only ties are drawn: fp32 logits of size 8 that are neighbours differ by as much. And far above where the
# quotient of an fp32 logit by it leaves the range of fp64.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 100.0


class LogitsNotFinite(EngineStopped):
    """A nan or an infinity among the logits that an output or a score would come from; nothing here masks with -inf.
    Weights and precision are everybody's, and kept states may hold more of it, so the engine does nothing more."""


class Sampling(BaseModel):
    """How one request's tokens are chosen, and when it ends.

    temperature: 0 is greedy, others are MIN_TEMPERATURE and above. top_k: of the k most likely; 0: of all. top_p: of
    the fewest that together have at least that probability. seed: of the draws. stop_ids: generation ends with one of
    them, which is part of the result.

    Raises:
        UserError: a value out of its range, with the field's name and the range (from `parse` and the constructor).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int = 16
    stop_ids: tuple[int, ...] = ()

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError(explain("sampling", error)) from error

    @field_validator("temperature")
    @classmethod
    def _temperature(cls, value: float) -> float:
        if value == 0:
            return value
        return _within("temperature", value, MIN_TEMPERATURE, MAX_TEMPERATURE, ", and 0 is greedy")

    @field_validator("top_p")
    @classmethod
    def _top_p(cls, value: float) -> float:
        if value == 0:
            raise UserError("top_p=0.0 leaves no token; allowed are values above 0, up to 1")
        return _within("top_p", value, 0.0, 1.0)

    @field_validator("top_k", "seed")
    @classmethod
    def _not_negative(cls, value: int) -> int:
        if value < 0:
            raise UserError(f"got {value}; allowed are 0 and above")
        return value

    @field_validator("max_new_tokens")
    @classmethod
    def _at_least_one(cls, value: int) -> int:
        if value < 1:
            raise UserError(f"got {value}; allowed are 1 and above")
        return value


class Sampled(NamedTuple):
    """logprob: natural logarithm, of the distribution before temperature, top-k and top-p."""

    token: int
    logprob: float


def explain(what: str, error: ValidationError) -> str:
    """Every problem on a line: the field, what is wrong, and the value given."""
    lines = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"]) or what
        lines.append(f"{where}: {item['msg'].removeprefix('Value error, ')} (got {item['input']!r})")
    return f"{what}:\n  " + "\n  ".join(lines)


def sample(logits_V: Tensor, sampling: Sampling, place: int, of: str = "a request") -> Sampled:
    """The token after these logits (of any dtype, on any device). place: how many tokens were generated before it.

    of: whose token it is, for the error. Raises LogitsNotFinite.
    """
    scores_V = _finite(logits_V[None], place, of)[0]
    logprobs_V = scores_V.log_softmax(0)
    token = _greedy(scores_V) if sampling.temperature == 0 else _draw(scores_V, sampling, place)
    return Sampled(token, float(logprobs_V[token]))


def logprobs_of(
    logits_SV: Tensor, tokens: list[int], place: int = 0, of: str = "a request"
) -> tuple[list[float], list[bool]]:
    """Of each row's token: natural log-probability, and whether it is the greedy choice.

    place: of the first row's token among those that are scored. of: as in `sample`. Raises LogitsNotFinite.
    """
    scores_SV = _finite(logits_SV, place, of)
    found_SV = scores_SV.log_softmax(1)
    logprobs = [float(found_SV[row, token]) for row, token in enumerate(tokens)]
    return logprobs, [_greedy(scores_SV[row]) == token for row, token in enumerate(tokens)]


def uniform(seed: int, place: int) -> float:
    """In [0, 1), 53 bits: a hash, so that it is the same on every device and in every version of torch."""
    digest = hashlib.sha256(f"{seed} {place}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) * 2.0**-53


def _finite(logits_SV: Tensor, place: int, of: str) -> Tensor:
    """In fp64 on the CPU; the first row is that of the output or the scored token number `place`."""
    scores_SV = logits_SV.detach().cpu().double()
    wrong_S = (~scores_SV.isfinite()).sum(1)
    if bool(wrong_S.any()):
        row = int(wrong_S.nonzero()[0])
        raise LogitsNotFinite(
            f"{of}: logits are not finite ({int(wrong_S[row])} of {scores_SV.shape[1]}) at token {place + row} of what "
            "was asked for: the weights are damaged, or too large for their precision"
        )
    return scores_SV


def _greedy(scores_V: Tensor) -> int:
    """The most likely token; of several the first."""
    return int((scores_V == scores_V.max()).nonzero()[0])


def _draw(scores_V: Tensor, sampling: Sampling, place: int) -> int:
    ordered, ids = torch.sort(scores_V, descending=True, stable=True)
    if sampling.top_k:
        ordered = ordered[: sampling.top_k]
    probability = (ordered / sampling.temperature).softmax(0)
    before = probability.cumsum(0) - probability
    kept = probability[before < sampling.top_p] if sampling.top_p < 1 else probability
    edges = kept.cumsum(0)
    at = int(torch.searchsorted(edges, edges[-1] * uniform(sampling.seed, place), right=True))
    return int(ids[min(at, len(kept) - 1)])


def _within(name: str, value: float, low: float, high: float, also: str = "") -> float:
    if not math.isfinite(value) or not low <= value <= high:
        raise UserError(f"{name}={value} is outside {low:g} to {high:g}{also}")
    return value
