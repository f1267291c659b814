"""Which shapes the Hopper kernels are built for, with which resources, and what each takes of a multiprocessor.

Figures come from `inspect.py` for G = 1, quarter rotation, all of Z, D and MIMO_Out, no norm and no documents, and are
checked by compiling again in the slow tests. A shape that is not here is refused with the nearest ones that are.
"""
# N state  P head width  R rank  C tokens of a chunk

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from libs.flags.errors import UserError
from libs.kernels.mimo.sm90.gates import Mode
from libs.kernels.mimo.sm90.inspect import SHARED_PER_BLOCK
from libs.kernels.mimo.sm90.spec import ScanSpec

Kernel = Literal["fwd", "states"]


class TileShape(NamedTuple):
    """What decides the size of tiles."""

    N: int
    P: int
    R: int
    C: int


class Tiles(NamedTuple):
    """Chosen: pipeline stages, resident blocks asked for, shared x tile. Measured: shared bytes a block, registers a
    thread without any ceiling, resident blocks a multiprocessor."""

    stages: int
    min_blocks: int
    share_x: bool
    shared: int
    needed: int
    blocks: int


TABLE: dict[tuple[Kernel, Mode], dict[TileShape, Tiles]] = {
    ("fwd", "ws"): {
        TileShape(16, 64, 4, 8): Tiles(2, 2, False, 39488, 126, 2),
        TileShape(32, 64, 4, 16): Tiles(2, 2, False, 83968, 204, 2),
        TileShape(64, 64, 4, 16): Tiles(2, 2, False, 115712, 212, 2),
        TileShape(128, 64, 4, 16): Tiles(1, 2, True, 112640, 238, 2),
        TileShape(256, 64, 4, 8): Tiles(2, 0, False, 182272, 255, 1),
        TileShape(64, 128, 4, 16): Tiles(1, 2, True, 90112, 255, 2),
        TileShape(128, 32, 4, 16): Tiles(1, 2, True, 98304, 166, 2),
        TileShape(128, 128, 4, 8): Tiles(1, 2, True, 97280, 255, 2),
        TileShape(128, 64, 8, 8): Tiles(1, 2, True, 113664, 209, 2),
        TileShape(128, 64, 2, 32): Tiles(2, 0, False, 202752, 234, 1),
        TileShape(128, 64, 1, 64): Tiles(1, 0, True, 156672, 219, 1),
    },
    ("fwd", "tma"): {
        TileShape(16, 64, 4, 8): Tiles(2, 2, False, 34848, 126, 4),
        TileShape(32, 64, 4, 16): Tiles(2, 2, False, 68672, 163, 3),
        TileShape(64, 64, 4, 16): Tiles(2, 2, False, 92224, 206, 2),
        TileShape(128, 64, 4, 16): Tiles(2, 2, True, 112704, 224, 2),
        TileShape(256, 64, 4, 8): Tiles(2, 0, False, 140320, 255, 1),
        TileShape(64, 128, 4, 16): Tiles(2, 2, True, 90176, 255, 2),
        TileShape(128, 32, 4, 16): Tiles(2, 2, False, 109632, 145, 2),
        TileShape(128, 128, 4, 8): Tiles(2, 2, True, 97312, 255, 2),
        TileShape(128, 64, 8, 8): Tiles(2, 2, True, 113696, 218, 2),
        TileShape(128, 64, 2, 32): Tiles(2, 0, False, 147584, 218, 1),
        TileShape(128, 64, 1, 64): Tiles(2, 0, False, 179456, 189, 1),
    },
    ("fwd", "plain"): {
        TileShape(16, 64, 4, 8): Tiles(2, 2, False, 35840, 150, 3),
        TileShape(32, 64, 4, 16): Tiles(2, 2, False, 78336, 204, 2),
        TileShape(64, 64, 4, 16): Tiles(2, 2, False, 110592, 184, 2),
        TileShape(128, 64, 4, 16): Tiles(1, 2, True, 109568, 255, 2),
        TileShape(256, 64, 4, 8): Tiles(2, 0, False, 175104, 255, 1),
        TileShape(64, 128, 4, 16): Tiles(2, 2, True, 112640, 255, 2),
        TileShape(128, 32, 4, 16): Tiles(1, 2, True, 93184, 185, 2),
        TileShape(128, 128, 4, 8): Tiles(2, 2, True, 115712, 255, 2),
        TileShape(128, 64, 8, 8): Tiles(1, 2, True, 110592, 255, 2),
        TileShape(128, 64, 2, 32): Tiles(2, 0, False, 190464, 255, 1),
        TileShape(128, 64, 1, 64): Tiles(1, 0, True, 150528, 255, 1),
    },
    ("states", "ws"): {
        TileShape(16, 64, 4, 8): Tiles(2, 3, False, 13376, 48, 3),
        TileShape(32, 64, 4, 16): Tiles(2, 3, False, 31872, 72, 3),
        TileShape(64, 64, 4, 16): Tiles(2, 3, False, 48128, 86, 3),
        TileShape(128, 64, 4, 16): Tiles(2, 2, False, 79872, 120, 2),
        TileShape(256, 64, 4, 8): Tiles(2, 2, False, 75776, 176, 2),
        TileShape(64, 128, 4, 16): Tiles(2, 2, False, 61440, 120, 2),
        TileShape(128, 32, 4, 16): Tiles(2, 3, False, 73728, 86, 3),
        TileShape(128, 128, 4, 8): Tiles(2, 2, False, 50176, 180, 2),
        TileShape(128, 64, 8, 8): Tiles(2, 3, False, 74752, 118, 3),
        TileShape(128, 64, 2, 32): Tiles(2, 2, False, 95232, 118, 2),
        TileShape(128, 64, 1, 64): Tiles(1, 2, False, 78848, 116, 2),
    },
    ("states", "tma"): {
        TileShape(16, 64, 4, 8): Tiles(2, 3, False, 11296, 48, 10),
        TileShape(32, 64, 4, 16): Tiles(2, 3, False, 24640, 65, 8),
        TileShape(64, 64, 4, 16): Tiles(2, 3, False, 34880, 76, 6),
        TileShape(128, 64, 4, 16): Tiles(2, 3, False, 55360, 110, 4),
        TileShape(256, 64, 4, 8): Tiles(2, 3, False, 52256, 168, 3),
        TileShape(64, 128, 4, 16): Tiles(2, 3, False, 46144, 109, 4),
        TileShape(128, 32, 4, 16): Tiles(2, 3, False, 49216, 78, 4),
        TileShape(128, 128, 4, 8): Tiles(2, 3, False, 36896, 172, 3),
        TileShape(128, 64, 8, 8): Tiles(2, 3, False, 54304, 110, 4),
        TileShape(128, 64, 2, 32): Tiles(2, 3, False, 61568, 110, 3),
        TileShape(128, 64, 1, 64): Tiles(2, 2, False, 78080, 110, 2),
    },
    ("states", "plain"): {
        TileShape(16, 64, 4, 8): Tiles(2, 3, False, 11200, 63, 9),
        TileShape(32, 64, 4, 16): Tiles(2, 3, False, 28544, 78, 5),
        TileShape(64, 64, 4, 16): Tiles(2, 3, False, 44032, 90, 5),
        TileShape(128, 64, 4, 16): Tiles(2, 3, False, 73728, 124, 3),
        TileShape(256, 64, 4, 8): Tiles(2, 3, False, 69632, 182, 3),
        TileShape(64, 128, 4, 16): Tiles(2, 3, False, 57344, 124, 4),
        TileShape(128, 32, 4, 16): Tiles(2, 3, False, 66560, 92, 3),
        TileShape(128, 128, 4, 8): Tiles(2, 3, False, 46080, 190, 3),
        TileShape(128, 64, 8, 8): Tiles(2, 3, False, 70656, 128, 3),
        TileShape(128, 64, 2, 32): Tiles(2, 2, False, 84224, 128, 2),
        TileShape(128, 64, 1, 64): Tiles(2, 2, False, 108800, 128, 2),
    },
}  # fmt: skip

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
    """`spec` with the resources of the table. Reading PsiV keeps its tile apart, whatever the table says."""
    chosen = tiles(kernel, mode, TileShape(spec.N, spec.P, spec.R, spec.C))
    share = chosen.share_x and spec.psiv != "read"
    return spec._replace(stages=chosen.stages, min_blocks=chosen.min_blocks, share_x=share)


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
