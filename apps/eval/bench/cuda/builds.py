# B sequences, S tokens, H heads, G groups, C chunk
"""Compile the kernels of a plan in parallel processes before anything runs, into TileLang's cache on disk.

Only to save time: what is not built here, or cannot be, is built and reported where it is first called.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TYPE_CHECKING, NamedTuple

from apps.eval.bench.cuda.plan import REFERENCE, Case, CudaPlan, Setting
from apps.eval.bench.operands import Shape
from libs.flags.errors import UserError
from libs.kernels.mimo.sm90.gates import KernelGates

if TYPE_CHECKING:  # these import TileLang
    from libs.kernels.mimo.sm90.kernel_set import KernelName, Problem


class Job(NamedTuple):
    """One kernel for one problem."""

    kernel: KernelName
    gates: KernelGates
    case: Case
    B: int
    S: int
    splits: int


WHOLE = ("fwd", "bwd_fwd", "bwd_bwd")  # the kernels of a sequence that is not split


class Built(NamedTuple):
    """What was compiled ahead. failed: the words of each failure."""

    kernels: int
    seconds: float
    failed: tuple[str, ...]


def jobs_of(plan: CudaPlan, multiprocessors: int) -> tuple[Job, ...]:
    """Every kernel that the plan's checks and points will ask for, in that order, once each."""
    from libs.kernels.mimo.sm90.autograd import plan_splits
    from libs.kernels.mimo.sm90.kernel_set import NAMES, mode_of, spec_of

    wanted: list[tuple[Case, Shape, Setting]] = [
        (case, case.at(plan.check_tokens), setting) for case, setting in plan.checks
    ]
    wanted += [(REFERENCE, point.shape, setting) for point in plan.points for setting in plan.settings]
    jobs: dict[object, Job] = {}  # settings share kernels: by what is compiled
    for case, shape, setting in wanted:
        chunks = -(-shape.S // case.C)
        splits = plan_splits(setting.gates.split_scan, shape.B * shape.H, multiprocessors)
        padded = -(-chunks // splits) * splits * case.C
        for kernel in NAMES if splits > 1 else [name for name in NAMES if name in WHOLE]:
            job = Job(kernel, setting.gates, case, shape.B, padded, splits)
            try:
                variant: object = (kernel, mode_of(kernel, job.gates), spec_of(kernel, job.gates, problem_of(job)))
            except UserError:  # not in the tile table: the build will say so
                variant = job
            jobs.setdefault(variant, job)
    return tuple(jobs.values())


def problem_of(job: Job) -> Problem:
    """The kernel set's description of the same."""
    from libs.kernels.mimo.sm90.kernel_set import Problem
    from libs.kernels.mimo.sm90.tiles import TileShape

    return Problem(TileShape(*job.case), B=job.B, S=job.S, splits=job.splits)


def build_ahead(jobs: Sequence[Job], workers: int, on_built: Callable[[str], None] = lambda name: None) -> Built:
    """Compile in `workers` fresh processes. None of them touches the GPU."""
    started = time.perf_counter()
    failed: list[str] = []
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(_build, job) for job in jobs]):
            error = done.result()
            on_built("")
            if error is not None:
                failed.append(error)
    return Built(len(jobs) - len(failed), time.perf_counter() - started, tuple(sorted(failed)))


def _build(job: Job) -> str | None:
    """In a worker. The error's words, or None."""
    from libs.kernels.mimo.sm90.kernel_set import traced
    from libs.kernels.mimo.sm90.launch import compile_cuda

    try:
        compile_cuda(*traced(job.kernel, job.gates, problem_of(job)), job.kernel)
    except (UserError, RuntimeError) as error:
        lines = str(error).splitlines() or [""]
        return f"{job.kernel} at {tuple(job.case)}: {lines[0][:200]}"
    return None
