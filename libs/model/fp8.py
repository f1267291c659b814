"""Which weights of a `HybridLM` become FP8, and what they are called: the wide segments of its linears.

A packed projection is taken apart: each wide segment gets a scale of its own, and those that steer the scan (B, C,
dd_dt, dd_A, trap), like `angle_proj`, embeddings, head and norms, stay as they are. The same model otherwise: rows,
their order and checkpoint keys are those of `sharding`. Not for how a weight is quantised (libs.parallel.fp8_linear).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from libs.model.attention import Attention
from libs.model.config import ModelConfig
from libs.model.layers import Projection
from libs.model.mixer import MambaMixer
from libs.model.mlp import GatedMlp
from libs.model.sharding import Segment, shard_rules
from libs.parallel.fp8 import Fp8, Fp8Weights, Linear
from libs.parallel.fp8_linear import Fp8Linear

# The projections that hold FP8 weights: segments that get a linear each, or all rows in one.
WIDE = {
    "in_proj": ("z", "x"),
    "out_proj": (),
    "qkv": (),
    "out": (),
    "gate_up": ("gate", "up"),
    "down": (),
}
REST = "rest"


class Part(NamedTuple):
    """Consecutive rows of a projection that are one linear. name: "" when it is all of them."""

    name: str
    rows: int
    fp8: bool


class SplitProjection(nn.Module):
    """A packed projection as several linears over the same input, side by side in the order of its rows."""

    def __init__(self, weight: Tensor, parts: Sequence[Part], asked: Fp8) -> None:
        super().__init__()
        for part, rows in zip(parts, torch.split(weight, [part.rows for part in parts]), strict=True):
            self.add_module(part.name, Fp8Linear(rows, asked) if part.fp8 else _same(rows))
        self._rows = [part.rows for part in parts]

    def segments(self, x: Tensor, widths: Sequence[int]) -> tuple[Any, ...]:
        """As `Projection.segments`; no segment may lie in two parts."""
        found: list[Tensor] = []
        left = list(widths)
        for part, rows in zip(self.children(), self._rows, strict=True):
            inside = [left.pop(0)]
            while sum(inside) < rows:
                inside.append(left.pop(0))
            found += torch.split(part(x), inside, dim=-1)
        return tuple(found)


def _same(rows: Tensor) -> Projection:
    projection = Projection(rows.shape[1], rows.shape[0])
    projection.weight = nn.Parameter(rows.clone())
    return projection


def fp8_linears(config: ModelConfig, tp: int) -> tuple[Linear, ...]:
    """Every linear that `to_fp8` gives an FP8 weight, as one of `tp` ranks holds it."""
    found = []
    for name, rule in shard_rules(config).items():
        for part in _parts(name, rule.segments, tp):
            if part.fp8 and rule.dim == 0:
                found.append(Linear(_own_name(name, part), config.hidden_size, part.rows))
            elif part.fp8:
                found.append(Linear(_own_name(name, part), part.rows, config.hidden_size))
    return tuple(found)


@torch.no_grad()
def to_fp8(model: nn.Module, config: ModelConfig, tp: int, asked: Fp8) -> Fp8Weights:
    """Put FP8 linears in the place of the wide ones of a `HybridLM(config)`, or of one of `tp` ranks' shard of it.

    Values are kept up to rounding; exactly in what is returned.
    """
    rules, initial = shard_rules(config), dict[str, Tensor]()
    held: dict[str, tuple[str, ...]] = {name: (name,) for name, _ in model.named_parameters()}
    for path, layer in list(model.named_modules()):
        if not isinstance(layer, MambaMixer | Attention | GatedMlp):
            continue
        for projection in (name for name in WIDE if hasattr(layer, name)):
            name = f"{path}.{projection}.weight"
            weight, parts = model.get_parameter(name).detach(), _parts(name, rules[name].segments, tp)
            with torch.enable_grad():  # without it TE leaves out what backward needs of a weight
                whole = Fp8Linear(weight, asked) if len(parts) == 1 else SplitProjection(weight, parts, asked)
            setattr(layer, projection, whole)
            held[name], initial[name] = tuple(_own_name(name, part) for part in parts), weight
    names = frozenset(linear.name for linear in fp8_linears(config, tp))
    return Fp8Weights(asked, names, held, initial)


def _parts(name: str, segments: Sequence[Segment], tp: int) -> tuple[Part, ...]:
    """The linears that stand for a parameter on one of `tp` ranks; none where it is no wide projection's weight."""
    projection = name.removesuffix(".weight").rpartition(".")[2]
    if projection not in WIDE:
        return ()
    wide = WIDE[projection]
    total = sum(segment.width for segment in segments) // tp
    if not wide:
        return (Part("", total, True),)
    apart = tuple(Part(s.key, s.width // tp, True) for s in segments if s.key in wide)
    assert [part.name for part in apart] == [s.key for s in segments[: len(apart)]], "wide segments come first"
    rest = total - sum(part.rows for part in apart)
    return (*apart, Part(REST, rest, False)) if rest else apart


def _own_name(name: str, part: Part) -> str:
    """Of the parameter that holds a part."""
    base = f"{name.removesuffix('.weight')}{'.' if part.name else ''}{part.name}"
    return f"{base}.linear.weight" if part.fp8 else f"{base}.weight"


def fp8_elements(config: ModelConfig, tp: int) -> int:
    """Entries of one rank's FP8 parameters."""
    return sum(linear.in_features * linear.out_features for linear in fp8_linears(config, tp))
