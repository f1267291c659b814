"""`fathom bench step`: a training step of a model by its parts, what recomputing blocks costs and saves.

Not for lengths (crossover.py) nor for gates (ab.py): one length, one configuration.
"""
# S tokens

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

from pydantic import ConfigDict, Field, model_validator

from apps.eval.bench.correctness import Outcome
from apps.eval.bench.follows import require_reason, require_same
from apps.eval.bench.inference_receipt import own_process
from apps.eval.bench.interleave import Contender, interleave
from apps.eval.bench.machine import Where, step_facts
from apps.eval.bench.model_step import CHECK_TOKENS, How, Stepper, check_step
from apps.eval.bench.ops import RedGate
from apps.eval.bench.receipt import NO_CHANGE, Check, Decision, Ratio, Receipt, Sampled
from apps.eval.bench.step_memory import METHOD, resident_peak
from libs.flags.facts import Facts
from libs.model import flops_per_token, preset
from libs.model.hybrid import Checkpointing

PARTS = {
    "forward": "the loss, under no_grad",
    "forward_backward": "the loss and its gradient",
    "step": "forward, backward, clipping, AdamW",
    "step_recomputed": "the same, blocks recomputed in the backward",
}
_KEPT, _RECOMPUTED = "step", "step_recomputed"
_RATIO = "recomputed_over_kept"


class StepPlan(NamedTuple):
    preset: str
    seq_len: int
    rounds: int
    threads: int
    seed: int

    def how(self, checkpointing: Checkpointing) -> How:
        return How("cpu", "fp32", checkpointing, "auto", self.seed)


class StepReceipt(Receipt):
    """A receipt with the peak memory of a step, with its blocks kept and recomputed; null where it cannot be told."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    tokens_per_s: float = Field(gt=0)
    peak_bytes: dict[str, int | None]

    @model_validator(mode="after")
    def _figures_follow_from_samples(self) -> Self:
        if absent := {_KEPT, _RECOMPUTED} - self.peak_bytes.keys():
            raise ValueError(f"peak_bytes says nothing of {', '.join(sorted(absent))}")
        seq_len = self.config.get("seq_len")
        rate = seq_len / self.contender(_KEPT).mean_s if isinstance(seq_len, int) else None
        require_same("rate", self, self.model_copy(update={"tokens_per_s": rate}))
        require_reason(self.decision.reason, _said(self.tokens_per_s, self.ratio(_RATIO), self.peak_bytes))
        return self


class Measured(NamedTuple):
    outcomes: list[Outcome]
    samples: dict[str, list[float]]
    peaks: dict[str, int | None]


def run_step(plan: StepPlan, *, command: Sequence[str], machine: str | None) -> StepReceipt:
    """Check, measure and sum up, on the CPU.

    Raises:
        RedGate: a step is not what fp64 and the references give; nothing has been timed then.
        GateRefused: the environment asks for a gate that cannot be honoured.
    """
    config = preset(plan.preset)
    where = Where(step_facts(plan.how("none"), config, plan.seq_len, None), None, threads=plan.threads, machine=machine)
    with own_process(where.variables, where.facts, plan.threads) as pool:
        found = pool.submit(measure, plan, where.variables, where.facts).result()
    if not all(outcome.passed for outcome in found.outcomes):
        raise RedGate(found.outcomes)
    flops = flops_per_token(config, plan.seq_len)
    counted = {"forward": flops.forward, "forward_backward": flops.train, "step": flops.train}
    sampled = {
        name: Sampled.of(
            name, f"{PARTS[name]}, S={plan.seq_len}", times, warm_up=True,
            flops=counted[name] * plan.seq_len if name in counted else None,
        )
        for name, times in found.samples.items()
    }  # fmt: skip
    rate = plan.seq_len / sampled["step"].mean_s
    recomputed = Ratio.of(_RATIO, sampled[_RECOMPUTED], sampled[_KEPT])
    return StepReceipt(
        what=f"training step of {plan.preset} on one row of {plan.seq_len} tokens, by its parts",
        subject="step",
        correctness=[Check(**outcome._asdict(), passed=outcome.passed) for outcome in found.outcomes],
        contenders=list(sampled.values()),
        ratios=[
            Ratio.of("forward_backward_over_forward", sampled["forward_backward"], sampled["forward"]),
            Ratio.of("step_over_forward_backward", sampled["step"], sampled["forward_backward"]),
            recomputed,
        ],
        memory=[],
        aims=[],
        tokens_per_s=rate,
        peak_bytes=found.peaks,
        left_out=[],
        notes=[
            "tokens at random, one document; FLOPs by formula, forward and backward, recomputation not counted",
            f"the correctness gate: loss, gradient norm and norm of the update at S={CHECK_TOKENS}",
            f"peak memory: {METHOD['cpu']}",
        ],
        decision=Decision(value="record", reason=_said(rate, recomputed, found.peaks)),
        **where.fields(plan._asdict(), command),
    )


def measure(plan: StepPlan, gates: Mapping[str, str], facts: Facts) -> Measured:
    """In a process whose gates are installed: the check, the peaks, then everything interleaved."""
    config = preset(plan.preset)
    ways: dict[str, Checkpointing] = {_KEPT: "none", _RECOMPUTED: "block"}
    outcomes = [o for name, how in ways.items() for o in check_step(name, config, plan.how(how))]
    if not all(outcome.passed for outcome in outcomes):
        return Measured(outcomes, {}, {})
    peaks = {
        name: resident_peak(config, plan.how(how), plan.seq_len, gates=gates, facts=facts, threads=plan.threads)
        for name, how in ways.items()
    }
    kept, recomputed = (Stepper(config, plan.how(how)) for how in ways.values())
    for stepper in (kept, recomputed):
        stepper.length(plan.seq_len)
    runs = {"forward": kept.forward, "forward_backward": kept.gradients, _KEPT: kept.step, _RECOMPUTED: recomputed.step}
    contenders = [Contender(name, run, plan.rounds, warm_up=True) for name, run in runs.items()]
    return Measured(
        outcomes, interleave(contenders, seed=plan.seed, on_sample=lambda name, seconds: None), peaks
    )  # fmt: skip


def _said(rate: float, recomputed: Ratio, peaks: Mapping[str, int | None]) -> str:
    kept, again = peaks[_KEPT], peaks[_RECOMPUTED]
    said = f"{rate:,.0f} tokens/s; recomputing blocks takes {recomputed.value:.2f} of the time"
    if kept and again:
        said += f" and {again / kept:.2f} of the memory"
    return f"{said}; {NO_CHANGE}"
