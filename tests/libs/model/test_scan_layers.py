"""Gate xla_scan_layers on a model: which patterns are one run, and the loop against the plain loop on a CPU in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from libs.flags.errors import GateRefused
from libs.model import HybridLM, ModelConfig, preset, scan_layers
from libs.model.hybrid import HybridLM as Hybrid
from libs.model.scan_layers import layer_runs, loopable, refuse_one_by_one, run_as_loop
from libs.parallel.xla.homogeneous import Run


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda value: monkeypatch.setattr(scan_layers, "value_of", lambda _gate: value)


@pytest.mark.parametrize(
    ("pattern", "difference", "runs"),
    [
        ("MMM", None, 1),
        ("M-M-M-/*-", None, 1),
        ("M-M-*-M-M-*-", None, 1),
        ("M-M-*-M-", "layer 4, kind: <LayerKind.ATTENTION: '*'>, but <LayerKind.MAMBA: 'M'> in layer 0", 1),
        ("M-*", "layer 1, kind: <LayerKind.MLP: '-'>, but <LayerKind.MAMBA: 'M'> in layer 0", 0),
    ],
)
def test_what_a_pattern_offers(
    config_with: Callable[..., ModelConfig], pattern: str, difference: str | None, runs: int
) -> None:
    assert loopable(config_with(pattern)) == (difference, runs)


def test_the_large_presets_are_one_run() -> None:
    assert loopable(preset("130m")).difference is None
    assert loopable(preset("130m_dense")).difference is None


def trunk(model: HybridLM, runs: list[Run]) -> tuple[Tensor, dict[str, Tensor]]:
    """The trunk's output and every gradient, layers in `runs` as loops, in the context of a static device."""
    tokens = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(0))
    context = Hybrid._static_context(model, tokens, None, 0)
    model.zero_grad()
    x, at = model.embed(tokens), 0
    for run in runs:
        x = model._run(model.trunk[at : run.start], x, context)
        x, at = run_as_loop(model.trunk, run, x, context, "loop"), run.stop
    x = model._run(model.trunk[at:], x, context)
    x.square().mean().backward()
    return x.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("pattern", ["M-M-M-", "M-M-*-M-", "*-*-MM"])
def test_loops_equal_the_plain_loop(build: Callable[..., HybridLM], gate: Callable[[str], None], pattern: str) -> None:
    gate("runs")
    model = build(pattern, dtype=torch.float64, checkpointing="block")
    # The fused attention of a CPU could draw random numbers, so no loop takes it.
    model.request_backends(attention="reference")
    runs = layer_runs(model.trunk, "block")
    assert runs
    (want, gradients), (got, found) = trunk(model, []), trunk(model, runs)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_a_layer_that_is_not_like_the_others_is_refused_with_its_name(
    build: Callable[..., HybridLM], gate: Callable[[str], None]
) -> None:
    gate("on")
    model = build("M-M-M-", checkpointing="block")
    assert layer_runs(model.trunk, "block") == [Run(0, 2, 3)]
    changes: dict[str, Callable[[], object]] = {
        "layer 3, layer.down.weight dtype: torch.bfloat16, but torch.float32 in layer 1":
            lambda: model.trunk[3].layer.down.to(torch.bfloat16),
        "layer 2, norm.eps: 0.5, but 1e-05 in layer 0": lambda: setattr(model.trunk[2].norm, "eps", 0.5),
    }  # fmt: skip
    for said, change in changes.items():
        change()
        with pytest.raises(GateRefused) as caught:
            layer_runs(model.trunk, "block")
        assert said in str(caught.value)
        assert "FATHOM_XLA_SCAN_LAYERS=on" in str(caught.value)


def test_nothing_is_done_silently(
    build: Callable[..., HybridLM], gate: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("M-*")
    gate("off")
    assert layer_runs(model.trunk, "none") == []
    gate("on")
    with pytest.raises(GateRefused, match="layer 1, kind"):
        layer_runs(model.trunk, "block")
    with pytest.raises(GateRefused, match="always recomputed"):
        layer_runs(build("MM").trunk, "none")
    gate("runs")
    with pytest.raises(GateRefused, match="no group of layers"):
        layer_runs(model.trunk, "block")
    # Decode takes layers one by one; elsewhere than on XLA the gate cannot be on.
    asked: list[str] = []
    monkeypatch.setattr(scan_layers, "refuse_if_gated", asked.append)
    refuse_one_by_one(torch.device("cpu"))
    refuse_one_by_one(torch.device("xla"))
    assert asked == ["xla_scan_layers"]
