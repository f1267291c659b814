"""The kernels of the scan by name, traced for Hopper at a shape, with the tile table's resources and a set of gates.

For looking at kernels (`inspect`), not for running them: that is `launch`.
"""
# B sequences  S tokens, whole chunks  H heads  G groups

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

from libs.kernels.mimo.sm90.bwd_bwd import bwd_bwd
from libs.kernels.mimo.sm90.bwd_fwd import bwd_fwd
from libs.kernels.mimo.sm90.bwd_split import COMBINED_ROWS, bwd_combine, bwd_states
from libs.kernels.mimo.sm90.dialect import CudaDialect
from libs.kernels.mimo.sm90.fwd import make_forward
from libs.kernels.mimo.sm90.gates import KernelGates, Mode
from libs.kernels.mimo.sm90.inspect import MULTIPROCESSORS, Facts, inspect
from libs.kernels.mimo.sm90.launch import opened
from libs.kernels.mimo.sm90.psiv import REUSE
from libs.kernels.mimo.sm90.spec import ScanSpec
from libs.kernels.mimo.sm90.split import CombineSpec, make_combine, make_states
from libs.kernels.mimo.sm90.tiles import TileShape, planned

# In the order of a training step; the states and combining passes only for a split sequence.
KernelName = Literal["states", "combine", "fwd", "bwd_fwd", "bwd_states", "bwd_combine", "bwd_bwd"]
NAMES: tuple[KernelName, ...] = get_args(KernelName)
COMBINING: tuple[KernelName, ...] = ("combine", "bwd_combine")  # no tiles, no matrix products: no gate reaches them

MAKE: dict[KernelName, Callable[[Any, Any], Any]] = {
    "states": make_states, "combine": make_combine, "fwd": make_forward, "bwd_fwd": bwd_fwd,
    "bwd_states": bwd_states, "bwd_combine": bwd_combine, "bwd_bwd": bwd_bwd,
}  # fmt: skip


class Problem(NamedTuple):
    """What a call is made for. All of Z, D and MIMO_Out; `norm`: the output norm too; `packed`: documents."""

    shape: TileShape
    B: int = 1
    S: int = 8192
    H: int = 16
    G: int = 1
    splits: int = 1
    divisor: int = 4
    norm: bool = False
    packed: bool = False


def mode_of(kernel: KernelName, gates: KernelGates) -> Mode:
    """How the gates have a kernel built."""
    if kernel in COMBINING:
        return "plain"
    return gates.mode("bwd" if kernel.startswith("bwd") else "fwd")


def spec_of(kernel: KernelName, gates: KernelGates, problem: Problem) -> ScanSpec | CombineSpec:
    """The variant that is compiled.

    Raises:
        UserError: the shape is not in the tile table.
    """
    (N, P, R, C), B, S, H, G, splits, divisor, norm, packed = problem
    if kernel == "combine":
        return CombineSpec(B, H, N, P, splits)
    reuse = REUSE[gates.psiv]
    reads = (kernel == "bwd_fwd" and reuse.bwd_fwd) or (kernel == "bwd_bwd" and reuse.bwd_bwd)
    psiv = reuse.forward if kernel == "fwd" else "read" if reads else "compute"
    spec = ScanSpec(B, S, H, G, R, N, P, C, divisor, norm=norm, packed=packed, splits=splits, psiv=psiv)
    return spec if kernel == "bwd_combine" else planned(kernel, mode_of(kernel, gates), spec)


def traced(kernel: KernelName, gates: KernelGates, problem: Problem) -> tuple[Any, CudaDialect]:
    """The kernel's text as `launch` builds it, and the dialect it was traced for: arguments of `inspect`."""
    dialect = CudaDialect(mode_of(kernel, gates))
    return MAKE[kernel](dialect, opened(dialect, spec_of(kernel, gates, problem))[0]), dialect


def facts(kernel: KernelName, gates: KernelGates, problem: Problem) -> Facts:
    """What the compilers say of it. Half a minute for a kernel that was never looked at."""
    return inspect(*traced(kernel, gates, problem))


def grid(kernel: KernelName, problem: Problem) -> tuple[int, int, int]:
    """Thread blocks as launched."""
    last = problem.shape.N // min(problem.shape.N, COMBINED_ROWS) if kernel in COMBINING else problem.splits
    return problem.H, problem.B, last


def busy(grid_xyz: tuple[int, int, int], multiprocessors: int = MULTIPROCESSORS) -> int:
    """Multiprocessors that get a block."""
    x, y, z = grid_xyz
    return min(x * y * z, multiprocessors)
