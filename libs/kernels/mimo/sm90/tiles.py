"""Which shapes the Hopper kernels are built for, with which resources, and the refusal of everything else.

The table itself: `tile_table.py`. A shape that is not in it is refused with the nearest ones that are.
"""
# N state  P head width  R rank  C tokens of a chunk

from __future__ import annotations

import math

from libs.flags.errors import UserError
from libs.kernels.mimo.sm90.gates import Mode
from libs.kernels.mimo.sm90.inspect import SHARED_PER_BLOCK, SHARED_PER_SM, SHARED_RESERVED
from libs.kernels.mimo.sm90.spec import ScanSpec
from libs.kernels.mimo.sm90.tile_table import TABLE, Kernel, Tiles, TileShape

__all__ = ["SHAPES", "TABLE", "Kernel", "TileShape", "Tiles", "allowed_spills", "planned", "require_shared", "tiles"]

OPTION_BYTES = 1024  # what a small tile can take with its alignment

SHAPES: tuple[TileShape, ...] = tuple(TABLE["fwd", "ws"])


def tiles(kernel: Kernel, mode: Mode, shape: TileShape) -> Tiles:
    """The table's entry.

    Raises:
        UserError: no such shape; the message names the three nearest ones.
    """
    known = TABLE[kernel, mode]
    if shape not in known:
        near = sorted(known, key=lambda other: _distance(shape, other))[:3]
        raise UserError(
            f"no Hopper kernel ({kernel}, {mode}) for {_shown(shape)}; nearest: {'; '.join(map(_shown, near))}. "
            "Choose one of these, or mimo_backend=chunked, which takes every shape"
        )
    return known[shape]


def planned(kernel: Kernel, mode: Mode, spec: ScanSpec) -> ScanSpec:
    """`spec` with the resources of the table.

    Documents, the norm and half rotation bring or widen small tiles. Where these would cost the forward a resident
    block, it shares the x tile; but a PsiV that is read keeps its tile apart, whatever the table says.

    Raises:
        UserError: a shape that is not in the table.
    """
    chosen = tiles(kernel, mode, TileShape(spec.N, spec.P, spec.R, spec.C))
    spec = spec._replace(threads=chosen.threads, stages=chosen.stages, min_blocks=chosen.min_blocks)
    if kernel.startswith("bwd"):
        return spec
    angles = 4 * spec.C * (spec.A - spec.N // 4) * (chosen.stages + 2)  # more than of the table's quarter rotation
    shared = chosen.shared + OPTION_BYTES * (2 * spec.packed + spec.norm) + angles
    crowded = chosen.min_blocks * (shared + SHARED_RESERVED) > SHARED_PER_SM
    share = (chosen.share_x or crowded) and not spec.reads_x
    return spec._replace(share_x=share)


def allowed_spills(kernel: Kernel, mode: Mode, shape: TileShape) -> int:
    """Bytes, stores plus loads, that a kernel of the table may spill."""
    return tiles(kernel, mode, shape).spills


def require_shared(kernel: str, shared: int) -> None:
    """Refuse a kernel that asks for more shared memory than a block can have: no tool before the launch does.

    Raises:
        UserError: with both figures.
    """
    if shared > SHARED_PER_BLOCK:
        raise UserError(
            f"{kernel} needs {shared} bytes of shared memory a block, Hopper has {SHARED_PER_BLOCK}; "
            "choose a smaller chunk_size or fewer pipeline stages"
        )


def _distance(a: TileShape, b: TileShape) -> float:
    """How many doublings apart."""
    return sum(abs(math.log2(x / y)) for x, y in zip(a, b, strict=True))


def _shown(shape: TileShape) -> str:
    return ", ".join(f"{letter}={value}" for letter, value in shape._asdict().items())
