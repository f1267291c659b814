"""An adapter to lm-evaluation-harness (0.4), so that public tasks run on a checkpoint through the engine.

    import lm_eval
    from apps.eval.harness import open_harness
    lm_eval.simple_evaluate(model=open_harness(Path("runs/latest")), tasks=["arc_easy"])

lm_eval is not a dependency: it is imported here, when asked for, and nowhere else. Not for the suites of this project.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from apps.eval.loading import choose_device, eval_facts, load_tokenizer
from apps.eval.suites.suite import Respondent
from libs.flags.canonical import sha256_hex
from libs.flags.environment import fathom_variables
from libs.flags.errors import UserError
from libs.flags.installed import install
from libs.flags.resolve import resolve
from libs.model.checkpoint import MANIFEST, resolve_checkpoint
from libs.model.inference import Engine, EngineConfig, Sampling
from libs.model.text.tokenizer import Tokenizer
from libs.model.weights import load_model

MAX_NEW_TOKENS = 256
_KNOWN = frozenset({"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"})


class Instance(Protocol):
    """A request of the harness: `args` is its tuple of arguments."""

    @property
    def args(self) -> tuple[Any, ...]: ...


class Likelihood(NamedTuple):
    """Natural log-likelihood of a continuation, and whether greedy decoding would give it."""

    logprob: float
    is_greedy: bool


class Answering:
    """The three request types of the harness. Every text begins after an end-of-document token, as in training.

    Attributes:
        max_tokens: longest request; a longer one is an error, never cut.
    """

    def __init__(self, engine: Respondent, tokenizer: Tokenizer, max_tokens: int) -> None:
        super().__init__()
        self._engine, self._tokenizer, self.max_tokens = engine, tokenizer, max_tokens

    @property
    def tokenizer_name(self) -> str:
        """What the harness files its cache of requests under."""
        return f"fathom-{self._tokenizer.fingerprint[:16]}"

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[Likelihood]:
        """Of (context, continuation). Both are encoded as one text, so that the tokens are those of the whole.

        A token that spans the end of the context counts with the continuation: its first bytes are the context's, so
        the context is taken without them.
        """
        pairs = [self._split(*map(str, request.args)) for request in requests]
        return self._score(pairs, [str(request.args[1]) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, each after an end-of-document token, in one piece."""
        pairs = [self._split("", str(request.args[0])) for request in requests]
        return [found.logprob for found in self._score(pairs, [str(request.args[0]) for request in requests])]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Text after (context, settings), cut before the first of `until`; at most `max_gen_toks` tokens.

        Raises:
            UserError: a setting this adapter does not know, or sampling that the harness gave no temperature for.
        """
        prompts, sampling, stops = [], [], []
        for request in requests:
            context, settings = request.args
            prompts.append([self._tokenizer.eod_id, *self._tokenizer.encode(str(context)).tolist()])
            sampling.append(self._sampling(settings))
            until = settings.get("until") or []
            stops.append([until] if isinstance(until, str) else list(until))
        for prompt, how in zip(prompts, sampling, strict=True):
            self._check(len(prompt) + how.max_new_tokens, "a prompt with its answer")
        completions = self._engine.generate(prompts, sampling)
        return [
            _cut(self._tokenizer.decode_generated(completion.tokens).decode("utf-8", "replace"), until)
            for completion, until in zip(completions, stops, strict=True)
        ]

    def _sampling(self, settings: Mapping[str, Any]) -> Sampling:
        for name in settings:
            if name not in _KNOWN:
                raise UserError.unknown("setting of generate_until", name, _KNOWN)
        draws = bool(settings.get("do_sample", False))
        if draws and "temperature" not in settings:
            raise UserError("generate_until: do_sample needs a temperature")
        return Sampling(
            temperature=float(settings["temperature"]) if draws else 0.0,
            top_k=int(settings.get("top_k", 0)) if draws else 0,
            top_p=float(settings.get("top_p", 1.0)) if draws else 1.0,
            max_new_tokens=int(settings.get("max_gen_toks", MAX_NEW_TOKENS)),
            stop_ids=(self._tokenizer.eod_id,),
        )

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        before = len(context.encode())
        whole = self._tokenizer.encode(context + continuation)
        done = count = 0
        for token in whole.tolist():
            done += int(self._tokenizer.token_bytes[token])
            if done > before:
                break
            count += 1
        return [self._tokenizer.eod_id, *whole[:count].tolist()], whole[count:].tolist()

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]], texts: Sequence[str]) -> list[Likelihood]:
        """An empty continuation is certain."""
        asked = [pair for pair in pairs if pair[1]]
        for context, continuation in asked:
            self._check(len(context) + len(continuation), "a text")
        assert all(bool(pair[1]) == bool(text) for pair, text in zip(pairs, texts, strict=True)), "bytes have tokens"
        scored = iter(self._engine.score(asked) if asked else [])
        found: list[Likelihood] = []
        for _, continuation in pairs:
            result = next(scored) if continuation else None
            found.append(Likelihood(0.0, True) if result is None else Likelihood(sum(result.logprobs), result.greedy))
        return found

    def _check(self, tokens: int, what: str) -> None:
        if tokens > self.max_tokens:
            raise UserError(
                f"{what} of {tokens} tokens exceeds max_tokens={self.max_tokens} and is not cut: open it with more"
            )


def _cut(text: str, until: Sequence[str]) -> str:
    ends = [text.find(stop) for stop in until if stop and stop in text]
    return text[: min(ends)] if ends else text


def as_harness_model(engine: Respondent, tokenizer: Tokenizer, *, max_tokens: int) -> Answering:
    """An object that `lm_eval.simple_evaluate(model=...)` takes: `Answering`, and a subclass of the harness's `LM`.

    Raises:
        UserError: lm_eval is not installed.
    """
    try:
        base = importlib.import_module("lm_eval.api.model").LM
    except ImportError as error:
        raise UserError(
            f"lm-evaluation-harness cannot be imported ({error}); install it with pip install 'lm-eval>=0.4,<0.5'"
        ) from error
    made: Answering = type("HarnessModel", (Answering, base), {})(engine, tokenizer, max_tokens)
    return made


def open_harness(checkpoint: Path, *, max_tokens: int = 16_384, max_batch: int = 8, device: str = "auto") -> Answering:
    """The newest checkpoint of a run, or a checkpoint, behind the interface of the harness.

    Raises:
        UserError: no usable checkpoint, or no lm_eval. GateRefused: the environment asks for what cannot be.
    """
    place = resolve_checkpoint(checkpoint)
    where = choose_device(device)
    install(resolve(fathom_variables(), eval_facts(where)))
    model = load_model(place, device=where).eval()
    weights = sha256_hex((place / MANIFEST).read_bytes())
    engine = Engine(model, EngineConfig(max_batch=max_batch, max_tokens=max_tokens), weights=weights)
    return as_harness_model(engine, load_tokenizer(place, model.config), max_tokens=max_tokens)
