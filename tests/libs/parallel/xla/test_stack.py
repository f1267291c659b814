"""Layers as one loop, driven in Python on a CPU: the plain loop's numbers, in fp64, and what may not be in a body."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from libs.parallel.xla.homogeneous import Run
from libs.parallel.xla.stack import NotLoopable, custom_calls, run_units


class Layer(nn.Module):
    """`what`: does something in forward that no attribute, class or hook tells of."""

    def __init__(self, what: str = "") -> None:
        super().__init__()
        self.map, self.what = nn.Linear(6, 6, dtype=torch.float64), what

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        y = torch.tanh(self.map(x)) * scale
        if self.what == "dropout":
            y = F.dropout(y, 0.5)
        elif self.what == "rand":
            y = y * (torch.rand_like(y) > 0.5)
        elif self.what == "kernel":
            y = torch.ops.fathom_test.kernel(y)
        return x + y


def together(tensors: tuple[Tensor, ...]) -> Tensor:
    return tensors[0]


def passes(layers: nn.ModuleList, run: Run | None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, scale = (torch.randn(n, 6, generator=generator, dtype=torch.float64).requires_grad_() for n in (3, 1))
    layers.zero_grad()
    at, out = 0, x
    if run is not None:
        for layer in layers[: run.start]:
            out = layer(out, scale)
        out, at = run_units(list(layers), run, out, (scale,), together, "loop"), run.stop
    for layer in layers[at:]:
        out = layer(out, scale)
    out.square().sum().backward()
    return [out.detach(), *(u.grad for u in (x, scale, *layers.parameters()) if u.grad is not None)]


@pytest.mark.parametrize("run", [Run(0, 1, 6), Run(0, 2, 3), Run(1, 2, 2), Run(4, 1, 2)])
def test_a_loop_equals_the_layers_one_by_one(run: Run) -> None:
    layers = nn.ModuleList(Layer() for _ in range(6))
    want, got = passes(layers, None), passes(layers, run)
    assert len(want) == len(got) == 3 + 12
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_mutation_units_out_of_order_give_other_numbers() -> None:
    layers = nn.ModuleList(Layer() for _ in range(4))
    swapped = nn.ModuleList([layers[1], layers[0], layers[2], layers[3]])
    assert not torch.allclose(passes(layers, Run(0, 1, 4))[0], passes(swapped, Run(0, 1, 4))[0])


def test_a_weight_frozen_in_every_layer_gets_no_gradient() -> None:
    layers = nn.ModuleList(Layer() for _ in range(4))
    for layer in layers:
        layer.map.bias.requires_grad_(False)  # type: ignore[union-attr]
    want, got = passes(layers, None), passes(layers, Run(0, 1, 4))
    assert len(want) == len(got) == 3 + 4
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("what", ["dropout", "rand"])
def test_random_numbers_in_the_code_are_refused(what: str) -> None:
    with pytest.raises(NotLoopable, match="draws random numbers"):
        passes(nn.ModuleList(Layer(what) for _ in range(2)), Run(0, 1, 2))


def test_an_operator_that_is_not_torchs_is_refused() -> None:
    library: Any = torch.library.Library("fathom_test", "DEF")
    library.define("kernel(Tensor x) -> Tensor")
    library.impl("kernel", torch.clone, "CompositeExplicitAutograd")
    with pytest.raises(NotLoopable, match=r"fathom_test\.kernel\.default is a custom call"):
        passes(nn.ModuleList(Layer("kernel") for _ in range(2)), Run(0, 1, 2))


def test_custom_calls_are_read_from_a_modules_text() -> None:
    text = """
      %a = f32[8] custom-call(f32[8] %x), custom_call_target="Sharding", sharding={replicated}
      %b = f32[8] custom-call(f32[8] %a), custom_call_target="tpu_custom_call", backend_config="..."
      %c = f32[8] add(f32[8] %a, f32[8] %b)
    """
    assert custom_calls(text) == ["tpu_custom_call"]
    assert custom_calls(text.replace("tpu_custom_call", "SPMDFullToShardShape")) == []
