"""The measuring process of `fathom bench crossover`: both models, checked, then length by length timed in turn.

Runs in a process whose gates are installed. Not for what is concluded (crossover.py).
"""
# S tokens

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Literal, NamedTuple

from apps.eval.bench.budget import Allowance, Measured, allowance, predicted_seconds
from apps.eval.bench.correctness import Outcome
from apps.eval.bench.interleave import Contender, interleave
from apps.eval.bench.machine import free_bytes
from apps.eval.bench.model_step import How, Stepper, check_step
from apps.eval.bench.step_memory import allocator_peak, resident_peak
from libs.flags.facts import Facts
from libs.model import ModelConfig, dense_twin, flops_per_token, preset
from libs.model.memory import memory_estimate

Model = Literal["hybrid", "twin"]
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


def measure(plan: CrossoverPlan, gates: Mapping[str, str], facts: Facts) -> Found:
    """Check both models; if they are right, time them at every length that fits. Lengths rise: a length is tried when
    the ones before it say what it will take."""
    started, models = time.monotonic(), configs(plan)
    outcomes = [o for name, config in models.items() for o in check_step(name, config, plan.how)]
    found = Found(outcomes, {}, {}, {}, {})
    if not all(outcome.passed for outcome in outcomes):
        return found
    steppers = {name: Stepper(config, plan.how) for name, config in models.items()}
    known: dict[Model, dict[int, Measured]] = {name: {} for name in models}
    for seq_len in plan.seq_lens:
        left = plan.seconds - (time.monotonic() - started)
        allowed = _allowed(plan, models, known, seq_len, left)
        if allowed.rounds == 0:
            assert allowed.reason is not None
            found.left_out[seq_len] = allowed.reason
            continue
        if allowed.reason is not None:
            found.fewer[seq_len] = allowed.reason
        print(f"bench crossover: S={seq_len}, {allowed.rounds} rounds, {left:.0f} s left", file=sys.stderr, flush=True)
        _length(plan, models, steppers, seq_len, allowed.rounds, found, gates, facts)
        for name, config in models.items():
            times = found.samples[name, seq_len]
            known[name][seq_len] = Measured(sum(times) / len(times), step_flops(config, seq_len))
    return found


def _allowed(
    plan: CrossoverPlan,
    models: Mapping[Model, ModelConfig],
    known: Mapping[Model, Mapping[int, Measured]],
    seq_len: int,
    left_s: float,
) -> Allowance:
    predicted = [predicted_seconds(known[name], seq_len, step_flops(models[name], seq_len)) for name in models]
    together = None if None in predicted else sum(one for one in predicted if one is not None)
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


def _length(
    plan: CrossoverPlan,
    models: Mapping[Model, ModelConfig],
    steppers: Mapping[Model, Stepper],
    seq_len: int,
    rounds: int,
    found: Found,
    gates: Mapping[str, str],
    facts: Facts,
) -> None:
    for name, stepper in steppers.items():
        stepper.length(seq_len)
        if plan.how.device == "cuda":
            other = sum(one.held_bytes for key, one in steppers.items() if key != name)
            found.peaks[name, seq_len] = allocator_peak(stepper, other)
        else:
            found.peaks[name, seq_len] = resident_peak(
                models[name], plan.how, seq_len, gates=gates, facts=facts, threads=plan.threads
            )
    contenders = [Contender(name, stepper.step, rounds, warm_up=True) for name, stepper in steppers.items()]
    samples = interleave(contenders, seed=plan.how.seed + seq_len, on_sample=lambda name, seconds: None)
    for model in models:
        found.samples[model, seq_len] = samples[model]
