# B sequences, S tokens, H heads, G groups, N state, P head width, R rank, C chunk
"""What one run on a GPU checks and times: shapes, settings of the gates, points, rounds. Pure values.

Not for running any of it (accuracy.py, measure.py).
"""

from __future__ import annotations

from typing import NamedTuple

from apps.eval.bench.operands import CHUNK_OF_COUNT, Shape
from libs.flags.errors import UserError
from libs.kernels.mimo.sm90.gates import KernelGates

# The lane that the PsiV stages and the split are added to.
BASES: dict[str, KernelGates] = {
    "off": KernelGates(),
    "tma": KernelGates(tma="all"),
    "tma_ws": KernelGates(tma="all", warp_specialization="all"),
}


class Setting(NamedTuple):
    """One state of the gates. forward: whether a forward without gradients differs from the base's, so is timed too;
    the stages of PsiV that only write for a backward do nothing there."""

    name: str
    gates: KernelGates
    forward: bool = True


class Case(NamedTuple):
    """A shape of the kernels' table (MAMBA3.md, acceptance figures)."""

    N: int
    P: int
    R: int
    C: int

    def at(self, seq_len: int) -> Shape:
        """Reference heads and groups around it."""
        return Shape(S=seq_len, N=self.N, P=self.P, R=self.R)


ELEVEN: tuple[Case, ...] = tuple(
    Case(*sizes)
    for sizes in (
        (16, 64, 4, 8), (32, 64, 4, 16), (64, 64, 4, 16), (128, 64, 4, 16), (256, 64, 4, 8), (64, 128, 4, 16),
        (128, 32, 4, 16), (128, 128, 4, 8), (128, 64, 8, 8), (128, 64, 2, 32), (128, 64, 1, 64),
    )
)  # fmt: skip
REFERENCE = Case(64, 64, 4, CHUNK_OF_COUNT)


class Point(NamedTuple):
    """Where times are taken, at the reference heads, groups and widths."""

    B: int
    S: int

    @property
    def shape(self) -> Shape:
        return Shape(S=self.S, B=self.B)

    def __str__(self) -> str:
        return f"B{self.B}_S{self.S}"


class CudaPlan(NamedTuple):
    """checks: every (case, setting) whose output and gradients must be right before anything is timed.

    seconds: after these no further round begins; None has no limit. against: "mamba_ssm" or None.
    """

    checks: tuple[tuple[Case, Setting], ...]
    check_tokens: int
    points: tuple[Point, ...]
    settings: tuple[Setting, ...]
    rounds: int
    gemm_size: int
    copy_bytes: int
    workers: int
    seed: int
    seconds: float | None
    against: str | None


def settings_on(base: str) -> tuple[Setting, ...]:
    """The three lanes; on the base each stage of PsiV and the split; and the split on the full lane.

    Raises:
        UserError: no such base.
    """
    if base not in BASES:
        raise UserError.unknown("base", base, BASES)
    tma, ws = BASES[base].tma, BASES[base].warp_specialization

    def added(name: str, *, forward: bool = True, **fields: str) -> Setting:
        return Setting(name, KernelGates(tma=tma, warp_specialization=ws, **fields), forward)  # type: ignore[arg-type]

    lanes = [Setting(name, gates) for name, gates in BASES.items()]
    stages = [
        added("psiv_python_precompute", psiv="python_precompute"),
        *(added(f"psiv_{s}", forward=False, psiv=s) for s in ("gmem_pool", "bwd_fwd_reuse", "bwd_bwd_reuse")),
    ]
    split = [added("split", split_scan="on")]
    if base != "tma_ws":
        split.append(Setting("tma_ws_split", KernelGates(tma="all", warp_specialization="all", split_scan="on")))
    return (*lanes, *stages, *split)


def full_plan(
    *, rounds: int, seed: int, base: str = "off", workers: int = 1, seconds: float | None = None,
    against: str | None = None,
) -> CudaPlan:  # fmt: skip
    """The acceptance figures: eleven shapes in the three lanes and the reference shape in every setting; then B in
    {1, 8} and S in {8k, 65k}, the two design goals first, should the time run out."""
    settings = settings_on(base)
    checks = [(case, setting) for case in ELEVEN for setting in settings[: len(BASES)]]
    checks += [(REFERENCE, setting) for setting in settings[len(BASES) :]]
    points = (Point(8, 8192), Point(1, 65536), Point(1, 8192), Point(8, 65536))
    return CudaPlan(tuple(checks), 509, points, settings, rounds, 8192, 1 << 30, workers, seed, seconds, against)


def quick_plan(
    *, rounds: int, seed: int, base: str = "off", workers: int = 1, seconds: float | None = None,
    against: str | None = None,
) -> CudaPlan:  # fmt: skip
    """A minute or two, to see that everything runs; its figures are not the acceptance figures."""
    settings = settings_on(base)
    checks = tuple((REFERENCE, setting) for setting in settings)
    return CudaPlan(checks, 125, (Point(1, 2048),), settings, rounds, 4096, 1 << 28, workers, seed, seconds, against)


def contender_name(phase: str, setting: str, point: Point) -> str:
    """phase: "forward" or "forward_backward"."""
    return f"{setting}_{phase}_{point}"
