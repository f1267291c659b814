"""`fathom bench kernels`: what the compilers say of the Hopper scan kernels, on a machine without a GPU.

Resources and emitted instructions, never a speed: nothing runs. The facts come from `libs.kernels.mimo.sm90.inspect`.
"""
# N state  P head width  R rank  C tokens of a chunk  B sequences  S tokens  H heads

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from apps.eval.bench.kernel_table import GridRow, KernelRow, KernelTable
from apps.eval.bench.receipt import Aim
from libs.kernels.mimo.sm90.autograd import plan_splits
from libs.kernels.mimo.sm90.gates import KernelGates, Split
from libs.kernels.mimo.sm90.inspect import MULTIPROCESSORS, THREADS_PER_SM, Facts, mismatches, tool_versions
from libs.kernels.mimo.sm90.kernel_set import (
    COMBINING,
    NAMES,
    KernelName,
    Problem,
    busy,
    facts,
    grid,
    mode_of,
)
from libs.kernels.mimo.sm90.tiles import TileShape, allowed_spills

SETTINGS: dict[str, KernelGates] = {
    "off": KernelGates(),
    "tma": KernelGates(tma="all"),
    "tma+ws": KernelGates(tma="all", warp_specialization="all"),
    "tma+ws, psiv precomputed": KernelGates(tma="all", warp_specialization="all", psiv="python_precompute"),
    "tma+ws, psiv reused": KernelGates(tma="all", warp_specialization="all", psiv="bwd_bwd_reuse"),
}
STATES = (64, 128)  # N; P, R and C are the reference ones
CHUNK = 16
SPLIT_SETTINGS: tuple[Split, ...] = ("off", "auto")
TWO_BLOCKS: tuple[KernelName, ...] = ("fwd", "states")  # the kernels that aim at two resident blocks
SPLIT_PASSES: tuple[KernelName, ...] = ("states", "combine", "bwd_states", "bwd_combine")


def kernel_table(
    kernels: Sequence[KernelName] = NAMES, settings: Sequence[str] = tuple(SETTINGS), states: Sequence[int] = STATES,
    look: Callable[[KernelName, KernelGates, Problem], Facts] = facts,
) -> KernelTable:  # fmt: skip
    """Compile and tabulate. Minutes when a kernel was never looked at; each new one is named on stderr."""
    rows = []
    for N in states:
        problem = Problem(TileShape(N, 64, 4, CHUNK))
        for setting in settings:
            for kernel in kernels:
                if _repeats(kernel, setting, settings):
                    continue
                print(f"{kernel}, N={N}, {setting}", file=sys.stderr, flush=True)
                rows.append(kernel_row(kernel, setting, problem, look))
    return KernelTable(
        versions=tool_versions(), multiprocessors=MULTIPROCESSORS, kernels=rows, grids=grid_rows(kernels),
        aims=aims(rows),
    )  # fmt: skip


def _repeats(kernel: KernelName, setting: str, settings: Sequence[str]) -> bool:
    """Whether an earlier setting compiles the same kernel: PsiV does not reach the split passes, nothing the
    combining ones."""
    if kernel in COMBINING:
        return setting != settings[0]
    return kernel in SPLIT_PASSES and SETTINGS[setting].psiv != "off" and "tma+ws" in settings


def kernel_row(
    kernel: KernelName, setting: str, problem: Problem, look: Callable[[KernelName, KernelGates, Problem], Facts]
) -> KernelRow:
    """One kernel under one setting."""
    gates = SETTINGS[setting]
    mode = mode_of(kernel, gates)
    found = look(kernel, gates, problem._replace(splits=8) if kernel in SPLIT_PASSES else problem)
    allowed = 0 if kernel == "combine" or kernel == "bwd_combine" else allowed_spills(kernel, mode, problem.shape)
    problems = [*found.lint, *(() if kernel in COMBINING else mismatches(mode, found))]
    if found.spills > allowed:
        problems.append(f"{found.spills} bytes of spills, {allowed} are allowed")
    return KernelRow(
        kernel=kernel, gates=setting, mode=mode, **problem.shape._asdict(),
        threads=found.threads, registers=found.registers, registers_needed=found.needed, spill_bytes=found.spills,
        spill_bytes_allowed=allowed, shared_bytes=found.shared, blocks_per_multiprocessor=found.blocks,
        occupancy=found.blocks * found.threads / THREADS_PER_SM, tma_loads=found.tma_loads,
        bulk_copies=found.bulk_copies, tma_stores=found.tma_stores, async_copies=found.async_copies,
        wgmma=found.wgmma, mma=found.mma, tma_ranks=list(found.tma_ranks), problems=problems,
    )  # fmt: skip


def grid_rows(kernels: Sequence[KernelName], S: int = 8192, H: int = 16) -> list[GridRow]:
    """B = 1 and 8, with and without a split sequence."""
    rows = []
    for B in (1, 8):
        for split in SPLIT_SETTINGS:
            splits = plan_splits(split, B * H, MULTIPROCESSORS)
            for kernel in kernels:
                if kernel in SPLIT_PASSES and splits == 1:
                    continue
                launched = grid(kernel, Problem(TileShape(64, 64, 4, CHUNK), B, S, H, 1, splits))
                rows.append(GridRow(
                    kernel=kernel, B=B, S=S, H=H, split=split, splits=splits, grid=launched,
                    blocks=launched[0] * launched[1] * launched[2], busy_multiprocessors=busy(launched),
                ))  # fmt: skip
    return rows


def aims(rows: Sequence[KernelRow]) -> list[Aim]:
    """What the kernels are to reach, over the rows that are there."""
    tiled = [row for row in rows if row.kernel not in COMBINING]
    found = [_at_most("kernels with spills", sum(row.spill_bytes > 0 for row in rows))]
    found.append(_at_most("kernels with a matrix product and without wgmma", sum(not row.wgmma for row in tiled)))
    found.append(_at_most("kernels without TMA where it is on", sum(
        not row.tma_sites for row in tiled if row.mode != "plain"
    )))  # fmt: skip
    found.append(_at_most("kernels with a problem", sum(bool(row.problems) for row in rows)))
    blocks = [row.blocks_per_multiprocessor for row in rows if row.kernel in TWO_BLOCKS]
    if blocks:
        least = min(blocks)
        name = "resident blocks of the forward and the state pass, the least"
        found.append(Aim(name=name, measured=least, relation=">=", target=2, met=least >= 2))
    return found


def _at_most(name: str, measured: int, target: int = 0) -> Aim:
    return Aim(name=name, measured=measured, relation="<=", target=target, met=measured <= target)
