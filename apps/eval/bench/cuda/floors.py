# B sequences, S tokens, H heads, G groups, N state, P head width, R rank, A angles
"""The two floors under a time: bytes over measured bandwidth, FLOPs over measured matrix rate.

Work is counted as the problem needs it, not as a method spends it: nothing recomputed, nothing kept in memory between
kernels. Not for measuring the two rates' times (measure.py); the runners that do the work for it are here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from apps.eval.bench.operands import Shape, scan_flops

LOW_BYTES, FULL_BYTES = 2, 4  # bf16: q, k, v, z and the output; fp32: everything else

BYTES_FORMULA = (
    "inputs I: q, k, v, z in bf16, adt, dt, trap, angles and parameters in fp32; output O in bf16; forward I + O; "
    "forward+backward 3 I + 2 O (inputs read twice and their gradients written, the output and its gradient)"
)
FLOPS_FORMULA = "forward as counted at chunk 16; the backward twice that: two products for each of the forward's"


def input_bytes(shape: Shape) -> float:
    """The fourteen operands."""
    tokens, heads, rank = shape.B * shape.S, shape.H, shape.R
    low = 2 * tokens * rank * shape.G * shape.N + 2 * tokens * heads * shape.P
    full = tokens * heads * (3 + shape.N // shape.divisor)
    full += 2 * heads * rank * shape.N + 3 * heads * rank * shape.P + heads
    return float(LOW_BYTES * low + FULL_BYTES * full)


def moved_bytes(shape: Shape, *, training: bool) -> float:
    """What must cross the memory bus at least once; see BYTES_FORMULA."""
    given, result = input_bytes(shape), float(LOW_BYTES * shape.B * shape.S * shape.H * shape.P)
    return 3 * given + 2 * result if training else given + result


def needed_flops(shape: Shape, *, training: bool) -> float:
    """Matrix FLOPs; see FLOPS_FORMULA."""
    return scan_flops(shape) * (3 if training else 1)


def gemm_flops(size: int) -> float:
    """2 n^3."""
    return 2.0 * size**3


def gemm_runner(size: int, device: torch.device) -> Callable[[], object]:
    """One bf16 product of two size x size matrices into a buffer that exists already."""
    a, b, out = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(3))
    return lambda: torch.mm(a, b, out=out)


def copy_runner(n_bytes: int, device: torch.device) -> Callable[[], object]:
    """One copy of n_bytes within device memory, which moves 2 n_bytes."""
    source = torch.zeros(n_bytes, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
