"""`fathom bench crossover`: from which length on a hybrid's training step takes less than its dense twin's.

Not for measuring (crossover_job.py) or for where curves meet (crossing.py).
"""
# S tokens

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from apps.eval.bench.crossing import METHOD, Crossing, LogRatio
from apps.eval.bench.crossover_job import MODELS, CrossoverPlan, Found, Model, configs, measure, step_flops
from apps.eval.bench.follows import require_reason, require_same
from apps.eval.bench.inference_receipt import own_process
from apps.eval.bench.machine import Where, gpu_of, step_facts
from apps.eval.bench.model_step import CHECK_TOKENS
from apps.eval.bench.modelled import Modelled, modelled_crossings
from apps.eval.bench.ops import RedGate
from apps.eval.bench.receipt import Check, Decision, LeftOut, Ratio, Receipt, Sampled
from apps.eval.bench.step_memory import METHOD as MEMORY_METHOD
from libs.flags.errors import UserError
from libs.model import ModelConfig, flops_per_token, parameter_count
from libs.model.flops import FORMULA_VERSION

TIME, MEMORY, FLOPS = "time per step", "peak memory", "modelled FLOPs per token"


class Point(BaseModel):
    """One model at one length. seconds: mean of a step on one row of seq_len tokens. peak_bytes: see the notes; null
    where the system does not tell. flops_per_token: forward and backward, by formula."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: Model
    seq_len: int = Field(ge=1)
    rounds: int = Field(ge=1)
    seconds: float = Field(gt=0)
    tokens_per_s: float = Field(gt=0)
    peak_bytes: int | None
    flops_per_token: float = Field(gt=0)


class CrossoverReceipt(Receipt):
    """A receipt with both curves and where they cross. modelled: of devices that are not here, and never measured."""

    parameters: dict[str, int]
    seed: int
    points: list[Point] = Field(min_length=2)
    crossings: list[Crossing]
    modelled: list[Modelled]

    @model_validator(mode="after")
    def _figures_follow_from_samples(self) -> Self:
        self._both_models_at_every_length()
        for point in self.points:
            sampled = self.contender(contender_name(point.model, point.seq_len))
            rate = point.seq_len / sampled.mean_s
            actual = {"seconds": sampled.mean_s, "tokens_per_s": rate, "rounds": sampled.n}
            require_same(sampled.name, point, point.model_copy(update=actual))
        ratios = ratios_of(self.points, self.contenders)
        if [ratio.name for ratio in self.ratios] != [ratio.name for ratio in ratios]:
            wanted = ", ".join(ratio.name for ratio in ratios)
            raise ValueError(f"ratios {', '.join(ratio.name for ratio in self.ratios)}: its points ask for {wanted}")
        for stated, ratio in zip(self.ratios, ratios, strict=True):
            require_same(f"ratio {ratio.name}", stated, ratio)
        actual_crossings = crossings_of(self.points, self.contenders, self.modelled, seed=self.seed)
        if self.crossings != actual_crossings:
            said, found = ("; ".join(one.sentence() for one in each) for each in (self.crossings, actual_crossings))
            raise ValueError(f"states: {said}; its samples give: {found}")
        require_reason(self.decision.reason, decision_of(actual_crossings).reason)
        return self

    def _both_models_at_every_length(self) -> None:
        there = [contender_name(point.model, point.seq_len) for point in self.points]
        wanted = {contender_name(model, point.seq_len) for point in self.points for model in MODELS}
        sampled = {one.name for one in self.contenders}
        if missing := sorted(wanted - set(there)) or sorted(wanted - sampled):
            raise ValueError(f"no point and samples of both models at every length: {', '.join(missing)} missing")
        if len(there) > len(wanted):
            raise ValueError("two points of one model at one length")


def contender_name(model: str, seq_len: int) -> str:
    return f"{model}_step_S{seq_len}"


def run_crossover(
    plan: CrossoverPlan, *, command: Sequence[str], machine: str | None, modelled: Sequence[Modelled] = ()
) -> CrossoverReceipt:
    """Check, measure and sum up.

    Raises:
        RedGate: a model's step is not what fp64 and the references give; nothing has been timed then.
        UserError: no such device, or not one length fits. GateRefused: a gate that cannot be honoured.
    """
    models = configs(plan)
    gpu = gpu_of(plan.how.device)
    facts = step_facts(plan.how, models["hybrid"], max(plan.seq_lens), gpu)
    where = Where(facts, gpu, threads=plan.threads, machine=machine)
    with own_process(where.variables, where.facts, plan.threads) as pool:
        found = pool.submit(measure, plan, where.variables, where.facts).result()
    if not all(outcome.passed for outcome in found.outcomes):
        raise RedGate(found.outcomes)
    if not found.samples:
        said = "; ".join(f"S={seq_len}: {reason}" for seq_len, reason in found.left_out.items())
        raise UserError(f"nothing could be measured: {said}; ask for shorter lengths, or allow more with --max-minutes")
    sampled = [_sampled(models, key, times) for key, times in found.samples.items()]
    points = _points(found, models, sampled)
    crossings = crossings_of(points, sampled, modelled, seed=plan.how.seed)
    return CrossoverReceipt(
        what=f"training step of {plan.preset} against its dense twin, {_span(points)}, {plan.how.precision}",
        subject="crossover",
        correctness=[Check(**outcome._asdict(), passed=outcome.passed) for outcome in found.outcomes],
        contenders=sampled,
        ratios=ratios_of(points, sampled),
        memory=[],
        aims=[],
        parameters={name: parameter_count(config).total for name, config in models.items()},
        seed=plan.how.seed,
        points=points,
        crossings=crossings,
        modelled=list(modelled),
        left_out=[LeftOut(name=f"S={seq_len}", reason=reason) for seq_len, reason in found.left_out.items()],
        notes=_notes(plan, models, found),
        decision=decision_of(crossings),
        **where.fields(_config(plan, models), command),
    )


def crossings_of(
    points: Sequence[Point], contenders: Sequence[Sampled], modelled: Sequence[Modelled], *, seed: int
) -> list[Crossing]:
    """By time (with an interval), by peak memory where it is known, by FLOPs; then those that are modelled."""
    lengths = sorted({point.seq_len for point in points})
    crossings = []
    if len(lengths) > 1:
        times = {sampled.name: sampled.samples_s for sampled in contenders}
        of_time = [LogRatio.of(s, *(times[contender_name(model, s)] for model in MODELS)) for s in lengths]
        crossings.append(Crossing.of(TIME, of_time, seed=seed))
        by = {(point.model, point.seq_len): point for point in points}
        for quantity, field in ((MEMORY, "peak_bytes"), (FLOPS, "flops_per_token")):
            pairs = [tuple(getattr(by[model, s], field) for model in MODELS) for s in lengths]
            if all(None not in pair and min(pair) > 0 for pair in pairs):
                ratios = [LogRatio(s, math.log(h / t), None, 1) for s, (h, t) in zip(lengths, pairs, strict=True)]
                crossings.append(Crossing.of(quantity, ratios, seed=seed))
    return [*crossings, *modelled_crossings(modelled, seed=seed)]


def decision_of(crossings: Sequence[Crossing]) -> Decision:
    """What is said of time, which is measured; of nothing that is modelled."""
    by_time = next((crossing.sentence() for crossing in crossings if crossing.quantity == TIME), None)
    return Decision(value="record", reason=by_time or "one length: no crossing can be seen")


def ratios_of(points: Sequence[Point], contenders: Sequence[Sampled]) -> list[Ratio]:
    """Time of the hybrid over that of the twin, at each length."""
    by = {sampled.name: sampled for sampled in contenders}
    return [
        Ratio.of(f"hybrid_over_twin_S{s}", by[contender_name("hybrid", s)], by[contender_name("twin", s)])
        for s in sorted({point.seq_len for point in points})
    ]


def _sampled(models: Mapping[Model, ModelConfig], key: tuple[Model, int], times: Sequence[float]) -> Sampled:
    model, seq_len = key
    what = f"forward, backward and update of {models[model].name} on one row of {seq_len} tokens"
    flops = step_flops(models[model], seq_len)
    return Sampled.of(contender_name(model, seq_len), what, times, flops=flops, warm_up=True)


def _points(found: Found, models: Mapping[Model, ModelConfig], contenders: Sequence[Sampled]) -> list[Point]:
    means = {sampled.name: sampled for sampled in contenders}
    points = []
    for model, seq_len in found.samples:
        sampled = means[contender_name(model, seq_len)]
        points.append(
            Point(
                model=model,
                seq_len=seq_len,
                rounds=sampled.n,
                seconds=sampled.mean_s,
                tokens_per_s=seq_len / sampled.mean_s,
                peak_bytes=found.peaks[model, seq_len],
                flops_per_token=flops_per_token(models[model], seq_len).train,
            )
        )
    return points


def _span(points: Sequence[Point]) -> str:
    lengths = [point.seq_len for point in points]
    return f"{min(lengths):,} to {max(lengths):,} tokens"


def _config(plan: CrossoverPlan, models: Mapping[Model, ModelConfig]) -> dict[str, Any]:
    described = {name: config.model_dump(mode="json") for name, config in models.items()}
    return {**plan._asdict(), "seq_lens": list(plan.seq_lens), "how": plan.how._asdict(), "models": described}


def _notes(plan: CrossoverPlan, models: Mapping[Model, ModelConfig], found: Found) -> list[str]:
    sizes = {name: parameter_count(config).total for name, config in models.items()}
    return [
        f"equal parameters: {models['hybrid'].pattern} {sizes['hybrid']:,}; {models['twin'].pattern} {sizes['twin']:,}",
        "a sample: one whole step (forward, backward, clipping, AdamW) on one row without document boundaries, tokens "
        f"at random; activation checkpointing: {plan.how.checkpointing}; both models in turn in one process",
        f"the correctness gate: loss, gradient norm and norm of the update at S={CHECK_TOKENS}",
        f"crossing: {METHOD}",
        f"peak memory: {MEMORY_METHOD[plan.how.device]}",
        f"modelled FLOPs: formula version {FORMULA_VERSION}, forward and backward, recomputation not counted",
        *(f"S={seq_len}: {reason}" for seq_len, reason in found.fewer.items()),
    ]
