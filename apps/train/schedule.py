"""Learning rate as a pure function of the step: warm-up then stable then decay (WSD), or cosine.

Not for state: a resumed run asks for the same step and gets the same rate.
"""

from __future__ import annotations

import math

from apps.train.config import ScheduleSection


def learning_rate(step: int, *, peak: float, steps: int, schedule: ScheduleSection) -> float:
    """Rate for the optimizer step number `step` (0 is the first, `steps - 1` the last).

    Warm-up rises linearly and reaches `peak` at step `warmup_steps - 1`, so the first step already moves.
    WSD (Hu et al. 2024, MiniCPM) holds `peak` and goes down linearly over the last `decay_steps`; cosine goes
    down from the end of warm-up. Both end at `peak * final_lr_ratio` on the last step.
    """
    assert 0 <= step < steps, f"step {step} is outside the run of {steps} steps"
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    floor = schedule.final_lr_ratio
    if schedule.kind == "wsd":
        into_decay = step - (steps - schedule.decay_steps) + 1
        share = max(0, into_decay) / max(1, schedule.decay_steps)
        return peak * (1.0 - (1.0 - floor) * share)
    share = (step - schedule.warmup_steps + 1) / (steps - schedule.warmup_steps)
    return peak * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * share)))
