"""`fathom bench prefix`: many requests with one prompt, with the prefix cache off, memory_only and snapshots.

What is counted: blocks in use per step, without the dummy (and with it, as others count), prompt tokens computed, and
whether tokens and log-probabilities are the same. Not for decode (decode.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field

from apps.eval.bench.correctness import Outcome
from apps.eval.bench.inference_receipt import Circumstances, aim, own_process
from apps.eval.bench.interleave import Contender, interleave
from apps.eval.bench.ops import RedGate
from apps.eval.bench.receipt import Aim, Check, Ratio, Receipt, Sampled
from libs.flags.facts import Facts
from libs.model import HybridLM, preset
from libs.model.inference import Completion, Engine, EngineConfig, PrefixMode, Sampling

MODES = tuple(mode.value for mode in PrefixMode)
# Requests, prompt tokens and new tokens of the published workload, and the peak blocks saved by sharing that it must
# reach, by block size.
PUBLISHED = (10, 644, 10)
PEAK_SAVED = {256: 0.60, 64: 0.81, 16: 0.87}
REPEAT_SKIPPED = 0.99


class PrefixPlan(NamedTuple):
    """The workload: `requests` times one random prompt of `prompt_tokens`, `new_tokens` greedy ones each."""

    preset: str
    requests: int
    prompt_tokens: int
    new_tokens: int
    blocks: tuple[int, ...]
    rounds: int
    threads: int
    seed: int


class Account(BaseModel):
    """One mode at one block size. Blocks are without the dummy; `published_*` count it, as others do.

    repeat_skipped: share of the prompt that the second and later requests did not compute.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: str
    block_size: int
    peak_blocks: int = Field(gt=0)
    mean_blocks: float
    published_peak: int
    published_mean: float
    prefill_tokens: int
    skipped_tokens: int
    repeat_skipped: float


class PrefixReceipt(Receipt):
    """A receipt with the accounts."""

    accounts: list[Account] = Field(min_length=1)


class _Ran(NamedTuple):
    seconds: float
    found: tuple[tuple[tuple[int, ...], tuple[float, ...]], ...]
    account: Account


def run_prefix(plan: PrefixPlan, *, command: Sequence[str], machine: str | None) -> PrefixReceipt:
    """Run every mode at every block size in interleaved rounds, one process per mode.

    Raises:
        RedGate: tokens or log-probabilities differ between modes, or memory_only computed another number of tokens.
        GateRefused: the environment asks for a gate that cannot be honoured.
    """
    circumstances = Circumstances(plan.threads, command, machine)
    last: dict[str, _Ran] = {}
    with ExitStack() as stack:
        pools = {mode: stack.enter_context(_pool(mode, plan.threads)) for mode in MODES}
        contenders = [
            Contender(_name(mode, block), _call(pools[mode], plan, block, _name(mode, block), last), plan.rounds, True)
            for block in plan.blocks
            for mode in MODES
        ]
        samples = interleave(contenders, seed=plan.seed, on_sample=lambda name, seconds: None, clock=_seconds)
    outcomes = _check(plan, last)
    if not all(outcome.passed for outcome in outcomes):
        raise RedGate(outcomes)
    sampled = {
        name: Sampled.of(name, f"{plan.requests} requests to the end", times, flops=None, warm_up=True)
        for name, times in samples.items()
    }
    accounts = [last[name].account for name in sampled]
    return PrefixReceipt(
        what=f"{plan.requests} identical prompts of {plan.prompt_tokens} tokens, {plan.new_tokens} greedy tokens each",
        subject="prefix",
        correctness=[Check(**outcome._asdict(), passed=outcome.passed) for outcome in outcomes],
        contenders=list(sampled.values()),
        ratios=[
            Ratio.of(f"off_over_{mode}_block{block}", sampled[_name("off", block)], sampled[_name(mode, block)])
            for block in plan.blocks
            for mode in MODES[1:]
        ],
        accounts=accounts,
        left_out=[],
        notes=[
            "blocks in use, without the dummy block; published figures of others count it",
            "all requests are submitted at once and admitted one after the other, each when the one before it has "
            "finished its prompt; a request holds all blocks it can come to need from then on",
        ],
        **circumstances.fields(plan._asdict(), _aims(plan, {(a.mode, a.block_size): a for a in accounts})),
    )


