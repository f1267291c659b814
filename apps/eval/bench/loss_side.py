"""`fathom bench loss-side`: held-out bits per byte of a hybrid and its dense twin after an equal budget, seed by seed.

The other half of the question where a hybrid pays: at 4k tokens dense attention is said to be as fast, with a lower
loss. Not for training or scoring, which the programs do (loss_side_runs.py).
"""
# S tokens of a window

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from apps.eval.bench.correctness import Outcome
from apps.eval.bench.follows import require_reason, require_same
from apps.eval.bench.loss_side_runs import LossSidePlan, Trained, run_all
from apps.eval.bench.machine import Where
from apps.eval.bench.ops import RedGate
from apps.eval.bench.receipt import Check, Decision, Ratio, Receipt, Sampled
from apps.eval.results import Estimate
from libs.flags.facts import Facts
from libs.flags.paired import Interval, paired_difference
from libs.model.presets import TWIN_TOLERANCE


class _Closed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SeedScore(_Closed):
    """One run. bpb: of the held-out documents, with its interval over documents; tokens: it was trained on."""

    model: Literal["hybrid", "twin"]
    seed: int
    run: str
    bpb: Estimate
    tokens: int = Field(ge=1)
    documents: int = Field(ge=1)


class Spread(_Closed):
    """Mean over seeds, with its 95 % t-interval; null with one seed."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float], against: Sequence[float] | None = None) -> Self:
        """Of values, or of their paired differences from others."""
        mean, interval = paired_difference(values, [0.0] * len(values) if against is None else against)
        bounds = Interval(*interval) if interval is not None else None
        return cls(
            mean=mean, low=None if bounds is None else bounds.low, high=None if bounds is None else bounds.high,
            n=len(values),
        )  # fmt: skip


Answer = Literal["dense_lower", "hybrid_lower", "not_told_apart"]


class LossSideReceipt(Receipt):
    """A receipt with the scores. difference: hybrid - twin, paired by seed (same data order), in bits per byte."""

    scores: list[SeedScore] = Field(min_length=2)
    hybrid: Spread
    twin: Spread
    difference: Spread
    answer: Answer

    @model_validator(mode="after")
    def _figures_follow_from_scores(self) -> Self:
        hybrid, twin, difference = spreads_of(self.scores)
        for name, stated, actual in (
            ("hybrid", self.hybrid, hybrid), ("twin", self.twin, twin), ("difference", self.difference, difference),
        ):  # fmt: skip
            require_same(name, stated, actual)
        if self.answer != answer_of(difference):
            raise ValueError(f"answer {self.answer}, but its scores say {answer_of(difference)}")
        require_reason(self.decision.reason, sentence(self.answer, hybrid, twin, difference, self.scores[0].tokens))
        return self


def run_loss_side(plan: LossSidePlan, folder: Path, *, command: Sequence[str], machine: str | None) -> LossSideReceipt:
    """Train, score and sum up; what `folder` has already is not done again.

    Raises:
        RedGate: a run broke the rules of its log, or the two models did not get the same.
        UserError: a program failed, or the folder is of another plan. RunRefused: a program was refused.
    """
    where = Where(Facts(device="cpu", mimo_backend="chunked"), None, threads=plan.threads, machine=machine)
    runs = run_all(plan, folder)
    outcomes = check_runs(runs)
    if not all(outcome.passed for outcome in outcomes):
        raise RedGate(outcomes)
    scores = [_score(run) for run in runs]
    hybrid, twin, difference = spreads_of(scores)
    sampled = {model: _sampled(plan, model, runs) for model in plan.models}
    answer = answer_of(difference)
    return LossSideReceipt(
        what=f"held-out bits per byte of {plan.hybrid} and its dense twin, {plan.steps} steps of {plan.window} tokens",
        subject="loss_side",
        correctness=[Check(**outcome._asdict(), passed=outcome.passed) for outcome in outcomes],
        contenders=list(sampled.values()),
        ratios=[Ratio.of("hybrid_over_twin_step", sampled["hybrid"], sampled["twin"])],
        memory=[],
        aims=[],
        scores=scores,
        hybrid=hybrid,
        twin=twin,
        difference=difference,
        answer=answer,
        left_out=[],
        notes=_notes(plan, runs),
        decision=Decision(value="record", reason=sentence(answer, hybrid, twin, difference, scores[0].tokens)),
        **where.fields({**plan._asdict(), "seeds": list(plan.seeds), "words": list(plan.words)}, command),
    )


def check_runs(runs: Sequence[Trained]) -> list[Outcome]:
    """Every log keeps its rules; both models of a seed read as much of the same data, and were scored on the same."""
    outcomes = [Outcome(f"{run.run}: rules of the run log", float(run.violations), 0.0) for run in runs]
    for seed in dict.fromkeys(run.seed for run in runs):
        hybrid, twin = (next(run for run in runs if (run.model, run.seed) == (m, seed)) for m in ("hybrid", "twin"))
        unequal = {
            "tokens trained on": hybrid.tokens != twin.tokens,
            "training data": hybrid.data != twin.data,
            "steps of the checkpoints scored": hybrid.score.checkpoint.step != twin.score.checkpoint.step,
            "documents scored": hybrid.score.data.prompt_sha256 != twin.score.data.prompt_sha256,
        }
        sizes = abs(hybrid.score.checkpoint.parameters / twin.score.checkpoint.parameters - 1)
        outcomes.append(Outcome(f"seed {seed}: parameters differ", sizes, TWIN_TOLERANCE))
        outcomes += [Outcome(f"seed {seed}: {what} differ", float(differ), 0.0) for what, differ in unequal.items()]
    return outcomes


def spreads_of(scores: Sequence[SeedScore]) -> tuple[Spread, Spread, Spread]:
    """Of the hybrid, of the twin, and of their paired differences. Raises ValueError when a score has no partner."""
    seeds = list(dict.fromkeys(score.seed for score in scores))
    by = {(score.model, score.seed): score.bpb.value for score in scores}
    if len(by) < len(scores) or len(by) < 2 * len(seeds):
        raise ValueError("not one score of each model for every seed")
    hybrid, twin = [by["hybrid", seed] for seed in seeds], [by["twin", seed] for seed in seeds]
    return Spread.of(hybrid), Spread.of(twin), Spread.of(hybrid, twin)


def answer_of(difference: Spread) -> Answer:
    """By the interval of the paired difference, and nothing without one."""
    if difference.low is None or difference.high is None or difference.low <= 0 <= difference.high:
        return "not_told_apart"
    return "dense_lower" if difference.low > 0 else "hybrid_lower"


def sentence(answer: Answer, hybrid: Spread, twin: Spread, difference: Spread, tokens: int) -> str:
    """In words, with the budget, which is each run's tokens: a small one shows little."""
    words = {
        "dense_lower": "the dense twin has the lower loss",
        "hybrid_lower": "the hybrid has the lower loss",
        "not_told_apart": "not told apart",
    }[answer]
    bounds = "one seed"
    if difference.low is not None and difference.high is not None:
        bounds = f"{difference.low:+.4f} to {difference.high:+.4f}"
    return (
        f"{words}: {hybrid.mean:.4f} against {twin.mean:.4f} bits per byte, difference {difference.mean:+.4f} "
        f"({bounds}), {difference.n} seeds, {tokens:,} tokens each"
    )


