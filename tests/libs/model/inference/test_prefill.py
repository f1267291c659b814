"""Prefill against decode token by token, cut at every point, and its grid (INFERENCE.md, test 7)."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from libs.kernels.mimo import MimoState
from libs.model import HybridLM
from libs.model.hybrid import LMState
from libs.model.inference.lanes import PlainLane, zero_state
from libs.model.inference.runner import Runner, grid_tokens, pieces
from tests.libs.model.inference.conftest import ids

CPU = torch.device("cpu")


def prefilled(model: HybridLM, tokens: list[int], grid: int) -> PlainLane:
    runner, lane = Runner(model, 1), PlainLane(model.config, torch.float32, CPU)
    for start, end in pieces(0, len(tokens), grid):
        runner.prefill(lane, tokens[start:end], start)
    return lane


def assert_close(found: MimoState, wanted: MimoState, tolerance: float) -> None:
    """Angles on the circle, everything else by its largest value."""
    turned = torch.remainder(found.angle - wanted.angle + math.pi, 2 * math.pi) - math.pi
    assert float(turned.abs().max()) < tolerance
    for name in ("ssm", "k", "x"):
        a, b = getattr(found, name), getattr(wanted, name)
        assert float((a - b).abs().max() / b.abs().max()) < tolerance, name


@pytest.mark.parametrize(
    ("pattern", "n", "tolerance"),
    [("M-*M-", 64, 1e-4), ("M*", 1000, 1e-3), pytest.param("M", 65_536, 5e-3, marks=pytest.mark.slow)],
)
@pytest.mark.timeout(1200)
def test_a_prefilled_state_is_that_of_as_many_steps(
    build: Callable[..., HybridLM], pattern: str, n: int, tolerance: float
) -> None:
    model, tokens = build(pattern), ids(n, 3)
    lane = prefilled(model, tokens, grid_tokens(model.config))
    stepped = PlainLane(model.config, torch.float32, CPU)
    runner = Runner(model, 1)
    if "*" in pattern:
        for start, token in enumerate(tokens):
            runner.prefill(stepped, [token], start)  # one token: no product of several rows, one chunk each
    else:
        state = LMState((zero_state(model.config, torch.float32, CPU),), 0)
        for token in tokens:
            _, state = model.step(torch.tensor([token]), state)
        assert isinstance(state.layers[0], MimoState)
        stepped.states[0] = state.layers[0]
    for layer, wanted in stepped.states.items():
        assert_close(lane.state(layer), wanted, tolerance)
        assert float(lane.state(layer).angle.min()) >= 0
        assert float(lane.state(layer).angle.max()) <= 2 * math.pi
    for layer, pair in stepped.kv.items():
        for found, wanted_kv in zip(lane.kv[layer], pair, strict=True):
            assert torch.allclose(found, wanted_kv, atol=tolerance * float(wanted_kv.abs().max()))


def test_prefill_cut_at_every_point_is_one_shot(build: Callable[..., HybridLM]) -> None:
    model, tokens = build("M-*M-"), torch.tensor([ids(33, 1), ids(33, 2)])
    wanted, whole = model.prefill(tokens)
    for cut in range(1, 33):
        _, state = model.prefill(tokens[:, :cut])
        found, state = model.prefill(tokens[:, cut:], state)
        assert torch.allclose(found, wanted, atol=2e-4), cut
        assert state.position == whole.position == 33
        for part, other in zip(state.layers, whole.layers, strict=True):
            if isinstance(part, MimoState):
                assert isinstance(other, MimoState)
                assert_close(part, other, 1e-4)
        following, _ = model.step(tokens[:, 0], state)
        assert torch.allclose(following, model.step(tokens[:, 0], whole)[0], atol=2e-4)


def test_a_state_without_its_keys_is_seen(build: Callable[..., HybridLM]) -> None:
    """The test above can fail: an earlier state of which one part is left out changes the logits visibly."""
    model, tokens = build("M-*M-"), torch.tensor([ids(33, 1)])
    wanted, _ = model.prefill(tokens)
    _, state = model.prefill(tokens[:, :16])
    for drop, layer in enumerate(state.layers):
        if layer is not None:
            without = [None if i == drop else kept for i, kept in enumerate(state.layers)]
            found, _ = model.prefill(tokens[:, 16:], LMState(tuple(without), 16))
            assert not torch.allclose(found, wanted, atol=2e-3), drop


def test_pieces_are_counted_from_token_0(build: Callable[..., HybridLM]) -> None:
    assert list(pieces(0, 150, 64)) == [(0, 64), (64, 128), (128, 150)]
    assert list(pieces(64, 150, 64)) == [(64, 128), (128, 150)]
    assert list(pieces(0, 64, 64)) == [(0, 64)]
    assert grid_tokens(build("M-*-").config) == 64
    assert grid_tokens(build("M-*-", mixer__chunk_size=24).config) == 72
    assert grid_tokens(build("*-").config) == 64
