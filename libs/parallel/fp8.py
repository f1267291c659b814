"""FP8 parameters: what a run asks for, what a model of them is, and how either is refused.

In order: `fp8_ready` before a model exists, with what `fp8_probe` found here; `fp8_linear` makes the parameters;
`fp8_built` looks at the model that was built, and at what its first step did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from libs.flags.catalog import CATALOG
from libs.flags.errors import GateRefused, Refusal

GATE = "fp8_param_gather"
Word = Literal["on", "on_untried_te"]
FORMATS = ("e4m3", "hybrid")
# Of those that megatron-core knows, the ones of sm_90 that keep no state from step to step.
RECIPES = ("tensorwise", "blockwise")
# What TE's assert_dim_for_fp8_exec wants of widths, and megatron-core's get_fp8_align_size of tokens.
WIDTH_MULTIPLE = TOKEN_MULTIPLE = 16


class Fp8(NamedTuple):
    """What was asked for. word: the gate's value. recipe: how tensors are scaled on their way to FP8."""

    word: Word
    recipe: str

    @property
    def format(self) -> str:
        """e4m3 throughout where each block has a scale of its own; else gradients get the range of e5m2."""
        return "e4m3" if self.recipe == "blockwise" else "hybrid"


class Fp8Weights(NamedTuple):
    """Of a model whose large linears are transformer-engine's.

    names: its FP8 parameters. parts: {parameter as checkpoints know it: the model's parameters that are its rows, in
    order}. initial: values of those in fp32, which FP8 parameters no longer have.
    """

    asked: Fp8
    names: frozenset[str]
    parts: Mapping[str, tuple[str, ...]]
    initial: Mapping[str, Tensor]


class Finding(NamedTuple):
    """One precondition that does not hold, and what to do about it."""

    failure: str
    remedy: str


class Linear(NamedTuple):
    """One TE linear of the model: its parameter's name, and its widths on one tensor-parallel rank."""

    name: str
    in_features: int
    out_features: int


def refuse(found: Sequence[Finding], word: Word) -> None:
    """Raise GateRefused if anything was found."""
    if found:
        raise GateRefused([refusal(found, word)])


def refusal(found: Sequence[Finding], word: Word, earlier: Refusal | None = None) -> Refusal:
    """One refusal of everything found, after what an `earlier` one of the same gate says."""
    failures = [*(() if earlier is None else earlier.failures), *(finding.failure for finding in found)]
    remedies = [*(() if earlier is None else earlier.remedies), *(finding.remedy for finding in found)]
    variable = CATALOG[GATE].variable
    return Refusal(GATE, variable, word, tuple(dict.fromkeys(failures)), tuple(dict.fromkeys(remedies)))