def _score(run: Trained) -> SeedScore:
    return SeedScore(
        model="hybrid" if run.model == "hybrid" else "twin",
        seed=run.seed,
        run=run.run,
        bpb=run.details.bpb,
        tokens=run.tokens,
        documents=run.score.n,
    )


def _sampled(plan: LossSidePlan, model: str, runs: Sequence[Trained]) -> Sampled:
    times = [run.step_s for run in runs if run.model == model]
    what = f"mean step of {plan.models[model]} at window {plan.window}, one sample per seed"
    return Sampled.of(model, what, times, flops=None, warm_up=True)


def _notes(plan: LossSidePlan, runs: Sequence[Trained]) -> list[str]:
    tokens, first = plan.steps * plan.window, runs[0]
    sizes = {run.model: run.score.checkpoint.parameters for run in runs}
    return [
        f"a budget of {tokens:,} tokens is {tokens / sizes['hybrid']:.2g} per parameter: a small one compares how fast "
        "the two begin to learn, not what they come to",
        f"equal parameters ({sizes['hybrid']:,} and {sizes['twin']:,}), data order, schedule, rate and seeds; the rate "
        "is the recipe's for both, tuned for neither",
        f"intervals of means and of the difference: over {len(plan.seeds)} seeds, t; of each score: over documents",
        f"scored: {first.score.n} held-out documents of at most {plan.max_tokens} tokens, {first.score.suite} version "
        f"{first.score.suite_version}; longer ones are left out and counted in each result",
        f"compressors on the same bytes, each document alone: {_compressors(first)}",
        "times: runs one after the other, both models of a seed in turn; not interleaved step by step",
    ]


def _compressors(run: Trained) -> str:
    found = run.details.compression.compressors
    return ", ".join(f"{one.name} {one.per_document_bpb:.3f} bits per byte" for one in found)
