"""The measuring process of `fathom bench crossover`: both models, checked, then length by length timed in turn.

Runs in a process whose gates are installed. Not for what is concluded (crossover.py).
"""
# S tokens

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Literal, NamedTuple

from apps.eval.bench.budget import MIN_ROUNDS, Allowance, Measured, allowance, predicted_seconds
from apps.eval.bench.correctness import Outcome
from apps.eval.bench.interleave import Contender, interleave, wall_seconds
from apps.eval.bench.machine import free_bytes
from apps.eval.bench.model_step import How, Stepper, check_step
from apps.eval.bench.step_memory import allocator_peak, resident_peak
from libs.flags.facts import Facts
from libs.model import ModelConfig, dense_twin, flops_per_token, preset
from libs.model.memory import memory_estimate

Model = Literal["hybrid", "twin"]
PROBE_TOKENS = 1024
MODELS: tuple[Model, ...] = ("hybrid", "twin")


class CrossoverPlan(NamedTuple):
    """seq_lens: rising. seconds: begin nothing that would end after so many."""

    preset: str
    seq_lens: tuple[int, ...]
    rounds: int
    how: How
    seconds: float
    threads: int


class Found(NamedTuple):
    """samples: seconds of a step by (model, S), in round order. peaks: bytes. left_out, fewer: by S, the reason."""

    outcomes: list[Outcome]
    samples: dict[tuple[Model, int], list[float]]
    peaks: dict[tuple[Model, int], int | None]
    left_out: dict[int, str]
    fewer: dict[int, str]


def configs(plan: CrossoverPlan) -> dict[Model, ModelConfig]:
    """The hybrid and its twin."""
    hybrid = preset(plan.preset)
    return {"hybrid": hybrid, "twin": dense_twin(hybrid)}


def step_flops(config: ModelConfig, seq_len: int) -> float:
    """Modelled FLOPs of one step on a row of `seq_len` tokens (libs.model.flops)."""
    return flops_per_token(config, seq_len).train * seq_len


class _Job(NamedTuple):
    """What every length needs. ends: of the time allowed, by the monotonic clock."""

    plan: CrossoverPlan
    models: Mapping[Model, ModelConfig]
    steppers: Mapping[Model, Stepper]
    gates: Mapping[str, str]
    facts: Facts
    ends: float


def measure(plan: CrossoverPlan, gates: Mapping[str, str], facts: Facts) -> Found:
    """Check both models; if they are right, time them at every length that fits. Lengths rise: a length is tried when
    the ones before it say what it will take."""
    ends, models = time.monotonic() + plan.seconds, configs(plan)
    outcomes = [o for name, config in models.items() for o in check_step(name, config, plan.how)]
    found = Found(outcomes, {}, {}, {}, {})
    if not all(outcome.passed for outcome in outcomes):
        return found
    job = _Job(plan, models, {name: Stepper(config, plan.how) for name, config in models.items()}, gates, facts, ends)
    probe = min(PROBE_TOKENS, plan.seq_lens[0] // 2)
    known = {name: _probed(stepper, probe) for name, stepper in job.steppers.items()}
    for seq_len in plan.seq_lens:
        left = ends - time.monotonic()
        allowed = _allowed(job, known, seq_len, left)
        if allowed.rounds == 0:
            assert allowed.reason is not None
            found.left_out[seq_len] = allowed.reason
            continue
        if allowed.reason is not None:
            found.fewer[seq_len] = allowed.reason
        print(f"bench crossover: S={seq_len}, {allowed.rounds} rounds, {left:.0f} s left", file=sys.stderr, flush=True)
        _length(job, seq_len, allowed.rounds, found)
        for name, config in models.items():
            times = found.samples[name, seq_len]
            known[name][seq_len] = Measured(sum(times) / len(times), step_flops(config, seq_len))
    return found


def _probed(stepper: Stepper, seq_len: int) -> dict[int, Measured]:
    """A length shorter than all that are asked for, to tell what the first of them will take. No sample."""
    stepper.length(seq_len)
    stepper.step()
    return {seq_len: Measured(wall_seconds(stepper.step), step_flops(stepper.model.config, seq_len))}


def _allowed(job: _Job, known: Mapping[Model, Mapping[int, Measured]], seq_len: int, left_s: float) -> Allowance:
    plan, models = job.plan, job.models
    together = sum(predicted_seconds(known[name], seq_len, step_flops(models[name], seq_len)) for name in models)
    need = max(
        memory_estimate(
            config, tokens=seq_len, dtype_bytes=2 if plan.how.precision == "bf16" else 4,
            activation_checkpointing=plan.how.checkpointing, device_type=plan.how.device, gradients_kept=False,
        ).total
        for config in models.values()
    )  # fmt: skip
    return allowance(
        together, wanted=plan.rounds, left_s=left_s, need_bytes=need, free_bytes=free_bytes(plan.how.device)
    )


def _length(job: _Job, seq_len: int, rounds: int, found: Found) -> None:
    """Peaks and samples of both models. Where it takes longer than it seemed, rounds end when the time is over."""
    how, steppers = job.plan.how, job.steppers
    for name, stepper in steppers.items():
        stepper.length(seq_len)
        if how.device == "cuda":
            other = sum(one.held_bytes for key, one in steppers.items() if key != name)
            found.peaks[name, seq_len] = allocator_peak(stepper, other)
        else:
            found.peaks[name, seq_len] = resident_peak(
                job.models[name], how, seq_len, gates=job.gates, facts=job.facts, threads=job.plan.threads
            )
    contenders = [Contender(name, stepper.step, rounds, warm_up=True) for name, stepper in steppers.items()]
    taken: list[str] = []

    def late() -> bool:
        return time.monotonic() > job.ends and len(taken) >= MIN_ROUNDS * len(contenders)

    samples = interleave(
        contenders, seed=how.seed + seq_len, on_sample=lambda name, seconds: taken.append(name), late=late
    )
    for model in job.models:
        found.samples[model, seq_len] = samples[model]
    done = len(samples["hybrid"])
    if done < rounds:
        found.fewer[seq_len] = f"{done} instead of {job.plan.rounds} rounds: then the time allowed was over"
