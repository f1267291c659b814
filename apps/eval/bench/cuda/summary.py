# B sequences, S tokens
"""What the samples of a GPU run say: times the two floors, over the base, over upstream; aims; PsiV's verdict.

Not for measuring. Everything here follows from the receipt's own samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from apps.eval.bench.cuda import floors
from apps.eval.bench.cuda.calls import UPSTREAM
from apps.eval.bench.cuda.plan import CudaPlan, Point, contender_name
from apps.eval.bench.operands import FLOP_FORMULA
from apps.eval.bench.receipt import Aim, Ratio, Sampled

PHASES = ("forward", "forward_backward")
# Design goals: forward+backward over upstream's, by the fastest setting.
GOALS: dict[Point, float] = {Point(8, 8192): 0.67, Point(1, 65536): 0.25}


def ratios_of(plan: CudaPlan, base: str, sampled: Mapping[str, Sampled]) -> list[Ratio]:
    """For every contender that ran: time over each floor; over the base setting; over upstream."""
    found: list[Ratio] = []
    for point in plan.points:
        copy, gemm = sampled.get(f"copy_{point}"), sampled.get(f"gemm_{point}")
        if copy is None or gemm is None:
            continue
        for phase in PHASES:
            training = phase == "forward_backward"
            bytes_scale = 2 * plan.copy_bytes / floors.moved_bytes(point.shape, training=training)
            flops_scale = floors.gemm_flops(plan.gemm_size) / floors.needed_flops(point.shape, training=training)
            ours = [sampled[n] for s in plan.settings if (n := contender_name(phase, s.name, point)) in sampled]
            theirs = sampled.get(contender_name(phase, UPSTREAM, point))
            reference = sampled.get(contender_name(phase, base, point))
            for one in [*ours, *([] if theirs is None else [theirs])]:
                found.append(Ratio.of(f"{one.name} over bytes floor", one, copy, scale=bytes_scale))
                found.append(Ratio.of(f"{one.name} over FLOPs floor", one, gemm, scale=flops_scale))
            for one in ours:
                if reference is not None and one.name != reference.name:
                    found.append(Ratio.of(f"{one.name} over {base}", one, reference))
                if theirs is not None:
                    found.append(Ratio.of(f"{one.name} over {UPSTREAM}", one, theirs))
    return found


def aims_of(plan: CudaPlan, sampled: Mapping[str, Sampled], ratios: Sequence[Ratio]) -> list[Aim]:
    """The design goals, where upstream ran: by the setting with the lowest mean time."""
    value = {ratio.name: ratio.value for ratio in ratios}
    aims: list[Aim] = []
    for point, target in GOALS.items():
        names = [contender_name("forward_backward", setting.name, point) for setting in plan.settings]
        ran = [sampled[name] for name in names if name in sampled]
        if not ran:
            continue
        best = min(ran, key=lambda one: one.mean_s).name
        measured = value.get(f"{best} over {UPSTREAM}")
        if measured is not None:
            name = f"{best} (the fastest) over {UPSTREAM}"
            aims.append(Aim(name=name, measured=measured, relation="<=", target=target, met=measured <= target))
    return aims


def verdict(ratio: Ratio) -> str:
    """faster, slower, or noise: by whether the interval of the ratio leaves out 1."""
    if ratio.low is None or ratio.high is None:
        return "no interval"
    return "faster" if ratio.high < 1 else "slower" if ratio.low > 1 else "noise"


def notes_of(plan: CudaPlan, base: str, ratios: Sequence[Ratio]) -> list[str]:
    """How it was measured, and what each PsiV stage and split is worth, whichever way it came out."""
    notes = [
        f"bytes floor: {floors.BYTES_FORMULA}; over the rate of a device copy of {plan.copy_bytes} bytes",
        f"FLOPs floor: {floors.FLOPS_FORMULA}; {FLOP_FORMULA}; over the rate of torch.mm bf16 at {plan.gemm_size}",
        "floors are measured in the same rounds as the contenders; ratios: geometric mean over pairs of one round, "
        "95 % t-interval on the logarithm",
        "times: CUDA events around one call on a cold L2 cache, launch gaps included; forward runs under no_grad, "
        "forward+backward takes the gradients of every input",
        f"stages of PsiV and the split are added to the lane {base!r}; a stage that only writes for a backward has no "
        "forward of its own",
        "gates are decided on the whole step, by `fathom bench ab`",
        "memory: torch's CUDA allocator, peak of one forward+backward beyond what is allocated before it",
    ]
    for ratio in ratios:
        if ratio.name.endswith(f" over {base}") and "forward_backward" in ratio.name:
            interval = "" if ratio.low is None else f" ({ratio.low:.3f} - {ratio.high:.3f})"
            notes.append(f"verdict: {ratio.name}: {ratio.value:.3f}{interval}: {verdict(ratio)}")
    return notes
