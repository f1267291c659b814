"""The start-up self-test of a fused linear cross-entropy: per-token losses and every gradient against the reference.

It is about the installed package on this machine, which no test of ours has seen. Not for speed.
"""
# T tokens  V vocabulary  D hidden

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from libs.flags.catalog import CATALOG
from libs.flags.environment import fathom_variables
from libs.kernels.loss.liger import GATE, linear_cross_entropy_liger, refusal
from libs.kernels.loss.reference import linear_cross_entropy_reference

Operator = Callable[[Tensor, Tensor, Tensor, int], Tensor]

IGNORE = -100
# V = 4 D makes Liger walk chunks of 8 tokens, the last of them not full.
_T, _V, _D = 20, 96, 24
# Of the largest entry. fp32: other orders of summation. bf16: logits and their gradients are rounded to 8 bits.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


class SelfTest(NamedTuple):
    """detail: the worst deviation, or every quantity that was wrong."""

    passed: bool
    detail: str


def self_test_if_asked(device: torch.device) -> SelfTest | None:
    """`self_test`, for the facts that gates are resolved with; it takes seconds, so only where the gate asks.

    None: it does not, or Liger cannot run here, which the gate's other preconditions say.
    """
    asked = fathom_variables().get(CATALOG[GATE].variable) == "liger"
    return self_test(device) if asked and refusal(device.type) is None else None


class _Case(NamedTuple):
    """scale_T: weights of the tokens; None sums them, whose gradient has no storage of its own (stride 0)."""

    name: str
    scale_T: Tensor | None
    labels_T: Tensor
    wants: tuple[bool, bool]


class _Deviation(NamedTuple):
    what: str
    size: float
    allowed: float


def self_test(device: torch.device, operator: Operator = linear_cross_entropy_liger) -> SelfTest:
    """Compare `operator` on `device` with the reference in fp64 on the CPU: small operands, fp32 and bf16.

    Cases: per-token weights that differ in size and sign, equal ones, ignored labels, all labels ignored, and either
    operand frozen, since a gradient that is missing is wrong as well.
    """
    found = [d for dtype in _TOLERANCE for case in _cases() for d in _deviations(operator, dtype, case, device)]
    wrong = [d for d in found if not d.size <= d.allowed]  # NaN is wrong
    if wrong:
        shown = "; ".join(f"{d.what} is off by {d.size:.2g} of its size (allowed {d.allowed:.0e})" for d in wrong)
        return SelfTest(False, shown)
    worst = max(found, key=lambda d: d.size / d.allowed)
    return SelfTest(True, f"{len(found)} quantities; worst: {worst.what} off by {worst.size:.1e} of its size")


def _cases() -> Iterator[_Case]:
    labels_T = torch.arange(_T) * 37 % _V
    some_T = torch.where(torch.arange(_T) % 5 == 1, IGNORE, labels_T)
    varied_T = torch.linspace(-1.5, 2.5, _T)
    both = (True, True)
    yield _Case("different weights", varied_T, labels_T, both)
    yield _Case("different weights, ignored labels", varied_T, some_T, both)
    yield _Case("equal weights, ignored labels", None, some_T, both)
    yield _Case("all labels ignored", varied_T, torch.full_like(labels_T, IGNORE), both)
    yield _Case("hidden frozen", varied_T, some_T, (False, True))
    yield _Case("weight frozen", varied_T, some_T, (True, False))


def _deviations(operator: Operator, dtype: torch.dtype, case: _Case, device: torch.device) -> Iterator[_Deviation]:
    """How far each result of one case is from the reference, relative to the largest entry (at least 1)."""
    generator = torch.Generator().manual_seed(7)
    hidden_TD, weight_VD = (torch.randn(rows, _D, generator=generator).to(dtype) for rows in (_T, _V))
    got = _run(operator, hidden_TD.to(device), weight_VD.to(device), case)
    want = _run(linear_cross_entropy_reference, hidden_TD.double(), weight_VD.double(), case)
    for name, mine, exact in zip(("nll", "hidden.grad", "weight.grad"), got, want, strict=True):
        if exact is None:
            continue
        size = max(1.0, exact.abs().max().item())
        deviation = float("nan") if mine is None else (mine.cpu().double() - exact).abs().max().item() / size
        yield _Deviation(f"{name} ({case.name}, {str(dtype).removeprefix('torch.')})", deviation, _TOLERANCE[dtype])


def _run(operator: Operator, hidden_TD: Tensor, weight_VD: Tensor, case: _Case) -> tuple[Tensor | None, ...]:
    """nll and the gradients of hidden and weight, None where there is none."""
    device = hidden_TD.device
    leaves = [x.detach().requires_grad_(wanted) for x, wanted in zip((hidden_TD, weight_VD), case.wants, strict=True)]
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        nll_T = operator(leaves[0], leaves[1], case.labels_T.to(device), IGNORE)
        if nll_T.requires_grad:  # if not, the gradients stay None, which counts as wrong
            weighted_T = nll_T if case.scale_T is None else nll_T * case.scale_T.to(device)
            weighted_T.sum().backward()  # type: ignore[no-untyped-call]
    return (nll_T.detach(), *(leaf.grad for leaf in leaves))
