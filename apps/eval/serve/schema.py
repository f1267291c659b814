"""What a completion request may say: a closed schema, and the 400 for everything else.

A field of OpenAI's API that is not offered is accepted with the value that changes nothing and refused with any other,
with the reason. Not for limits that depend on the model (`service`).
"""

from __future__ import annotations

import json
import secrets
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails

from apps.eval.serve.errors import ApiError
from libs.flags.errors import nearest
from libs.model.inference import MIN_TEMPERATURE

DEFAULT_MAX_TOKENS = 16
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256
SEED_BITS = 63

TokenIds = Annotated[list[int], Field(fail_fast=True)]

_ONLY_ONE = "one completion per request; send the request again with another seed"
_NO_PENALTIES = "the sampler has no penalties"
# field: (the value that changes nothing, why no other one is accepted)
_NOT_OFFERED: dict[str, tuple[Any, str]] = {
    "n": (1, _ONLY_ONE),
    "best_of": (1, _ONLY_ONE),
    "echo": (False, "the prompt is not given back and not scored; `fathom eval` scores text"),
    "suffix": ("", "put the special tokens of fill-in-the-middle into a prompt of token ids"),
    "frequency_penalty": (0, _NO_PENALTIES),
    "presence_penalty": (0, _NO_PENALTIES),
    "logit_bias": ({}, "the sampler changes no logits"),
}


class StreamOptions(BaseModel):
    """include_usage: one more event before the end, with the token counts."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    include_usage: bool = False


class CompletionRequest(BaseModel):
    """The body of POST /v1/completions. prompt: text, or token ids. null means the default, as in OpenAI's API.

    logprobs: 0 for those of the chosen tokens; 1 also names the most likely token, which at temperature 0 is the
    chosen one. seed: drawn when it is not given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    prompt: str | TokenIds
    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=0, lt=2**SEED_BITS)
    stop: str | list[str] | None = None
    logprobs: int | None = Field(default=None, ge=0)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    n: int | None = None
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    @field_validator(*_NOT_OFFERED)
    @classmethod
    def _neutral(cls, value: Any, info: ValidationInfo) -> Any:
        neutral, why = _NOT_OFFERED[str(info.field_name)]
        if value is not None and value != neutral:
            raise ValueError(f"only {neutral!r} is accepted: {why}")
        return value

    @field_validator("temperature")
    @classmethod
    def _drawn_or_greedy(cls, value: float | None) -> float | None:
        if value is not None and 0 < value < MIN_TEMPERATURE:
            raise ValueError(f"allowed are {MIN_TEMPERATURE:g} to 2, and 0, which is greedy")
        return value

    @field_validator("stop", mode="before")
    @classmethod
    def _few_stops(cls, value: Any) -> Any:
        """All of it here: of a union that fits nowhere, pydantic's first reason is that of the wrong branch."""
        given = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(given, list) or not all(isinstance(text, str) for text in given):
            raise ValueError(f"must be a string or a list of up to {MAX_STOPS} strings")
        if len(given) > MAX_STOPS:
            raise ValueError(f"{len(given)} strings; allowed are up to {MAX_STOPS}")
        bad = next((text for text in given if not 1 <= len(text) <= MAX_STOP_CHARACTERS), None)
        if bad is not None:
            raise ValueError(f"a string of {len(bad)} characters; allowed are 1 to {MAX_STOP_CHARACTERS}")
        return value

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Validate a body. Raises ApiError (400) that names the field, what was sent and what is allowed."""
        try:
            request = cls.model_validate_json(body)
        except ValidationError as error:
            raise _refusal(error.errors(include_url=False, include_context=False)[0]) from error
        # pydantic takes the last of several; what it has read is JSON, and not too deep for this.
        json.loads(body, object_pairs_hook=_refuse_repeated)
        if request.stream_options is not None and not request.stream:
            raise ApiError.invalid("stream_options needs stream: true", param="stream_options")
        if request.logprobs is not None and request.logprobs > (1 if request.temperature == 0 else 0):
            raise ApiError.invalid(
                f"logprobs={request.logprobs} is not offered: 0 gives those of the chosen tokens, and 1 is accepted "
                "with temperature=0, where the chosen token is the most likely one",
                param="logprobs",
            )
        return request

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, none twice."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(dict.fromkeys(given))

    @property
    def tokens_wanted(self) -> int:
        """Most tokens to generate."""
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    def seed_or_drawn(self) -> int:
        """The seed of this request: the one given, or a random one."""
        return secrets.randbits(SEED_BITS) if self.seed is None else self.seed


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> None:
    seen = set[str]()
    for name, _ in pairs:
        if name in seen:
            raise ApiError.invalid(f"the field {name!r} is there more than once", param=name, code="repeated_field")
        seen.add(name)


def _refusal(error: ErrorDetails) -> ApiError:
    """The first thing that is wrong with a body."""
    if error["type"] == "json_invalid":
        return ApiError.invalid(f"the body is not valid JSON: {error['msg']}", code="invalid_json")
    if not error["loc"]:
        return ApiError.invalid(f"the body must be a JSON object: {error['msg']}", code="invalid_type")
    field = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        name = ".".join(map(str, error["loc"]))[:80]
        known = StreamOptions.model_fields if len(error["loc"]) > 1 else CompletionRequest.model_fields
        close = nearest(str(error["loc"][-1])[:80], known)
        hint = "" if close is None else f"; did you mean {close!r}?"
        return ApiError.invalid(f"unknown field {name!r}{hint}", param=name, code="unknown_field")
    if error["type"] == "missing":
        return ApiError.invalid(f"the field {field!r} is missing", param=field, code="missing_field")
    if field == "prompt":
        message = "prompt must be a string or a list of token ids (integers); one prompt per request"
        return ApiError.invalid(message, param=field, code="invalid_type")
    given = repr(error["input"])
    shown = given if len(given) <= 80 else f"{given[:80]}..."
    message = f"{field}: {error['msg'].removeprefix('Value error, ')} (given: {shown})"
    return ApiError.invalid(message, param=field)
