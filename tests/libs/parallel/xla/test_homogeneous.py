"""Which layers may stand for each other: every kind of difference is found and named, and none is invented."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from libs.parallel.xla import homogeneous
from libs.parallel.xla.homogeneous import Finding, Run, difference, homogeneous_runs, whole_stack


class Layer(nn.Module):
    def __init__(self, width: int = 8, scale: float = 1.0, act: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, width), nn.Linear(width, 8)
        self.scale, self.act = scale, act

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.second(self.act(self.first(x)))


class Other(Layer):
    """The same names and shapes, other mathematics."""

    def forward(self, x: Tensor) -> Tensor:
        return x - super().forward(x)


def changed(change: Callable[[Layer], object]) -> Layer:
    layer = Layer()
    change(layer)
    return layer


def grown() -> Layer:
    layer = Layer()
    layer.register_parameter("extra", nn.Parameter(torch.ones(8)))
    return layer


def with_eps(eps: float) -> Layer:
    layer = Layer()
    layer.add_module("norm", nn.LayerNorm(8, eps))
    return layer


def freeze(layer: Layer) -> None:
    layer.first.weight.requires_grad_(False)


def tied() -> Layer:
    layer = Layer()
    layer.second.weight = layer.first.weight
    return layer


# The odd one of four layers, and what is said of it.
DIFFERENT = {
    "activation": (lambda: Layer(act=F.gelu), "act", "gelu"),
    "attribute": (lambda: Layer(scale=0.1), "scale", "0.1, but 1.0 in layer 0"),
    "type of an attribute": (lambda: Layer(scale=1), "scale", "1, but 1.0"),
    "attribute not there": (lambda: changed(lambda u: delattr(u, "scale")), "scale", "not there, but 1.0"),
    "attribute of its own": (lambda: changed(lambda u: setattr(u, "alpha", 2)), "alpha", "2, but not there"),
    "class": (Other, "class", "Other"),
    "class inside": (lambda: changed(lambda u: setattr(u, "first", nn.Identity())), "first", "Identity"),
    "shape": (lambda: Layer(width=16), "first.out_features", "16, but 8"),
    "extra parameter": (grown, "extra shape", "(8,), but not there"),
    "extra module": (lambda: with_eps(1e-5), "norm", "LayerNorm"),
    "dtype": (lambda: changed(lambda u: u.second.to(torch.bfloat16)), "second.weight dtype", "torch.bfloat16, but"),
    "frozen weight": (lambda: changed(freeze), "first.weight requires_grad", "False, but True"),
    "training": (lambda: changed(lambda u: u.eval()), "training", "False, but True"),
    "training inside": (lambda: changed(lambda u: u.second.eval()), "second.training", "False, but True"),
    "no bias": (
        lambda: changed(lambda u: u.first.register_parameter("bias", None)),
        "first.bias shape",
        "not there, but (8,)",
    ),
    "tied weights": (tied, "second.weight is", "'first.weight'"),
    "forward of its own": (lambda: changed(lambda u: setattr(u, "forward", u.second.forward)), "forward", "Linear"),
    "device": (lambda: changed(lambda u: u.second.to("meta")), "second.weight device", "meta"),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_the_first_difference_is_named(kind: str) -> None:
    make, path, said = DIFFERENT[kind]
    found = whole_stack([Layer(), Layer(), make(), Layer()])
    assert isinstance(found, Finding)
    assert (found.layer, found.path) == (2, path), found
    assert said in found.what
    assert str(found) == f"layer 2, {path}: {found.what}"


def test_equal_layers_with_other_weights_are_one_run() -> None:
    assert whole_stack([Layer() for _ in range(4)]) == Run(0, 1, 4)
    assert difference([Layer(), Layer()], 1, 0) is None
    # Frozen alike, and put into evaluation alike, is alike.
    frozen = [changed(lambda u: u.eval().requires_grad_(False)) for _ in range(3)]
    assert whole_stack(frozen) == Run(0, 1, 3)


def add_dropout(layer: Layer) -> None:
    layer.add_module("drop", nn.Dropout(0.5))


def add_batch_norm(layer: Layer) -> None:
    layer.add_module("norm", nn.BatchNorm1d(8))


OBSTACLES = {
    "dropout": (add_dropout, "drop", "Dropout draws random numbers"),
    "batch norm": (add_batch_norm, "norm", "BatchNorm1d"),
    "hook": (lambda u: u.first.register_forward_hook(lambda *_: None), "first", "a hook (forward_hooks)"),
    "pre-hook": (lambda u: u.register_forward_pre_hook(lambda *_: None), "", "a hook (forward_pre_hooks)"),
    "backward hook": (lambda u: u.register_full_backward_hook(lambda *_: None), "", "a hook (backward_hooks)"),
    "buffer": (lambda u: u.register_buffer("table", torch.ones(2)), "table", "a buffer"),
    "tensor": (lambda u: setattr(u, "table", [torch.ones(2)]), "table", "a tensor that is no parameter"),
}


@pytest.mark.parametrize("kind", OBSTACLES)
def test_what_a_loop_gets_wrong_is_refused_even_where_all_layers_have_it(kind: str) -> None:
    change, path, said = OBSTACLES[kind]
    for check in (whole_stack, homogeneous_runs):
        found = check([Layer(), *(changed(change) for _ in range(3))])
        assert isinstance(found, Finding)
        assert (found.layer, found.path) == (1, path)
        assert said in found.what


def test_a_hook_that_keeps_nothing_may_be_shared_but_not_differ() -> None:
    class Note:
        stateless = True

        def __call__(self, _module: nn.Module, _arguments: object) -> None: ...

    shared, hooked = Note(), [Layer() for _ in range(3)]
    for layer in hooked:
        layer.register_forward_pre_hook(shared)
    assert whole_stack(hooked) == Run(0, 1, 3)
    found = whole_stack([*hooked, Layer()])
    assert isinstance(found, Finding)
    assert (found.layer, found.path) == (3, "_forward_pre_hooks")


def stack(pattern: str) -> list[nn.Module]:
    return [Layer(width=8 + "abc".index(letter)) for letter in pattern]


@pytest.mark.parametrize(
    ("pattern", "whole", "runs"),
    [
        ("aaaa", Run(0, 1, 4), [Run(0, 1, 4)]),
        ("ababab", Run(0, 2, 3), [Run(0, 2, 3)]),
        # The unit is the shortest that divides the stack, also where shorter groups repeat inside of it.
        ("aabaab", Run(0, 3, 2), [Run(0, 3, 2)]),
        ("ababcbab", 4, [Run(0, 2, 2)]),
        ("ababa", 1, [Run(0, 2, 2)]),
        ("cababb", 3, [Run(1, 2, 2)]),
        ("aabbb", 2, [Run(0, 1, 2), Run(2, 1, 3)]),
        ("abc", 1, None),
        ("a", 0, None),
    ],
)
def test_units_and_runs(pattern: str, whole: Run | int, runs: list[Run] | None) -> None:
    """Where a stack is no run: the layer of the first difference."""
    layers = stack(pattern)
    found, parts = whole_stack(layers), homogeneous_runs(layers)
    assert found == whole if isinstance(whole, Run) else isinstance(found, Finding) and found.layer == whole
    assert parts == runs if runs is not None else isinstance(parts, Finding)


def test_mutation_a_check_that_skips_a_kind_of_thing_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail: without attributes two other layers are taken for equal, and runs overlap nothing."""
    skipped = frozenset({*homogeneous._MODULE_FIELDS, "scale"})
    monkeypatch.setattr(homogeneous, "_MODULE_FIELDS", skipped)
    assert whole_stack([Layer(), Layer(scale=0.1)]) == Run(0, 1, 2)
