"""What is drawn: the right distribution, cut where asked, by the seed and the place alone."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch

from libs.flags.errors import UserError
from libs.model.inference import EngineStopped, LogitsNotFinite, Sampling
from libs.model.inference.sampler import logprobs_of, sample, uniform

LOGITS = torch.tensor([0.5, 2.0, -1.0, 2.0, 1.0])


def drawn(n: int = 4000, **options: Any) -> Counter[int]:
    how = Sampling(temperature=options.pop("temperature", 1.0), seed=3, **options)
    return Counter(sample(LOGITS, how, place).token for place in range(n))


def test_greedy_takes_the_first_of_the_largest() -> None:
    token, logprob = sample(LOGITS, Sampling(), 0)
    assert token == 1
    assert logprob == pytest.approx(float(LOGITS.double().log_softmax(0)[1]), abs=1e-12)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_frequencies_follow_the_distribution(temperature: float) -> None:
    found, wanted = drawn(temperature=temperature), (LOGITS.double() / temperature).softmax(0)
    for token, probability in enumerate(wanted.tolist()):
        spread = math.sqrt(probability * (1 - probability) / 4000)
        assert abs(found[token] / 4000 - probability) < 5 * spread


def test_top_k_and_top_p_cut() -> None:
    assert set(drawn(top_k=1)) == {1}
    assert set(drawn(top_k=2)) == {1, 3}
    assert set(drawn(top_k=3)) == {1, 3, 4}
    assert set(drawn(top_p=0.3)) == {1}
    assert set(drawn(top_p=0.5)) == {1, 3}
    assert set(drawn(top_k=3, top_p=0.99)) == {1, 3, 4}
    assert set(drawn()) == set(range(5))


def test_the_log_probability_is_before_everything() -> None:
    wanted = LOGITS.double().log_softmax(0)
    for place in range(20):
        token, logprob = sample(LOGITS, Sampling(temperature=3.0, top_k=2, seed=1), place)
        assert logprob == float(wanted[token])


def test_seed_and_place_decide() -> None:
    how = Sampling(temperature=1.0, seed=5)
    row = [sample(LOGITS, how, place).token for place in range(50)]
    assert row == [sample(LOGITS, how, place).token for place in range(50)]
    assert row != [sample(LOGITS, Sampling(temperature=1.0, seed=6), place).token for place in range(50)]
    values = [uniform(1, place) for place in range(2000)]
    assert all(0 <= value < 1 for value in values)
    assert abs(sum(values) / 2000 - 0.5) < 0.03


def test_scored_tokens() -> None:
    logits = torch.stack([LOGITS, LOGITS.flip(0)])
    logprobs, greedy = logprobs_of(logits, [1, 0])
    assert logprobs == [float(row[token]) for row, token in zip(logits.double().log_softmax(1), (1, 0), strict=True)]
    assert greedy == [True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature=-1.0 is outside 1e-06 to 100"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": 1e-309}, "outside 1e-06 to 100, and 0 is greedy"), ({"temperature": 9e-7}, "and 0 is greedy"),
        ({"top_p": 0}, "top_p=0.0 leaves no token"), ({"top_p": 1.5}, "outside 0 to 1"), ({"top_k": -1}, "top_k"),
        ({"max_new_tokens": 0}, "max_new_tokens.*1 and above"), ({"seed": -3}, "seed"), ({"topk": 3}, "topk"),
    ],
)  # fmt: skip
def test_bad_values_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**options)


def test_the_lowest_temperature_draws_the_most_likely_of_the_widest_logits() -> None:
    most = torch.finfo(torch.float32).max
    for top_p in (0.5, 1.0):
        how = Sampling(temperature=1e-6, top_p=top_p)
        assert [sample(torch.tensor([-most, 0.0, most, 1.0]), how, place).token for place in range(9)] == [2] * 9


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_no_answer(bad: float) -> None:
    assert issubclass(LogitsNotFinite, EngineStopped)
    wrong = LOGITS.clone()
    wrong[2] = bad
    for how in (Sampling(), Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=1), Sampling(top_p=0.5)):
        with pytest.raises(LogitsNotFinite, match=r"request 7: logits are not finite \(1 of 5\) at token 3 .*weights"):
            sample(wrong.half(), how, 3, "request 7")
    with pytest.raises(LogitsNotFinite, match=r"request 7: .*\(1 of 5\) at token 11"):
        logprobs_of(torch.stack([LOGITS, wrong, wrong]), [1, 1, 1], 10, "request 7")
