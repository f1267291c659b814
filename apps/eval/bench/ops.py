# S tokens
"""`fathom bench ops`: the MIMO scan against the machine's GEMM rate, the plain formulation and causal SDPA.

Not for the training step or for decoding, which get benchmarks of their own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from apps.eval.bench.contenders import (
    CONTENDER_NOTES,
    Kind,
    forward_runner,
    gemm_flops,
    gemm_runner,
    training_runner,
)
from apps.eval.bench.correctness import Outcome, check_contenders
from apps.eval.bench.interleave import Contender, interleave
from apps.eval.bench.machine import Where
from apps.eval.bench.memory import Peak, measure_peak
from apps.eval.bench.operands import FLOP_FORMULA, Shape, scan_flops
from apps.eval.bench.receipt import (
    Aim,
    Check,
    Decision,
    LeftOut,
    Memory,
    Ratio,
    Receipt,
    Sampled,
)
from libs.flags.facts import Facts

KINDS: tuple[Kind, ...] = get_args(Kind)
# A contender may not need more than this share of the memory that is free: swapping would be timed instead.
_MEMORY_SHARE = 0.7


class OpsPlan(NamedTuple):
    """What one run measures. Rounds for lengths above `long_from` are capped at `long_rounds`."""

    seq_lens: tuple[int, ...]
    main_seq_len: int
    gemm_sizes: tuple[int, ...]
    rounds: int
    long_from: int
    long_rounds: int
    chunk_size: int
    threads: int
    seed: int

    def rounds_at(self, seq_len: int) -> int:
        return min(self.rounds, self.long_rounds) if seq_len > self.long_from else self.rounds


def full_plan(*, rounds: int, chunk_size: int, threads: int, seed: int) -> OpsPlan:
    """The plan of the acceptance figures: S = 2k, 8k, 32k, GEMM at 1024, 1536 and 2048."""
    return OpsPlan(
        (2048, 8192, 32768), 8192, (1024, 1536, 2048), rounds, 8192, 3, chunk_size, threads, seed
    )  # fmt: skip


def quick_plan(*, rounds: int, chunk_size: int, threads: int, seed: int) -> OpsPlan:
    """Seconds instead of minutes, to see that everything runs; its figures are not the acceptance figures."""
    return OpsPlan((256, 1024), 1024, (256, 512), rounds, 1024, 3, chunk_size, threads, seed)


class RedGate(RuntimeError):
    """The correctness gate is red: the outcomes, and no speed."""

    def __init__(self, outcomes: Sequence[Outcome]) -> None:
        self.outcomes = tuple(outcomes)
        rows = [f"  {o.name}: error {o.error:.3g}, tolerance {o.tolerance:.3g}" for o in outcomes if not o.passed]
        super().__init__("\n".join(["correctness gate is red, so no speed is reported:", *rows]))


def name_of(kind: Kind, seq_len: int, *, training: bool) -> str:
    return f"{kind}_{'forward_backward' if training else 'forward'}_S{seq_len}"


def run_ops(plan: OpsPlan, *, command: Sequence[str], machine: str | None) -> Receipt:
    """Check, measure and sum up.

    Raises:
        RedGate: the op or the plain formulation disagrees with the oracle; nothing has been timed then.
        GateRefused: the environment asks for a gate that cannot be honoured.
    """
    where = Where(Facts(device="cpu", mimo_backend="chunked"), None, threads=plan.threads, machine=machine)
    torch.set_num_threads(plan.threads)
    outcomes = check_contenders(seed=plan.seed, chunk_size=plan.chunk_size)
    if not all(outcome.passed for outcome in outcomes):
        raise RedGate(outcomes)
    peaks = _measure_memory(plan)
    kept, left_out = _fitting(plan, peaks)
    sampled = _measure_times(plan, kept)
    ratios = _ratios(plan, sampled)
    config: dict[str, Any] = {**plan._asdict(), "shape": Shape(plan.main_seq_len).describe()}
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
    aims = _aims(plan, ratios, peaks)
    return Receipt(
        **where.fields(config, command),
        what=f"mamba3_mimo at {Shape(plan.main_seq_len).describe()} against GEMM, plain PyTorch, SDPA",
        subject="ops",
        correctness=[Check(**outcome._asdict(), passed=outcome.passed) for outcome in outcomes],
        contenders=list(sampled.values()),
        ratios=ratios,
        memory=[_memory_record(kind, plan.main_seq_len, peak) for kind, peak in peaks.items()],
        aims=aims,
        left_out=left_out,
        notes=_notes(plan),
        decision=Decision.of_aims(aims),
    )


def _measure_memory(plan: OpsPlan) -> dict[Kind, Peak]:
    return {
        kind: measure_peak(kind, Shape(plan.main_seq_len), chunk_size=plan.chunk_size, threads=plan.threads)
        for kind in KINDS
    }


def _fitting(plan: OpsPlan, peaks: dict[Kind, Peak]) -> tuple[list[tuple[Kind, int, bool]], list[LeftOut]]:
    """The (kind, S, training) that fit into free memory, and those that do not, with the figures."""
    kept: list[tuple[Kind, int, bool]] = []
    left_out: list[LeftOut] = []
    limit = _MEMORY_SHARE * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for seq_len in plan.seq_lens:
        for kind in KINDS:
            peak = peaks[kind]
            need = (peak.extra_bytes + 2 * peak.input_bytes) * seq_len / plan.main_seq_len
            if need <= limit:
                kept += [(kind, seq_len, False), (kind, seq_len, True)]
                continue
            reason = f"needs about {need / 2**30:.1f} GiB, {limit / 2**30:.1f} GiB may be used"
            left_out += [LeftOut(name=name_of(kind, seq_len, training=t), reason=reason) for t in (False, True)]
    return kept, left_out


def _measure_times(plan: OpsPlan, kept: Sequence[tuple[Kind, int, bool]]) -> dict[str, Sampled]:
    contenders: list[Contender] = []
    what: dict[str, str] = {}
    flops: dict[str, float | None] = {}
    for size in plan.gemm_sizes:
        name = f"gemm_{size}"
        contenders.append(Contender(name, gemm_runner(size, seed=plan.seed), plan.rounds, warm_up=True))
        what[name], flops[name] = f"torch.mm fp32 {size} x {size} x {size}", gemm_flops(size)
    for kind, seq_len, training in kept:
        name = name_of(kind, seq_len, training=training)
        maker = training_runner if training else forward_runner
        run = maker(kind, Shape(seq_len), seed=plan.seed, chunk_size=plan.chunk_size)
        warm_up = seq_len <= plan.long_from
        contenders.append(Contender(name, run, plan.rounds_at(seq_len), warm_up))
        what[name] = f"{CONTENDER_NOTES[kind]}, S={seq_len}, " + (
            "forward + backward" if training else "forward, no_grad"
        )
        flops[name] = scan_flops(Shape(seq_len)) if kind != "sdpa" and not training else None
    with _progress() as progress:
        task = progress.add_task("samples", total=sum(contender.rounds for contender in contenders), now="warm-up")
        samples = interleave(
            contenders, seed=plan.seed, on_sample=lambda name, _: progress.update(task, advance=1, now=name)
        )
    return {
        c.name: Sampled.of(c.name, what[c.name], samples[c.name], flops=flops[c.name], warm_up=c.warm_up)
        for c in contenders
    }


def _progress() -> Progress:
    """On stderr: stdout may be JSON."""
    columns = (
        TextColumn("bench ops"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}"),
    )
    return Progress(*columns, console=Console(file=sys.stderr), transient=True)


def best_gemm(sampled: dict[str, Sampled]) -> Sampled:
    """The GEMM with the highest mean rate: the machine's fp32 matrix rate as used in every fraction."""
    gemms = [s for name, s in sampled.items() if name.startswith("gemm_")]
    return max(gemms, key=lambda s: (s.flops or 0.0) / s.mean_s)


