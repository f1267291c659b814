"""`fathom bench comm`: bytes and time of the scan under context parallelism, state hand-over against all-to-all; the
speed-up of a whole step. Measured with gloo processes on this machine.

Not a statement about NCCL or NVLink: bytes carry over, times do not.
"""
# S tokens of the whole row

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from apps.eval.bench.comm_job import METHODS, CommPlan, run_job
from apps.eval.bench.comm_step import STEP_METHODS
from apps.eval.bench.machine import Where
from apps.eval.bench.ops import RedGate
from apps.eval.bench.receipt import Aim, Check, Decision, LeftOut, Ratio, Receipt, Sampled
from libs.flags.facts import Facts
from libs.flags.provenance import cpu_model


class Traffic(BaseModel):
    """Bytes that one rank gives to others for one layer and one row, forward and backward together, in fp32."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seq_len: int
    processes: int
    hand_over_bytes: int = Field(gt=0)
    all_to_all_bytes: int = Field(gt=0)


class CommReceipt(Receipt):
    """A receipt with the bytes exchanged."""

    traffic: list[Traffic] = Field(min_length=1)


def run_comm(plan: CommPlan, *, command: Sequence[str], machine: str | None) -> CommReceipt:
    """Check, measure and sum up.

    Raises:
        RedGate: one of the two ways disagrees with the oracle; nothing has been timed then.
        GateRefused: the environment asks for a gate that cannot be honoured.
    """
    named = machine or f"{cpu_model()} {plan.processes} processes of {plan.threads} threads"
    where = Where(Facts(device="cpu", mimo_backend="chunked"), None, threads=plan.threads, machine=named)
    measured = run_job(plan)
    if not all(outcome.passed for outcome in measured.outcomes):
        raise RedGate(measured.outcomes)
    sampled = {name: _sampled(plan, name, times) for name, times in measured.samples.items()}
    traffic = [Traffic(**row) for row in measured.traffic]
    aims = _aims(traffic)
    shape = plan.shape._replace(S=max(plan.seq_lens)).describe()
    parts = {"shape": shape, "seq_lens": list(plan.seq_lens), "step": plan.step._asdict()}
    config: dict[str, Any] = {**plan._asdict(), **parts}
    return CommReceipt(
        **where.fields(config, command),
        what=f"one layer's scan, its row cut over {plan.processes} gloo processes: state hand-over against all-to-all",
        subject="comm",
        correctness=[Check(**outcome._asdict(), passed=outcome.passed) for outcome in measured.outcomes],
        contenders=list(sampled.values()),
        ratios=_ratios(plan, sampled),
        memory=[],
        traffic=traffic,
        aims=aims,
        left_out=_left_out(plan),
        notes=_notes(plan),
        decision=Decision.of_aims(aims),
    )


def _sampled(plan: CommPlan, name: str, times: Sequence[float]) -> Sampled:
    """By the name `<method>_S<tokens of a row>`."""
    method, length = name.rsplit("_S", 1)
    warm_up = method in STEP_METHODS or int(length) == min(plan.seq_lens)
    return Sampled.of(name, f"{METHODS[method]}, S={length}", times, flops=None, warm_up=warm_up)


def _left_out(plan: CommPlan) -> list[LeftOut]:
    reason = f"a scan's time grows with S alone; one process was timed up to S={plan.alone_up_to}"
    return [LeftOut(name=f"one_process_S{s}", reason=reason) for s in plan.seq_lens if s > plan.alone_up_to]


def _ratios(plan: CommPlan, sampled: dict[str, Sampled]) -> list[Ratio]:
    pairs = [
        (f"{above}_S{seq_len}", f"{below}_S{seq_len}")
        for seq_len in plan.seq_lens
        for above, below in (
            ("all_to_all", "hand_over"),
            ("all_to_all_exchange", "hand_over_exchange"),
            ("one_process", "hand_over"),
            ("one_process", "all_to_all"),
        )
    ]
    S = plan.step.seq_len
    pairs += [(f"step_one_process_S{S}", f"{below}_S{S}") for below in ("step_dp", "step_cp")]
    return [ratio_of(sampled[above], sampled[below]) for above, below in pairs if above in sampled]


def ratio_of(above: Sampled, below: Sampled) -> Ratio:
    """Named `<above>_over_<below>_S<tokens of a row>`."""
    return Ratio.of(f"{above.name.rsplit('_S', 1)[0]}_over_{below.name}", above, below)


def _aims(traffic: Sequence[Traffic]) -> list[Aim]:
    shortest, longest = min(traffic, key=lambda row: row.seq_len), max(traffic, key=lambda row: row.seq_len)
    growth = longest.hand_over_bytes / shortest.hand_over_bytes
    share = longest.hand_over_bytes / longest.all_to_all_bytes
    return [
        Aim(
            name=f"hand-over bytes at S={longest.seq_len} / at S={shortest.seq_len}",
            measured=growth, relation="<=", target=1.0, met=growth <= 1.0,
        ),
        Aim(
            name=f"hand-over bytes / all-to-all bytes at S={longest.seq_len}",
            measured=share, relation="<", target=0.1, met=share < 0.1,
        ),
    ]  # fmt: skip


def _notes(plan: CommPlan) -> list[str]:
    return [
        "bytes: what one rank gives to other ranks, forward and backward, without relaying in rings; operands in fp32 "
        "(in bf16 the all-to-all's halve, the state stays fp32)",
        "every sample ends with a barrier: the slowest rank counts; one untimed call of each layer's work before the "
        f"samples at S={min(plan.seq_lens)}, none at longer rows",
        "all-to-all gathers q, k (one group) and the angles, which all heads share, and trades v, z, A*dt, dt, trap "
        "and the outputs",
        f"{plan.processes} processes of {plan.threads} threads over gloo on one machine: times say nothing of NVLink",
        f"one_process over hand_over: the layer's speed-up from 1 to {plan.processes} processes; the hand-over scans a "
        "second time for the states, about a quarter of the arithmetic",
        f"step_one_process over step_dp and step_cp: the speed-up of an optimizer step of preset {plan.step.model} on "
        f"{plan.processes} rows of {plan.step.seq_len} tokens",
    ]
