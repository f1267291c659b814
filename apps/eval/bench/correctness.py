"""The correctness gate of the op benchmark: the op and the plain formulation against the oracle, in float64.

A red check means that no speed is printed. Not the kernels' own tests: one shape, to guard the numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from apps.eval.bench.contenders import op_call, plain_call
from apps.eval.bench.operands import Operands, Shape, make_operands

FORWARD_TOLERANCE = 1e-5  # MAMBA3.md, acceptance: chunked against oracle in fp32
# A gradient sums over up to S tokens and H heads what the forward bound allows per element.
GRADIENT_TOLERANCE = 1e-4
CHECK_SHAPE = Shape(S=96)


class Outcome(NamedTuple):
    """One comparison: the largest absolute difference over the largest absolute value of the oracle."""

    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # false for NaN


def check_contenders(*, seed: int, chunk_size: int, shape: Shape = CHECK_SHAPE) -> list[Outcome]:
    """Compare outputs and all fourteen gradients of both fp32 formulations with the float64 oracle."""
    exact = make_operands(shape, seed=seed, dtype=torch.float64)
    single = make_operands(shape, seed=seed)
    want = output_and_gradients(lambda x: op_call(x, shape, chunk_size=chunk_size, backend="reference"), exact)
    return [
        *compare("op", lambda x: op_call(x, shape, chunk_size=chunk_size), single, want),
        *compare("plain", lambda x: plain_call(x, shape), single, want),
    ]


def compare(label: str, call: Callable[[Operands], Tensor], operands: Operands, want: list[Tensor]) -> list[Outcome]:
    """Output and fourteen gradients of a call in fp32 against those of the oracle (`output_and_gradients`)."""
    got = output_and_gradients(call, operands)
    worst = max(
        ((relative_error(g, w), name) for g, w, name in zip(got[1:], want[1:], Operands._fields, strict=True)),
        key=lambda pair: (pair[0] != pair[0], pair[0]),  # a NaN is the worst of all
    )
    gradients = f"{label} gradients vs oracle (worst of 14: {worst[1]})"
    return [
        Outcome(f"{label} output vs oracle", relative_error(got[0], want[0]), FORWARD_TOLERANCE),
        Outcome(gradients, worst[0], GRADIENT_TOLERANCE),
    ]


def relative_error(got: Tensor, want: Tensor) -> float:
    """max |got - want| / max |want|; NaN when either holds one."""
    return float((got.double() - want).abs().max() / want.abs().max())


def output_and_gradients(call: Callable[[Operands], Tensor], operands: Operands) -> list[Tensor]:
    """The output, then the gradients in the order of Operands, for one fixed gradient of the output."""
    leaves = Operands(*(tensor.detach().requires_grad_() for tensor in operands))
    out = call(leaves)
    generator = torch.Generator().manual_seed(0)
    grad_out = torch.randn(out.shape, generator=generator).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, list(leaves), grad_out)]
