"""Which weights become FP8 and what they are called, without transformer-engine: linears that only multiply."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from libs.model import PRESETS, HybridLM, fp8, preset
from libs.model.fp8 import SplitProjection, fp8_elements, fp8_linears, to_fp8
from libs.model.sharding import shard_rules
from libs.parallel.fp8 import Fp8
from libs.parallel.mesh import Parallel, single
from tests.support.tensor_parallel import batch, config, error, rough_model

ASKED = Fp8("on", "tensorwise")


class Plain(nn.Module):
    """In the place of an FP8 linear: the same names, no rounding."""

    def __init__(self, weight: Tensor, asked: Fp8) -> None:
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.linear.weight = nn.Parameter(weight.clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.linear.weight)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "Fp8Linear", Plain)


@pytest.mark.usefixtures("plain")
def test_the_model_stays_what_it_was() -> None:
    """Loss and gradients, the packed ones' by their rows; and decoding."""
    before, after = rough_model(config()), rough_model(config())
    made = to_fp8(after, after.config, 1, ASKED)
    tokens, labels = batch()
    for model in (before, after):
        model.loss(tokens, labels).loss.backward()
    named = dict(after.named_parameters())
    assert {part for parts in made.parts.values() for part in parts} == set(named)
    assert made.parts.keys() == shard_rules(after.config).keys()
    for name, parameter in before.named_parameters():
        values = torch.cat([named[part] for part in made.parts[name]])
        grads: list[Any] = [named[part].grad for part in made.parts[name]]
        assert parameter.grad is not None
        assert torch.equal(values, parameter), name
        assert error(torch.cat(grads), parameter.grad) < 1e-5, name
    with torch.no_grad():
        assert error(after.logits(tokens), before.logits(tokens)) < 1e-5
        assert error(after.prefill(tokens)[0], before.prefill(tokens)[0]) < 1e-5


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_names_and_widths_are_those_of_the_plan(tp: int) -> None:
    """What is checked before a model exists is what the model then has, on a rank of every tensor group."""
    with torch.device("meta"):
        model = HybridLM(config(), parallel=Parallel(single()))
    for module in model.modules():  # a rank's shapes, without its process group
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter))
    rules = shard_rules(model.config)
    for name, parameter in list(model.named_parameters()):
        cut = rules[name].cut(parameter.detach(), 0, tp)
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, nn.Parameter(cut))
    made = to_fp8(model, model.config, tp, ASKED)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if name in made.names}
    planned = fp8_linears(model.config, tp)
    assert shapes == {one.name: (one.out_features, one.in_features) for one in planned}
    assert fp8_elements(model.config, tp) * tp == fp8_elements(model.config, 1)


def test_what_steers_the_scan_stays_in_high_precision() -> None:
    names = {linear.name for linear in fp8_linears(preset("h200_8x"), 8)}
    assert {name.split("layer.")[1] for name in names} == {
        "in_proj.z.linear.weight", "in_proj.x.linear.weight", "out_proj.linear.weight", "qkv.linear.weight",
        "out.linear.weight", "gate_up.gate.linear.weight", "gate_up.up.linear.weight", "down.linear.weight",
    }  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_some(name: str) -> None:
    assert fp8_elements(preset(name), 1) > 0


@pytest.mark.usefixtures("plain")
def test_a_segment_in_two_parts_is_not_handed_out() -> None:
    parts = (fp8.Part("a", 4, True), fp8.Part("rest", 3, False))
    split = SplitProjection(torch.randn(7, 5), parts, ASKED)
    x = torch.randn(2, 5)
    assert [t.shape[-1] for t in split.segments(x, (4, 1, 2))] == [4, 1, 2]
    assert [t.shape[-1] for t in split.segments(x, (1, 3, 3))] == [1, 3, 3]
    with pytest.raises((RuntimeError, ValueError)):
        split.segments(x, (3, 4))