def _ratios(plan: OpsPlan, sampled: dict[str, Sampled]) -> list[Ratio]:
    gemm = best_gemm(sampled)
    assert gemm.flops is not None
    ratios: list[Ratio] = []
    for seq_len in plan.seq_lens:
        for kind in ("op", "plain"):
            forward = sampled.get(name_of(kind, seq_len, training=False))
            if forward is not None:
                scale = scan_flops(Shape(seq_len)) / gemm.flops
                ratios.append(Ratio.of(f"{kind}_gemm_fraction_S{seq_len}", gemm, forward, scale=scale))
        for kind in KINDS:
            forward = sampled.get(name_of(kind, seq_len, training=False))
            training = sampled.get(name_of(kind, seq_len, training=True))
            if forward is not None and training is not None:
                ratios.append(Ratio.of(f"{kind}_forward_backward_over_forward_S{seq_len}", training, forward))
        for other in ("plain", "sdpa"):
            for with_backward in (False, True):
                ours = sampled.get(name_of("op", seq_len, training=with_backward))
                theirs = sampled.get(name_of(other, seq_len, training=with_backward))
                if ours is not None and theirs is not None:
                    phase = "forward_backward" if with_backward else "forward"
                    ratios.append(Ratio.of(f"{other}_over_op_{phase}_S{seq_len}", theirs, ours))
    return ratios


def _aims(plan: OpsPlan, ratios: Sequence[Ratio], peaks: dict[Kind, Peak]) -> list[Aim]:
    value = {ratio.name: ratio.value for ratio in ratios}
    fraction = value[f"op_gemm_fraction_S{plan.main_seq_len}"]
    backward = value[f"op_forward_backward_over_forward_S{plan.main_seq_len}"]
    memory = peaks["op"].multiple
    return [
        Aim(
            name="forward, share of the GEMM rate",
            measured=fraction,
            relation=">=",
            target=0.20,
            met=fraction >= 0.20,
        ),
        Aim(
            name="forward+backward / forward",
            measured=backward,
            relation="<=",
            target=4.0,
            met=backward <= 4.0,
        ),
        Aim(
            name="peak extra memory / bytes of inputs",
            measured=memory,
            relation="<",
            target=12.0,
            met=memory < 12.0,
        ),
    ]


def _memory_record(kind: Kind, seq_len: int, peak: Peak) -> Memory:
    return Memory(name=kind, seq_len=seq_len, **peak._asdict(), extra_bytes=peak.extra_bytes, multiple=peak.multiple)


def _notes(plan: OpsPlan) -> list[str]:
    main = Shape(plan.main_seq_len)
    return [
        f"scan FLOPs: {FLOP_FORMULA}; {scan_flops(main) / 1e9:.1f} GFLOP at S={main.S}",
        "GEMM rate: the torch.mm size with the highest mean rate, same threads, in the same rounds",
        "forward runs under no_grad; forward+backward takes the gradients of every input",
        "ratios: geometric mean over pairs of one round, 95 % t-interval on the logarithm",
        "memory: the larger of allocator events and resident-set high-water, each in a fresh process; "
        "the inputs are not counted, their gradients are",
        f"rounds above S={plan.long_from}: {plan.rounds_at(plan.long_from + 1)}, without a warm-up call",
    ]