def _name(mode: str, block: int) -> str:
    return f"{mode}_block{block}"


def _pool(mode: str, threads: int) -> ProcessPoolExecutor:
    return own_process({"FATHOM_PREFIX_CACHE": mode}, Facts(mimo_backend="chunked", state_slots=True), threads)


def _call(
    pool: ProcessPoolExecutor, plan: PrefixPlan, block: int, name: str, last: dict[str, _Ran]
) -> Callable[[], _Ran]:
    def run() -> _Ran:
        last[name] = pool.submit(workload, plan, block).result()
        return last[name]

    return run


def _seconds(run: Callable[[], object]) -> float:
    ran = run()
    assert isinstance(ran, _Ran), "a workload"
    return ran.seconds


def workload(plan: PrefixPlan, block: int) -> _Ran:
    """One run in a process whose gates say the mode: a fresh engine, all requests at once, to the end."""
    model = HybridLM(preset(plan.preset))
    model.eval()
    source = torch.Generator().manual_seed(plan.seed)
    prompt = torch.randint(model.config.vocab_size, (plan.prompt_tokens,), generator=source).tolist()
    limits = EngineConfig(max_batch=plan.requests, max_tokens=plan.prompt_tokens + plan.new_tokens, block_size=block)
    engine = Engine(model, limits)
    started = time.perf_counter()
    found = engine.generate([prompt] * plan.requests, Sampling(max_new_tokens=plan.new_tokens))
    seconds = time.perf_counter() - started
    return _Ran(seconds, tuple((one.tokens, one.logprobs) for one in found), _account(plan, engine, block, found))


def _account(plan: PrefixPlan, engine: Engine, block: int, found: Sequence[Completion]) -> Account:
    counters = engine.counters
    mean = counters["block_steps"] / counters["steps"]
    ran_after = plan.requests * (plan.new_tokens - 1)
    repeats = [one.report.skipped / plan.prompt_tokens for one in found[1:]]
    return Account(
        mode=engine.mode.value,
        block_size=block,
        peak_blocks=counters["peak_blocks"],
        mean_blocks=mean,
        published_peak=counters["peak_blocks"] + 1,
        published_mean=mean + 1,
        prefill_tokens=counters["computed_tokens"] - ran_after,
        skipped_tokens=counters["skipped_tokens"],
        repeat_skipped=min(repeats, default=0.0),
    )


def _check(plan: PrefixPlan, last: dict[str, _Ran]) -> list[Outcome]:
    outcomes = []
    wanted = last[_name("off", plan.blocks[0])]
    for name, ran in last.items():
        differing = sum(one != other for one, other in zip(ran.found, wanted.found, strict=True))
        outcomes.append(Outcome(f"{name}: requests whose tokens or log-probabilities differ from off", differing, 0.0))
    for block in plan.blocks:
        computed = [last[_name(mode, block)].account.prefill_tokens for mode in MODES[:2]]
        outcomes.append(
            Outcome(f"block {block}: prefill tokens, memory_only - off", abs(computed[1] - computed[0]), 0.0)
        )
    return outcomes


def _aims(plan: PrefixPlan, accounts: dict[tuple[str, int], Account]) -> list[Aim]:
    if (plan.requests, plan.prompt_tokens, plan.new_tokens) != PUBLISHED:
        return []  # the aims are those of one workload
    aims = []
    for block in plan.blocks:
        saved = 1 - accounts["memory_only", block].peak_blocks / accounts["off", block].peak_blocks
        aims.append(aim(f"peak blocks saved by memory_only at block {block}", saved, ">=", PEAK_SAVED[block]))
    best = max(accounts["snapshots", block].repeat_skipped for block in plan.blocks)
    return [*aims, aim("share of a repeated prompt skipped by snapshots", best, ">=", REPEAT_SKIPPED)]
