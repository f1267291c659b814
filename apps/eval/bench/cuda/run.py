"""`fathom bench ops --device cuda`: check, compile, measure point by point, and sum up in a receipt.

Not for the parts themselves: accuracy.py, builds.py, measure.py, summary.py.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from apps.eval.bench.correctness import Outcome
from apps.eval.bench.cuda.accuracy import check_all, compare, oracle, output_gradient
from apps.eval.bench.cuda.builds import Built, build_ahead, jobs_of
from apps.eval.bench.cuda.calls import (
    UPSTREAM,
    UPSTREAM_ERRORS,
    Call,
    bf16_operands,
    require_upstream,
    upstream_call,
)
from apps.eval.bench.cuda.device import Machine, require_cuda
from apps.eval.bench.cuda.measure import EventClock, Measured, measure_point
from apps.eval.bench.cuda.plan import REFERENCE, CudaPlan, Point
from apps.eval.bench.cuda.summary import aims_of, notes_of, ratios_of
from apps.eval.bench.machine import Where
from apps.eval.bench.operands import Operands
from apps.eval.bench.ops import RedGate
from apps.eval.bench.receipt import Check, Decision, LeftOut, Receipt
from libs.flags.environment import fathom_variables
from libs.flags.errors import UserError
from libs.flags.facts import Facts
from libs.kernels.mimo.sm90.gates import GATES

# Upstream is tested to 10 %; a contender that is further off computes something else.
UPSTREAM_TOLERANCE = 0.1


def run_cuda(plan: CudaPlan, *, base: str, command: Sequence[str], machine: str | None) -> Receipt:
    """Check, measure and sum up.

    Raises:
        UserError: no GPU to run on, a gate set in the environment that the benchmark sets itself, no time for a point.
        RedGate: a setting disagrees with the oracle; no speed is reported then.
        GateRefused: the environment asks for a gate that cannot be honoured.
    """
    started = time.monotonic()
    device = require_cuda()
    if plan.against is not None:
        require_upstream(plan.against)
    where = Where(free_of_kernel_gates(device), device, threads=torch.get_num_threads(), machine=machine)

    def late() -> bool:
        return plan.seconds is not None and time.monotonic() - started > plan.seconds

    built = _build(plan, device)
    outcomes = _check(plan, device)
    others, left_out = _others(plan, device)
    points = _measure(plan, device, others, late)
    sampled = {one.name: one for measured in points for one in measured.sampled}
    left_out += [item for measured in points for item in measured.left_out]
    if not sampled:
        raise UserError(
            f"nothing could be timed ({time.monotonic() - started:.0f} s after the start): "
            + "; ".join(f"{item.name}: {item.reason}" for item in left_out)
            + "; allow more time with --minutes, or --quick"
        )
    together = Measured(
        list(sampled.values()),
        [record for measured in points for record in measured.memory],
        outcomes + [outcome for measured in points for outcome in measured.outcomes],
        left_out,
    )
    return _receipt(plan, base, together, built, where.fields(config_of(plan, base), command))


def _receipt(plan: CudaPlan, base: str, measured: Measured, built: Built, where: dict[str, Any]) -> Receipt:
    sampled = {one.name: one for one in measured.sampled}
    ratios = ratios_of(plan, base, sampled)
    aims = aims_of(plan, sampled, ratios)
    against, machine = f" and {plan.against}" if plan.against else "", where["hardware"].machine
    return Receipt(
        **where,
        what=f"mamba3_mimo on {machine}: Hopper kernels, gate by gate, against two measured floors{against}",
        subject="ops",
        correctness=[Check(**outcome._asdict(), passed=outcome.passed) for outcome in measured.outcomes],
        contenders=measured.sampled,
        ratios=ratios,
        memory=measured.memory,
        aims=aims,
        left_out=measured.left_out,
        notes=[*notes_of(plan, base, ratios), *_build_notes(built)],
        decision=Decision.of_aims(aims),
    )


def free_of_kernel_gates(device: Machine) -> Facts:
    """What the process's gates may ask about, all of which concern other things than these kernels.

    Raises:
        UserError: a gate of the kernels is set: the benchmark goes through their settings itself.
    """
    ours = {f"FATHOM_{gate.upper()}" for gate in GATES.values()}
    if set_here := sorted(name for name in fathom_variables() if name.upper() in ours):
        raise UserError(f"{', '.join(set_here)}: the benchmark goes through the settings itself; unset it")
    return Facts(
        device="cuda",
        device_name=device.gpu.name,
        multiprocessors=device.gpu.multiprocessors,
        mimo_backend="tilelang",
    )


def config_of(plan: CudaPlan, base: str) -> dict[str, Any]:
    """The plan as JSON values, names for the gates' settings."""
    return {
        **plan._asdict(),
        "base": base,
        "shape": f"H=16 G=1 N={REFERENCE.N} P={REFERENCE.P} R={REFERENCE.R} C={REFERENCE.C} bf16",
        "checks": [f"{tuple(case)} {setting.name}" for case, setting in plan.checks],
        "points": [str(point) for point in plan.points],
        "settings": {setting.name: dict(vars(setting.gates)) for setting in plan.settings},
    }


