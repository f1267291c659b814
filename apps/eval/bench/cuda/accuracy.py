# B sequences, S tokens, H heads, P head width
"""The gate before every time on a GPU: output and fourteen gradients in bf16 against the oracle in fp64.

Every setting of the gates that will be timed is checked, and the lanes at all eleven shapes. Not the kernels' own
tests, which cover options, documents and states.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from apps.eval.bench.correctness import Outcome, relative_error
from apps.eval.bench.cuda.calls import Call, bf16_operands, leaves_of, op_call
from apps.eval.bench.cuda.plan import Case, Setting
from apps.eval.bench.operands import Operands, Shape
from libs.flags.errors import UserError
from libs.kernels.mimo import mamba3_mimo

# MAMBA3.md, acceptance figures of the bf16 kernels
FORWARD_TOLERANCE = 0.01
GRADIENT_TOLERANCE = 0.012
OFF_RTOL = OFF_ATOL = 0.1
OFF_FRACTION = 0.05

# Refused by the tile table, or not compiled, or the launch failed.
OUR_FAILURES = (UserError, RuntimeError)

GRADIENTS = (
    "dq", "dk", "dv", "dA", "ddt", "dtrap", "dq_bias", "dk_bias", "dmimo_v", "dmimo_z", "dmimo_o", "dangles", "dD",
    "dz",
)  # fmt: skip  # in the order of Operands


def check_all(
    checks: Sequence[tuple[Case, Setting]], *, tokens: int, seed: int, device: torch.device,
    on_check: Callable[[str], None] = lambda name: None,
) -> list[Outcome]:  # fmt: skip
    """All comparisons, case by case: the oracle runs once for each. A case that cannot run is a red outcome."""
    outcomes: list[Outcome] = []
    for case, group in itertools.groupby(sorted(checks, key=lambda check: check[0]), key=lambda check: check[0]):
        shape = case.at(tokens)
        operands = bf16_operands(shape, seed=seed, device=device)
        grad_out = output_gradient(shape, seed=seed, device=device)
        want = oracle(operands, shape, grad_out)
        for _, setting in group:
            name = f"N{case.N} P{case.P} R{case.R} C{case.C} {setting.name}"
            on_check(name)

            def call(given: Operands, case: Case = case, shape: Shape = shape, setting: Setting = setting) -> Tensor:
                return op_call(given, shape, case.C, setting.gates)

            outcomes += compare(name, call, operands, grad_out, want)
    return outcomes


def compare(
    name: str, call: Call, operands: Operands, grad_out_BSHP: Tensor, want: Sequence[Tensor],
    failures: tuple[type[Exception], ...] = OUR_FAILURES,
) -> list[Outcome]:  # fmt: skip
    """Output, fourteen gradients, and the largest share of a gradient's elements that are far off. One of `failures`
    becomes a red outcome with the words of the error."""
    try:
        got = output_and_gradients(call, operands, grad_out_BSHP)
    except failures as error:
        return [Outcome(f"{name}: {_first_line(error)}", float("nan"), FORWARD_TOLERANCE)]
    outcomes = [Outcome(f"{name} output", relative_error(got[0], want[0]), FORWARD_TOLERANCE)]
    for label, g, w in zip(GRADIENTS, got[1:], want[1:], strict=True):
        outcomes.append(Outcome(f"{name} {label}", relative_error(g, w), GRADIENT_TOLERANCE))
    shares = [(far_off(g, w), label) for label, g, w in zip(GRADIENTS, got[1:], want[1:], strict=True)]
    worst, label = max(shares, key=lambda pair: pair[0])
    outcomes.append(Outcome(f"{name} share of elements far off (worst: {label})", worst, OFF_FRACTION))
    return outcomes


def oracle(operands: Operands, shape: Shape, grad_out_BSHP: Tensor) -> list[Tensor]:
    """Output and gradients by the recurrence, one token at a time, in float64 on the same rounded operands."""
    exact = Operands(*(tensor.double() for tensor in operands))

    def call(given: Operands) -> Tensor:
        return mamba3_mimo(*given, 1, shape.divisor, torch.float64, backend="reference")

    return output_and_gradients(call, exact, grad_out_BSHP.double())


def output_and_gradients(call: Call, operands: Operands, grad_out_BSHP: Tensor) -> list[Tensor]:
    """(output, gradients in the order of Operands)."""
    leaves = leaves_of(operands)
    out = call(leaves)
    return [out.detach(), *torch.autograd.grad(out, list(leaves), grad_out_BSHP.to(out.dtype))]


def output_gradient(shape: Shape, *, seed: int, device: torch.device) -> Tensor:
    """A seeded gradient of the output, (B, S, H, P), bf16."""
    generator = torch.Generator(device).manual_seed(seed + 1)
    size = (shape.B, shape.S, shape.H, shape.P)
    return torch.randn(size, generator=generator, device=device).to(torch.bfloat16)


def far_off(got: Tensor, want: Tensor) -> float:
    """The share of elements off by more than rtol 0.1 of theirs and atol 0.1; a NaN is off."""
    close = (got.double() - want).abs() <= OFF_ATOL + OFF_RTOL * want.abs()
    return 1.0 - float(close.double().mean())


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:200]
