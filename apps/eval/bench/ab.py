"""`fathom bench ab`: two training configurations, whole step against whole step, interleaved, decided by the rule.

Not for how one process is run (ab_arm.py) nor for what the rule is (libs.flags.evidence).
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from apps.eval.bench.ab_arm import Arm, ArmRun, Steps, run_arm
from apps.eval.bench.correctness import Outcome
from apps.eval.bench.interleave import Contender, interleave
from apps.eval.bench.ops import RedGate
from apps.eval.bench.receipt import Check, Code, Comparison, Gpu, Hardware, LeftOut, Receipt, Sampled
from libs.flags.canonical import hash_json, utc_now
from libs.flags.compare import changes, show
from libs.flags.errors import UserError
from libs.flags.evidence import RULE
from libs.flags.provenance import redact_command, snapshot
from libs.flags.registry import OFF

REPORTED_PACKAGES = ("fathom", "torch", "numpy", "megatron-core", "tilelang", "transformer-engine", "liger-kernel")


class AbPlan(NamedTuple):
    """n: samples of each arm. tolerance: relative, of loss and gradient norm where both arms compute the same thing."""

    a: Arm
    b: Arm
    n: int
    steps: Steps
    tolerance: float
    seed: int
    launcher: tuple[str, ...]
    limit_s: float


class Compared(NamedTuple):
    """What the first run of each arm showed. gate: the one in which they differ, if nothing else does."""

    outcomes: list[Outcome]
    left_out: list[LeftOut]
    gate: tuple[str, str, str] | None


def run_ab(plan: AbPlan, *, command: Sequence[str], machine: str | None) -> Receipt:
    """Check both arms, time them in turn, and decide.

    Raises:
        RedGate: an arm breaks the rules of the run log, or both should compute the same and do not; nothing is timed.
        RunRefused: a gate of an arm cannot be honoured here. UserError: an arm does not run,
            or runs on a device that receipts are not of.
    """
    load_before, source = os.getloadavg()[0], snapshot({})
    folder = Path(tempfile.mkdtemp(prefix="fathom-ab-"))
    try:
        probes = {arm.name: _run(plan, arm, folder / f"{arm.name}-check") for arm in (plan.a, plan.b)}
        hardware = _hardware(source, probes["b"], machine, load_before)
        compared = compare(plan, probes["a"], probes["b"])
        if not all(outcome.passed for outcome in compared.outcomes):
            raise RedGate(compared.outcomes)
        samples = _sample(plan, folder)
    finally:
        shutil.rmtree(folder)
    sampled = {
        arm.name: Sampled.of(arm.name, arm.describe(), samples[arm.name], flops=None, warm_up=True)
        for arm in (plan.a, plan.b)
    }
    comparison = Comparison.of(sampled["a"], sampled["b"], scope="step", gate=compared.gate)
    config = _config(plan, probes)
    resolved = probes["b"].event("gates.resolved")
    return Receipt(
        what=f"whole training step: {plan.b.describe()} against {plan.a.describe()}",
        subject=f"step_{compared.gate[0]}" if compared.gate else "step_ab",
        created=utc_now(),
        command=redact_command(command),
        code=Code.of(source),
        config=config,
        config_hash=hash_json(config),
        gates_hash=resolved["hash"],
        gates={row["gate"]: row["value"] for row in resolved["gates"]},
        hardware=hardware,
        versions={
            "python": source["python"],
            **{name: source["packages"][name] for name in REPORTED_PACKAGES if name in source["packages"]},
        },
        correctness=[Check(**outcome._asdict(), passed=outcome.passed) for outcome in compared.outcomes],
        contenders=list(sampled.values()),
        ratios=[comparison.ratio],
        memory=[],
        aims=[],
        left_out=compared.left_out,
        notes=_notes(plan),
        comparison=comparison,
        decision=comparison.decision(),
    )


def compare(plan: AbPlan, a: ArmRun, b: ArmRun) -> Compared:
    """The correctness gate: the log of each arm keeps its rules; and where only gates differ, so do no numbers."""
    outcomes = [Outcome(f"{name}: rules of the run log", run.violations, 0.0) for name, run in (("a", a), ("b", b))]
    left = [{row["gate"]: row["value"] for row in run.event("gates.resolved")["gates"]} for run in (a, b)]
    differing = changes(*left)
    same_config = a.event("run.start")["config_hash"] == b.event("run.start")["config_hash"]
    if not same_config:
        reason = "the settings differ, so the two may compute different things"
        return Compared(outcomes, [LeftOut(name="losses of a and b", reason=reason)], None)
    for field in ("loss", "grad_norm"):
        pairs = zip(a.steps, b.steps, strict=True)
        errors = [abs(x[field] - y[field]) / max(abs(x[field]), 1e-30) for x, y in pairs]
        error = max(errors, key=lambda e: (e != e, e))  # a NaN is the worst of all
        outcomes.append(Outcome(f"{field} of a and b, every step", error, plan.tolerance))
    gate = differing[0] if len(differing) == 1 else None
    named = None if gate is None else (gate.gate, show(gate.old or OFF), show(gate.new or OFF))
    return Compared(outcomes, [], named)


def _run(plan: AbPlan, arm: Arm, run_dir: Path) -> ArmRun:
    return run_arm(arm, run_dir, plan.steps, plan.launcher, plan.limit_s)


def _sample(plan: AbPlan, folder: Path) -> dict[str, list[float]]:
    """Interleaved rounds; a sample is the mean time of a step in one process."""

    def seconds_of(arm: Arm) -> Callable[[], object]:
        def run() -> float:
            run_dir = folder / f"{arm.name}-timed"
            seconds = _run(plan, arm, run_dir).seconds(plan.steps.skipped)
            shutil.rmtree(run_dir)
            return seconds

        return run

    contenders = [Contender(arm.name, seconds_of(arm), plan.n, warm_up=False) for arm in (plan.a, plan.b)]
    with _progress() as progress:
        task = progress.add_task("samples", total=2 * plan.n, now="")
        return interleave(
            contenders,
            seed=plan.seed,
            clock=_as_reported,
            on_sample=lambda name, seconds: progress.update(task, advance=1, now=f"{name} {seconds:.4g} s"),
        )


def _as_reported(run: Callable[[], object]) -> float:
    """The clock: not of the call, which starts a process, but of the steps inside it, as its log has them."""
    seconds = run()
    assert isinstance(seconds, float)
    return seconds


def _config(plan: AbPlan, probes: Mapping[str, ArmRun]) -> dict[str, Any]:
    return {
        "a": plan.a.describe(),
        "b": plan.b.describe(),
        "n": plan.n,
        "steps": plan.steps._asdict(),
        "seed": plan.seed,
        "launcher": list(plan.launcher),
        "config_hash": {name: run.event("run.start")["config_hash"] for name, run in probes.items()},
        "gates_hash": {name: run.event("gates.resolved")["hash"] for name, run in probes.items()},
        "data": {name: run.event("data.fingerprint")["fingerprint"] for name, run in probes.items()},
    }


def _hardware(source: Mapping[str, Any], run: ArmRun, machine: str | None, load_before: float) -> Hardware:
    """What the arms ran on, by their own logs."""
    extra = run.event("env.snapshot")["extra"]
    kind = str(extra["device"]).partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise UserError(f"a receipt is of a CPU or a CUDA device, the arms ran on {extra['device']}")
    gpu: Gpu | None = None
    if kind == "cuda":
        from apps.eval.bench.cuda.device import require_cuda

        gpu = require_cuda().gpu
    return Hardware(
        machine=machine or (gpu.name if gpu else f"{source['cpu']} {extra['threads']} threads"),
        device="cpu" if gpu is None else "cuda",
        threads=extra["threads"],
        load_before=load_before,
        gpu=gpu,
        **{key: source[key] for key in ("cpu", "cpu_count", "cpu_affinity", "memory_bytes")},
    )


def _notes(plan: AbPlan) -> list[str]:
    return [
        f"the rule: {RULE}",
        f"a sample: mean time of {plan.steps.timed} whole steps (data, forward, backward, optimizer) after "
        f"{plan.steps.skipped} that are left out, in a process of its own, as the run log has them",
        "the correctness gate ran both arms once just before, which also filled the caches of compiled kernels",
        "intervals: paired by round, 95 % t-interval; of the ratio on the logarithm",
    ]


def _progress() -> Progress:
    """On stderr: stdout may be JSON."""
    columns = (
        TextColumn("bench ab"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}"),
    )
    return Progress(*columns, console=Console(file=sys.stderr), transient=True)
