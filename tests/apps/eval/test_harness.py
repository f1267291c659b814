"""The adapter against the model's own logits, and against the interface that the harness calls."""

from __future__ import annotations

import abc
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from apps.eval.harness import Answering, as_harness_model
from libs.flags import installed
from libs.flags.errors import UserError
from libs.flags.facts import Facts
from libs.flags.installed import GateState, install
from libs.flags.resolve import resolve
from libs.model.inference import Engine, EngineConfig
from libs.model.text.shards import DataDir
from libs.model.text.tokenizer import Tokenizer
from tests.apps.eval.suites.questions_support import small_model


class Request(NamedTuple):
    """As `lm_eval.api.instance.Instance`: the arguments are a tuple."""

    args: tuple[Any, ...]


@pytest.fixture(scope="module")
def tokenizer(cpp_dir: Path) -> Tokenizer:
    return DataDir.open(cpp_dir).tokenizer


@pytest.fixture
def answering(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Answering:
    monkeypatch.setattr(installed, "_PROCESS", GateState())
    install(resolve({}, Facts(state_slots=True)))
    model = small_model(tokenizer.vocab_size)
    return Answering(Engine(model, EngineConfig(max_tokens=200), weights="w"), tokenizer, 200)


def slow(tokenizer: Tokenizer, text: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], list[int]]:
    """Of each token of the text after an end-of-document token: log-probability, whether it is the likeliest, bytes."""
    ids = torch.tensor([tokenizer.eod_id, *tokenizer.encode(text).tolist()])
    with torch.no_grad():
        log_p = torch.log_softmax(small_model(tokenizer.vocab_size).logits(ids[None])[0].double(), -1)[:-1]
    picked = log_p[range(len(ids) - 1), ids[1:]].numpy()
    return picked, (log_p.argmax(-1) == ids[1:]).numpy(), tokenizer.token_bytes[ids[1:].numpy()].tolist()


CASES = [("int f() {\n  return", " x + 1;\n}"), ("", "struct A;"), ("std::vec", "tor<int> v;"), ("a = 48", "213;")]


def test_loglikelihood_is_that_of_the_models_logits(answering: Answering, tokenizer: Tokenizer) -> None:
    found = answering.loglikelihood([Request(case) for case in CASES])
    for (context, continuation), (logprob, greedy) in zip(CASES, found, strict=True):
        logprobs, likeliest, sizes = slow(tokenizer, context + continuation)
        before = len(context.encode())
        mine = np.cumsum(sizes) > before  # tokens with a byte of the continuation
        assert logprob == pytest.approx(logprobs[mine].sum(), abs=1e-4)
        assert greedy == bool(likeliest[mine].all())
    assert found == [answering.loglikelihood([Request(case)])[0] for case in CASES], "alone as in a batch, by bits"
    assert answering.loglikelihood([Request(("a", ""))]) == [(0.0, True)]


def test_rolling_scores_every_token_once(answering: Answering, tokenizer: Tokenizer) -> None:
    text = "int main() { return 0; }\n"
    (found,) = answering.loglikelihood_rolling([Request((text,))])
    assert isinstance(found, float)
    assert found == pytest.approx(slow(tokenizer, text)[0].sum(), abs=1e-4)


def test_generation_is_greedy_and_ends_before_a_stop(answering: Answering, tokenizer: Tokenizer) -> None:
    context = "int f() {\n"
    (whole,) = answering.generate_until([Request((context, {"until": [], "max_gen_toks": 12}))])
    ids = [tokenizer.eod_id, *tokenizer.encode(context).tolist()]
    model = small_model(tokenizer.vocab_size)
    spoken = []
    for _ in range(12):
        with torch.no_grad():
            spoken.append(int(model.logits(torch.tensor([ids + spoken]))[0, -1].argmax()))
        if spoken[-1] == tokenizer.eod_id:
            break
    assert whole == tokenizer.decode(spoken).decode("utf-8", "replace")
    stop = whole[len(whole) // 2]
    (cut,) = answering.generate_until([Request((context, {"until": stop, "max_gen_toks": 12}))])
    assert cut == whole[: whole.index(stop)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"untill": ["x"]}, "did you mean 'until'"),
        ({"do_sample": True}, "temperature"),
        ({"max_gen_toks": 500}, "not cut"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(answering: Answering, settings: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        answering.generate_until([Request(("x", settings))])


def test_nothing_is_cut_to_fit(answering: Answering) -> None:
    with pytest.raises(UserError, match=r"max_tokens=200 and is not cut"):
        answering.loglikelihood_rolling([Request(("long text " * 300,))])


def test_without_the_harness_the_error_says_what_to_install(
    answering: Answering, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match="pip install 'lm-eval"):
        as_harness_model(answering._engine, tokenizer, max_tokens=64)


def test_with_the_harness_it_is_one_of_its_models(
    answering: Answering, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base class with the harness's abstract methods and state (lm_eval 0.4.9, api/model.py)."""

    class LM(abc.ABC):
        def __init__(self) -> None:
            self._rank, self._world_size, self.cache_hook = 0, 1, object()

        @abc.abstractmethod
        def loglikelihood(self, requests): ...  # type: ignore[no-untyped-def]

        @abc.abstractmethod
        def loglikelihood_rolling(self, requests): ...  # type: ignore[no-untyped-def]

        @abc.abstractmethod
        def generate_until(self, requests): ...  # type: ignore[no-untyped-def]

        @property
        def tokenizer_name(self) -> str:
            raise NotImplementedError

    package, api, model = (types.ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"))
    model.LM = LM  # type: ignore[attr-defined]
    for module in (package, api, model):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    made = as_harness_model(answering._engine, tokenizer, max_tokens=64)
    assert isinstance(made, LM)
    assert (made._rank, made._world_size) == (0, 1)
    assert made.tokenizer_name == f"fathom-{tokenizer.fingerprint[:16]}"
    assert made.loglikelihood([Request(CASES[0])]) == answering.loglikelihood([Request(CASES[0])])
