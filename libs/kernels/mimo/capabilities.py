"""What a backend of the scan offers: stages of the PsiV cache, kernels in the 2-D layout, split kernels, shapes; and
which kernels it has compiled.

Read from the kernels themselves, so that a gate is honoured or refused for what is there. Not for whether a backend
runs on a device: that is `api.choose_backend`.
"""
# H heads  G groups of B/C  R MIMO rank  N state  P head width  C tokens of a chunk

from __future__ import annotations

import re
from typing import Any, NamedTuple

HOPPER = "tilelang"
XLA = ("xla", "xla_loop")
_SHARED_TILE = re.compile(r"T\.(?:sblock_)?alloc_buffer\(\(([\d, ]+)\)(?:, \"\w+\")?, scope=\"shared")
TILE_RANK = 2  # dimensions of the tiles that a TMA box fills
SPLITS = 2
# What gates tma and warp_specialization reach by each scan kernel's name, and what a split sequence runs besides.
REACHED = {"fwd": ("fwd", "states"), "bwd_fwd": ("bwd_fwd",), "bwd_bwd": ("bwd_bwd", "bwd_states")}
SPLIT_KERNELS = {"states", "combine", "bwd_states", "bwd_combine"}


class Geometry(NamedTuple):
    """A mixer's scan, by the letters of `shapes.Dims`. divisor: of the rotation; norm: the output norm is on."""

    H: int
    G: int
    R: int
    N: int
    P: int
    C: int
    divisor: int
    norm: bool


class Capabilities(NamedTuple):
    """Attributes:
    psiv_stages: the stages of gate psiv_cache, in order.
    two_d_kernels: of "fwd", "bwd_fwd", "bwd_bwd", those that keep every shared tile in at most two dimensions.
    split_kernels: the passes that a split sequence needs are there, forward and backward.
    """

    psiv_stages: tuple[str, ...]
    two_d_kernels: tuple[str, ...]
    split_kernels: bool


class Build(NamedTuple):
    """One compiled kernel. `seconds`: tracing, lowering and compilers; details: what it was compiled for."""

    kernel: str
    seconds: float
    details: dict[str, Any]


NOTHING = Capabilities((), (), False)


def capabilities(backend: str, geometry: Geometry) -> Capabilities:
    """What `backend` offers for `geometry`. The Hopper kernels are traced for it, in one or two seconds and without a
    GPU.

    Raises:
        UserError: the geometry is not in the backend's table of shapes; the message names the nearest ones.
    """
    if backend in XLA:
        from libs.kernels.mimo.xla.scan import PSIV_STAGES

        return Capabilities(PSIV_STAGES, (), False)
    if backend != HOPPER:
        return NOTHING
    from libs.kernels.mimo.sm90 import kernel_set
    from libs.kernels.mimo.sm90.gates import KernelGates
    from libs.kernels.mimo.sm90.psiv import STAGES
    from libs.kernels.mimo.sm90.tiles import TileShape

    shape = TileShape(geometry.N, geometry.P, geometry.R, geometry.C)
    problem = kernel_set.Problem(shape, 1, SPLITS * geometry.C, geometry.H, geometry.G, SPLITS)
    gates = KernelGates(tma="all", warp_specialization="all")
    ranks: dict[str, int] = {name: shared_rank(kernel_set.traced(name, gates, problem)[0]) for name in kernel_set.NAMES}
    two_d = tuple(scan for scan, names in REACHED.items() if all(ranks[name] <= TILE_RANK for name in names))
    return Capabilities(tuple(STAGES), two_d, ranks.keys() >= SPLIT_KERNELS)


def shared_rank(func: Any) -> int:
    """Dimensions of the one shared tile of a traced kernel that has most."""
    shapes = _SHARED_TILE.findall(func.script())
    return max((sum(bool(extent.strip()) for extent in shape.split(",")) for shape in shapes), default=0)


def compiled_kernels(backend: str) -> tuple[Build, ...]:
    """Every kernel of `backend` that this process has compiled, in order."""
    if backend != HOPPER:
        return ()
    from libs.kernels.mimo.sm90.launch import compiled

    return tuple(
        Build(c.kernel, c.seconds, {"spec": _plain(c.spec), "mode": c.mode, "device": c.device}) for c in compiled()
    )


def _plain(spec: Any) -> Any:
    """A specification as JSON values."""
    return dict(spec._asdict()) if hasattr(spec, "_asdict") else repr(spec)
