# B sequences, S tokens, H heads, P head width
"""One call of our kernels under given gates, or of upstream's op, on bf16 operands; with and without backward.

Not for timing (measure.py) or judging (accuracy.py).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from apps.eval.bench.operands import Operands, Shape, make_operands
from libs.flags.errors import UserError
from libs.kernels.mimo.shapes import MimoInputs, check_inputs
from libs.kernels.mimo.sm90.gates import KernelGates

Call: TypeAlias = Callable[[Operands], Tensor]

UPSTREAM = "mamba_ssm"
_UPSTREAM_MODULE = "mamba_ssm.ops.tilelang.mamba3.mamba3_mimo"
_LOW = ("q_BSRGN", "k_BSRGN", "v_BSHP", "z_BSHP")
_NORM_EPS = 1e-5  # of a norm that is off here

# What third-party code raises when it cannot build or run a kernel. It is then left out with the words of its error.
UPSTREAM_ERRORS = (RuntimeError, ValueError, TypeError, AssertionError, AttributeError, ImportError, LookupError)


def bf16_operands(shape: Shape, *, seed: int, device: torch.device) -> Operands:
    """Operands as a bf16 model gives them: q, k, v, z in bf16, everything else in fp32. Drawn on the device."""
    drawn = make_operands(shape, seed=seed, device=device)
    return drawn._replace(**{name: getattr(drawn, name).to(torch.bfloat16) for name in _LOW})


def op_call(operands: Operands, shape: Shape, chunk_size: int, gates: KernelGates) -> Tensor:
    """Our Hopper kernels, (B, S, H, P). On CPU tensors the same sources run through TileLang's "c" target.

    Raises:
        UserError: a shape that is not in the tile table.
    """
    from libs.kernels.mimo.sm90.autograd import mimo_sm90

    q, k, v, adt, dt, trap, q_bias, k_bias, mimo_v, mimo_z, mimo_out, angles, d, z = operands
    inputs = MimoInputs(
        q=q, k=k, v=v, adt=adt, dt=dt, trap=trap, q_bias=q_bias, k_bias=k_bias, mimo_v=mimo_v, angles=angles,
        mimo_z=mimo_z, mimo_out=mimo_out, d=d, z=z, norm_weight=None,
    )  # fmt: skip
    dims = check_inputs(inputs, shape.divisor)
    return mimo_sm90(inputs, dims, chunk_size, shape.divisor, _NORM_EPS, None, None, gates=gates)[0]


def require_upstream(name: str) -> None:
    """Refuse a comparison that cannot be made.

    Raises:
        UserError: another name than mamba_ssm, or it is not installed.
    """
    if name != UPSTREAM:
        raise UserError.unknown("contender for --against", name, (UPSTREAM,))
    if importlib.util.find_spec(UPSTREAM) is None:
        raise UserError(
            f"--against {name}: the package is not installed here; install a version with Mamba-3 beside this one, "
            "or leave --against out"
        )


def upstream_call(operands: Operands, divisor: int, chunk_size: int) -> Tensor:
    """Upstream's op in the order of arguments that it shares with ours, (B, S, H, P). Any of UPSTREAM_ERRORS."""
    op = importlib.import_module(_UPSTREAM_MODULE).mamba3_mimo
    out: Tensor = op(*operands, chunk_size, divisor, operands.v_BSHP.dtype)
    return out


def leaves_of(operands: Operands) -> Operands:
    """The same storage, each tensor requiring a gradient."""
    return Operands(*(tensor.detach().requires_grad_() for tensor in operands))


def forward_runner(call: Call, operands: Operands) -> Callable[[], object]:
    """Forward alone, under no_grad, as in evaluation."""

    def run() -> None:
        with torch.no_grad():
            call(operands)

    return run


def training_runner(call: Call, operands: Operands, grad_out_BSHP: Tensor) -> Callable[[], object]:
    """Forward, then the gradients of every operand for one fixed gradient of the output."""
    leaves = leaves_of(operands)

    def run() -> None:
        torch.autograd.grad(call(leaves), list(leaves), grad_out_BSHP)

    return run