def _build(plan: CudaPlan, where: Machine) -> Built:
    jobs = jobs_of(plan, where.gpu.multiprocessors)
    with _progress("compile") as progress:
        task = progress.add_task("kernels", total=len(jobs), now=f"{plan.workers} processes")
        return build_ahead(jobs, plan.workers, on_built=lambda _: progress.update(task, advance=1))


def _build_notes(built: Built) -> list[str]:
    notes = [f"{built.kernels} kernels compiled ahead in {built.seconds:.0f} s"]
    return notes + [f"not compiled ahead: {failure}" for failure in built.failed]


def _check(plan: CudaPlan, where: Machine) -> list[Outcome]:
    with _progress("check") as progress:
        task = progress.add_task("checks", total=len(plan.checks), now="oracle")
        outcomes = check_all(
            plan.checks, tokens=plan.check_tokens, seed=plan.seed, device=where.device,
            on_check=lambda name: progress.update(task, advance=1, now=name),
        )  # fmt: skip
    if not all(outcome.passed for outcome in outcomes):
        raise RedGate(outcomes)
    return outcomes


def _others(plan: CudaPlan, where: Machine) -> tuple[list[tuple[str, Call]], list[LeftOut]]:
    """Upstream, if asked for and if it computes the same thing; else why not."""
    if plan.against is None:
        return [], []
    point = Point(1, plan.check_tokens // REFERENCE.C * REFERENCE.C)  # whole chunks: it takes no others
    shape, seed, device = point.shape, plan.seed, where.device
    operands = bf16_operands(shape, seed=seed, device=device)
    grad_out = output_gradient(shape, seed=seed, device=device)

    def call(given: Operands) -> Tensor:
        return upstream_call(given, shape.divisor, REFERENCE.C)

    want = oracle(operands, shape, grad_out)
    outcomes = compare(plan.against, call, operands, grad_out, want, UPSTREAM_ERRORS)
    # The worst of all, since a NaN says that it did not run at all.
    worst = max(outcomes, key=lambda outcome: (outcome.error != outcome.error, outcome.error))
    if worst.error <= UPSTREAM_TOLERANCE:
        return [(UPSTREAM, call)], []
    reason = f"not within {UPSTREAM_TOLERANCE} of the oracle, so not timed: {worst.name}: error {worst.error:.3g}"
    return [], [LeftOut(name=plan.against, reason=reason)]


def _measure(
    plan: CudaPlan, where: Machine, others: Sequence[tuple[str, Call]], late: Callable[[], bool]
) -> list[Measured]:
    clock, points = EventClock(where.device), []
    with _progress("measure") as progress:
        task = progress.add_task("samples", total=None, now="")
        for point in plan.points:
            if late():
                reason = "the time allowed was over"
                points.append(Measured([], [], [], [LeftOut(name=str(point), reason=reason)]))
                continue
            points.append(
                measure_point(
                    plan, point, where.device, clock=clock, others=others, late=late,
                    on_sample=lambda name, _: progress.update(task, advance=1, now=name),
                )
            )  # fmt: skip
    return points


def _progress(what: str) -> Progress:
    """On stderr: stdout may be JSON."""
    columns = (
        TextColumn(f"bench ops, {what}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}"),
    )
    return Progress(*columns, console=Console(file=sys.stderr), transient=True)
