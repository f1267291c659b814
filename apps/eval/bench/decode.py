"""`fathom bench decode`: time per output token of a hybrid and of its dense twin as the context grows, prefill rate,
live bytes, and what speculation brings.

Everything is measured in one process, interleaved. Not for sharing prefixes (prefix.py).
"""
# T tokens of context

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from apps.eval.bench.correctness import Outcome
from apps.eval.bench.decode_job import STEPS, DecodePlan, Measured, measure
from apps.eval.bench.inference_receipt import Circumstances, aim, own_process
from apps.eval.bench.ops import RedGate
from apps.eval.bench.receipt import Aim, Check, Ratio, Receipt, Sampled
from libs.flags.facts import Facts

HYBRID, TWIN = "hybrid", "twin"


class Context(BaseModel):
    """One model at one context: mean seconds per output token, and the bytes that a request then holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    tokens: int
    seconds_per_token: float
    kv_bytes: int
    state_bytes: int


class Speculation(BaseModel):
    """Drafts on a model trained in this run. speed_up: plain time / time with drafts, whole generation.

    rollback_bytes: held during a verification, per draft token and layer with a state.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rollback: str
    drafted: int
    accepted: int
    acceptance: float
    speed_up: float
    rollback_bytes: float


class DecodeReceipt(Receipt):
    """A receipt with the figures by context, prompt tokens per second, and speculation."""

    contexts: list[Context] = Field(min_length=1)
    prefill_tokens_per_s: dict[str, float]
    speculation: list[Speculation]


def run_decode(plan: DecodePlan, *, command: Sequence[str], machine: str | None) -> DecodeReceipt:
    """Measure in a process of its own, whose gates allow speculation.

    Raises:
        RedGate: tokens with drafts are not those without.
        GateRefused: the environment asks for a gate that cannot be honoured.
    """
    circumstances = Circumstances(plan.threads, command, machine)
    facts = Facts(mimo_backend="chunked", state_slots=True, mtp_depth=1, draft_length=plan.draft_length,
                  kv_block_size=plan.block_size)  # fmt: skip
    with own_process({"FATHOM_MTP_SPECULATION": "on"}, facts, plan.threads) as pool:
        measured = pool.submit(measure, plan).result()
    outcomes = [Outcome(f"{name}: tokens or log-probabilities that differ from plain decode", float(n), 0.0)
                for name, n in measured.differing.items()]  # fmt: skip
    if not all(outcome.passed for outcome in outcomes):
        raise RedGate(outcomes)
    sampled = {
        name: Sampled.of(name, measured.what[name], times, flops=None, warm_up=True)
        for name, times in measured.samples.items()
    }
    figures = _Figures.of(plan, measured, sampled)
    return DecodeReceipt(
        what=f"decode of {plan.preset} and its dense twin, contexts {min(plan.contexts)} to {max(plan.contexts)}",
        subject="decode",
        correctness=[Check(**outcome._asdict(), passed=outcome.passed) for outcome in outcomes],
        contenders=list(sampled.values()),
        ratios=figures.ratios,
        contexts=figures.contexts,
        prefill_tokens_per_s=figures.prefill,
        speculation=figures.speculation,
        left_out=[],
        notes=[
            "decode: one request, one token per pass; the keys, values and states before it are random, not computed",
            f"every decode product has {measured.tile} rows: with one request all but one are padding",
            f"speculation: {plan.speculation_preset} with one MTP depth, trained in this run for {plan.train_steps} "
            "steps on phrases made up at random: its acceptance says nothing about another model",
        ],
        **circumstances.fields(plan._asdict(), figures.aims),
    )


class _Figures(NamedTuple):
    contexts: list[Context]
    prefill: dict[str, float]
    speculation: list[Speculation]
    ratios: list[Ratio]
    aims: list[Aim]

    @classmethod
    def of(cls, plan: DecodePlan, measured: Measured, sampled: dict[str, Sampled]) -> _Figures:
        contexts = [
            Context(
                model=name,
                tokens=tokens,
                seconds_per_token=sampled[f"{name}_T{tokens}"].mean_s / STEPS,
                kv_bytes=measured.kv_bytes[name, tokens],
                state_bytes=measured.state_bytes[name],
            )
            for name in (HYBRID, TWIN)
            for tokens in plan.contexts
        ]
        prefill = {name: plan.prefill_tokens / sampled[f"prefill_{name}"].mean_s for name in (HYBRID, TWIN)}
        low, high = min(plan.contexts), max(plan.contexts)
        grown = {
            name: Ratio.of(f"{name}_T{high}_over_T{low}", sampled[f"{name}_T{high}"], sampled[f"{name}_T{low}"])
            for name in (HYBRID, TWIN)
        }
        faster = {
            name: Ratio.of(f"plain_over_{name}", sampled["plain"], sampled[name]) for name in measured.rollback_bytes
        }
        speculation = [
            Speculation(
                rollback=name,
                drafted=drafted,
                accepted=accepted,
                acceptance=accepted / drafted,
                speed_up=faster[name].value,
                rollback_bytes=measured.rollback_bytes[name],
            )
            for name, (drafted, accepted) in measured.drafts.items()
        ]
        twin = Ratio.of(f"twin_over_hybrid_T{high}", sampled[f"{TWIN}_T{high}"], sampled[f"{HYBRID}_T{high}"])
        share = (measured.kv_bytes[HYBRID, high] + measured.state_bytes[HYBRID]) / measured.kv_bytes[TWIN, high]
        aims = [
            aim(f"growth of the hybrid's time per token, {low} to {high}", grown[HYBRID].value, "<", grown[TWIN].value),
            aim(f"live bytes at {high}, hybrid / twin", share, "<", 1.0),
        ]
        return cls(contexts, prefill, speculation, [*grown.values(), twin, *faster.values()], aims)
